"""Compare GGCVT with its direct formulation.

benchmarks/speed/ggcvt.py [--models ggcvt-vigor ...] [--runs 9] [--json FILE]

The direct formulation, as published, encodes the tile with every frame, slides the overhead view over it with
an ordinary convolution, and projects the keys and values of every cell again. ``cached`` keeps the tile
and runs in PyTorch, ``openvino`` keeps it and runs in OpenVINO.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from frame import median_ms, peak_rss_mb
from rich.console import Console
from rich.table import Table


def measure(name: str, formulation: str, threads: int, runs: int) -> dict[str, float | str]:
    """Measure one formulation; run it in its own process, so that the peak memory is its own."""
    import torch
    import torch.nn.functional as F

    from xview_loc.models import create_model
    from xview_loc.models.attention import CrossAttention
    from xview_loc.models.ggcvt import GGCVT
    from xview_loc.models.graph import FrameSettings
    from xview_loc.models.runtimes import make_runtime

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = create_model(name)
    assert isinstance(model, GGCVT)
    spec = model.spec
    ground = torch.rand(1, 3, *spec.ground_size)
    aerial = torch.rand(1, 3, spec.aerial_size, spec.aerial_size)
    settings = FrameSettings.of(model, 0.0)
    camera = settings.extra()

    def attend(self: CrossAttention, cells: Any, columns: Any, plan: Any) -> Any:
        pairs = torch.empty(len(plan.slots), 2, dtype=torch.long)
        block = torch.arange(len(plan.cells)) // (len(plan.cells) // len(plan.columns))
        pairs[:] = plan.columns[block[plan.slots]]
        seen = columns[0][pairs].flatten(1, 2)
        heads = self._heads
        query = self.to_q(cells[0]).unflatten(1, (heads, 1, -1))
        key = self.to_k(seen).unflatten(2, (heads, -1)).transpose(1, 2)
        value = self.to_v(seen).unflatten(2, (heads, -1)).transpose(1, 2)
        weights = (query @ key.transpose(2, 3) / key.shape[3] ** 0.5).softmax(3)
        x = self.prenorm(self.proj((weights @ value).flatten(1)[None]))
        return self.postnorm(x + self.mlp(x))

    def crop(x: Any, side: int) -> Any:
        start = round((x.shape[-1] - side) / 2)
        return x[..., start : start + side, start : start + side]

    def direct_forward() -> list[Any]:
        levels = [F.relu(x) for x in model.SatFeatureNet(aerial)]
        trust = model.uncertain_net(levels)
        scores = []
        overhead = model.encode_ground(ground, **camera)
        for x, weight, view, side in zip(levels, trust, overhead, model.crop_sizes(), strict=True):
            kernel = crop(view, side)
            similarity = F.conv2d(x, kernel / kernel.norm())[:, 0]
            energy = F.avg_pool2d(x.square(), side, stride=1, divisor_override=1).sum(1)
            energy = energy * crop(weight[:, 0], similarity.shape[-1])
            scores.append(2 * similarity / energy.sqrt().clamp_min(1e-6) - 2)
        return scores

    with torch.inference_mode():
        row: dict[str, float | str] = {"model": name, "formulation": formulation}
        if formulation == "ours":
            features = model.encode_aerial(aerial)
            row["encode_aerial_ms"] = median_ms(lambda: model.encode_aerial(aerial), runs, 1)
            row["match_ms"] = median_ms(lambda: model.match(ground, features, 0, **camera), runs, 1)
            row["forward_ms"] = median_ms(
                lambda: model.match(ground, model.encode_aerial(aerial), 0, **camera), runs, 1
            )
            frame = make_runtime(model, "openvino", settings, "float32")
            row["openvino_ms"] = median_ms(
                lambda: model.maps(frame(ground, model.tile_tensors(features)), features), runs, 1
            )
        else:
            CrossAttention.forward = attend  # type: ignore[method-assign]
            row["forward_ms"] = median_ms(direct_forward, max(1, runs // 3), 1)
        row["peak_rss_mb"] = peak_rss_mb()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=("ggcvt-vigor", "ggcvt-kitti", "ggcvt-small"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()

    table = Table(title=f"batch 1, float32, {arguments.threads} CPU threads, median of {arguments.runs} runs")
    table.add_column("model", no_wrap=True)
    for heading in (
        "encode, ms",
        "match, ms",
        "forward, ms",
        "direct, ms",
        "forward, x",
        "cached, x",
        "openvino, ms",
        "openvino, x",
        "RSS, MB",
        "direct RSS, MB",
    ):
        table.add_column(heading, justify="right")
    results = []
    for name in arguments.models:
        rows = []
        for formulation in ("ours", "direct"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(
                    pool.submit(measure, name, formulation, arguments.threads, arguments.runs).result()
                )
        results += rows
        ours, direct = rows
        slow = float(direct["forward_ms"])
        figures = [ours["encode_aerial_ms"], ours["match_ms"], ours["forward_ms"], slow]
        table.add_row(
            name,
            *(f"{float(x):.0f}" for x in figures),
            f"{slow / float(ours['forward_ms']):.1f}",
            f"{slow / float(ours['match_ms']):.1f}",
            f"{float(ours['openvino_ms']):.0f}",
            f"{slow / float(ours['openvino_ms']):.1f}",
            f"{float(ours['peak_rss_mb']):.0f}",
            f"{float(direct['peak_rss_mb']):.0f}",
        )
    Console(width=130).print(table)
    if arguments.json:
        settings = {"threads": arguments.threads, "runs": arguments.runs}
        arguments.json.write_text(json.dumps({**settings, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
