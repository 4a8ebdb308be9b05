"""GGCVT: parity with published and recorded outputs, and behaviour on the small model.

``python test/test_ggcvt.py`` records test/data/ggcvt_expected.npz again; do so only with a model that agrees
with the published outputs.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hashed_models import hashed_model, inputs
from published import REFERENCE, reference_inputs, reference_model

from xview_loc.models import create_model
from xview_loc.models.base import HeatMaps
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint
from xview_loc.models.ggcvt import CONFIGS, GGCVT, box_sum, correlate, ranking_loss
from xview_loc.models.projection import project_panorama
from xview_loc.models.vgg import unit

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "test" / "data" / "ggcvt_expected.npz"
KITTI_CAMERA = torch.tensor([[[583.0, 0.0, 496.2], [0.0, 482.7, 125.0], [0.0, 0.0, 1.0]]])


def extra(name: str, batch: int = 1) -> dict[str, torch.Tensor]:
    if name == "ggcvt-kitti":
        return {"intrinsics": KITTI_CAMERA.expand(batch, 3, 3)}
    return {"meters_per_pixel": torch.full((batch,), CONFIGS[name].spec.gsd)}


def run(name: str) -> HeatMaps:
    model = hashed_model(name)
    ground, aerial = inputs(model)
    with torch.inference_mode():
        return model.match(ground, model.encode_aerial(aerial), 0, **extra(name))


def sampled(maps: HeatMaps) -> list[np.ndarray]:
    return [level[0, 0, ::4, ::4].numpy() for level in maps.levels]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative error of the deviations from the mean."""
    ours, theirs = (x.astype(np.float64) - x.astype(np.float64).mean() for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def direct(features: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.conv2d(f[None], k[None])[0] for f, k in zip(features, kernel, strict=True)])


@pytest.mark.parametrize(
    "name", [pytest.param("ggcvt-vigor", marks=pytest.mark.slow), "ggcvt-kitti", "ggcvt-small"]
)
def test_recorded_outputs(name: str) -> None:
    recorded = np.load(RECORDED)
    for number, level in enumerate(sampled(run(name)), start=1):
        assert relative_error(level, recorded[f"{name}/{number}"]) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published outputs are not beside the repository")
@pytest.mark.parametrize("name", ["ggcvt-vigor", "ggcvt-kitti"])
@torch.inference_mode()
def test_published_outputs(name: str) -> None:
    expected = np.load(REFERENCE / f"expected_{name}.npz")
    model = reference_model(name, 11)
    assert isinstance(model, GGCVT)
    ground, aerial = reference_inputs(name, 11)
    if name == "ggcvt-vigor":
        keywords = {"meters_per_pixel": torch.tensor([float(expected["meter_per_pixel"])])}
    else:
        keywords = {"intrinsics": torch.from_numpy(expected["camera_k"])[None]}
    features = model.encode_aerial(aerial)
    maps = model.match(ground, features, 0, **keywords)

    overhead = model.encode_ground(ground, **keywords)
    for number, level in enumerate(maps.levels, start=1):
        ours, index = -level[0, 0].numpy(), expected[f"corr{number}_index"]
        theirs = expected[f"corr{number}"]
        assert [1, *ours.shape] == list(expected[f"corr{number}_shape"])
        assert ours.argmin() == expected[f"corr{number}_argmin"]
        # The published direct convolution adds up to 666 000 float32 products in sequence: its rounding
        # errors reach 7e-4 of these nearly flat maps. The Fourier transform stays within 1e-5 of exact ones.
        assert relative_error(ours.ravel()[index], theirs) < 1e-3
        if number < 3:  # the third takes seconds
            encoded, crop = features[number - 1], model.crop_sizes()[number - 1]
            view = overhead[number - 1]
            size = view.shape[-1]
            start = round((size - crop) / 2)
            kernel = unit(view[..., start : start + crop, start : start + crop])
            exact = correlate(encoded.spectrum.cdouble(), kernel.double(), size) / encoded.divisor
            assert relative_error(ours, 2 - 2 * exact[0].numpy()) < 2e-5

    row, col = divmod(int(maps.logits.argmax()), maps.logits.shape[2])
    centre = (model.spec.aerial_size - 1) / 2
    east = maps.grid.origin[1] + maps.grid.scale * col - centre
    south = maps.grid.origin[0] + maps.grid.scale * row - centre
    if name == "ggcvt-vigor":
        assert (east, south) == (expected["pred_u_px"], expected["pred_v_px"])
    else:
        gsd = model.spec.gsd
        assert (east * gsd, -south * gsd) == pytest.approx(
            (float(expected["pred_u_m"]), float(expected["pred_v_m"])), rel=1e-6
        )


def test_correlation_and_its_gradients_equal_the_direct_ones() -> None:
    torch.manual_seed(0)
    results = []
    features, kernel = torch.rand(2, 3, 16, 16).double(), torch.randn(2, 3, 6, 6).double()
    factor = torch.randn(2, 11, 11).double()
    for method in (direct, lambda f, k: correlate(torch.fft.rfft2(f), k, 16)):
        f, k = features.clone().requires_grad_(), kernel.clone().requires_grad_()
        out = method(f, k) / box_sum(f.square().sum(1), 6).sqrt()
        (out * factor).sum().backward()
        results.append((out, f.grad, k.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


def test_training_reaches_every_weight() -> None:
    torch.manual_seed(0)
    model = create_model("ggcvt-small").train()
    assert isinstance(model, GGCVT)
    ground, aerial = inputs(model)
    maps = model.match(ground, model.encode_aerial(aerial), 0, **extra("ggcvt-small"))
    loss = ranking_loss(maps, torch.tensor([[140.0, 120.0]]), model.spec.aerial_size)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_loss_of_equal_scores_and_of_a_clear_peak() -> None:
    model = hashed_model("ggcvt-small")
    sides = [model.spec.aerial_size // s - c + 1 for s, c in zip((8, 4, 2), model.crop_sizes(), strict=True)]
    levels = [torch.zeros(1, 1, side, side) for side in sides]
    centre = torch.full((1, 2), (model.spec.aerial_size - 1) / 2)
    maps = HeatMaps(levels, levels[-1][:, 0])
    expected = sum(math.log(2) * side**2 / (side**2 - 1) for side in sides)
    assert float(ranking_loss(maps, centre, model.spec.aerial_size)) == pytest.approx(expected, rel=1e-5)
    grid = model.grid
    row, col = 50, 20
    for level, stride in zip(levels, (8, 4, 2), strict=True):
        middle = level.shape[-1] / 2 - 0.5
        at = [round(middle + (grid.origin[0] + 2 * x - 95.5) / stride) for x in (row, col)]
        level[0, 0, at[0], at[1]] = 2.0
    true = torch.tensor([[grid.origin[0] + 2 * row, grid.origin[1] + 2 * col]])
    assert float(ranking_loss(maps, true, model.spec.aerial_size)) < 0.01
    reach = model.half_extent_m / model.spec.gsd
    ranking_loss(maps, centre + torch.tensor([[reach, -reach]]), model.spec.aerial_size)
    with pytest.raises(ValueError, match="search window"):
        ranking_loss(maps, centre + torch.tensor([[reach + 2, 0.0]]), model.spec.aerial_size)


def test_flat_ground_lies_where_a_panorama_shows_it() -> None:
    """The centre column faces north, columns run clockwise, rows from +30 to -60 degrees of elevation."""
    geometry, cell_m, size, rows, cols = CONFIGS["ggcvt-small"].geometry, 0.5, 40, 64, 256
    u, v = project_panorama(cell_m, geometry, (30.0, -60.0), size, rows, cols)
    for east, north in ((0.25, 6.25), (8.25, 0.25), (-3.25, 4.25), (2.25, -5.25)):
        row, col = size / 2 - 0.5 - north / cell_m, size / 2 - 0.5 + east / cell_m
        azimuth = math.degrees(math.atan2(east, north))
        elevation = -math.degrees(math.atan2(geometry.height, math.hypot(east, north)))
        # Column k spans the k-th share of the circle.
        assert float(u[int(row), int(col)]) == pytest.approx((azimuth + 180) / 360 * cols - 0.5, abs=1e-3)
        assert float(v[int(row), int(col)]) == pytest.approx((30 - elevation) / 90 * rows - 0.5, abs=1e-3)


@torch.no_grad()
def test_batches_equal_single_examples() -> None:
    model = hashed_model("ggcvt-small")
    ground, aerial = inputs(model)
    grounds = torch.cat([ground, ground.flip(3)])
    scales = torch.tensor([0.30, 0.27])
    features = model.encode_aerial(aerial)
    both = model.match(grounds, features, 0, meters_per_pixel=scales)
    for i in range(2):
        one = model.match(grounds[i : i + 1], features, 0, meters_per_pixel=scales[i : i + 1])
        for a, b in zip(both.levels, one.levels, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_unusable_inputs_are_named() -> None:
    model = hashed_model("ggcvt-small")
    ground, aerial = inputs(model)
    features = model.encode_aerial(aerial)
    for arguments, keywords, message in (
        ((), extra("ggcvt-small"), "known heading"),
        ((45.0,), extra("ggcvt-small"), "known heading"),
        ((0,), {}, "needs meters_per_pixel"),
        ((0,), {"meters_per_pixel": torch.tensor([-1.0])}, "positive"),
        ((0,), {"meters_per_pixel": torch.tensor([1.0, 1.0])}, "shape"),
        ((0,), {**extra("ggcvt-small"), "orientation": True}, "orientation"),
    ):
        with pytest.raises(ValueError, match=message):
            model.match(ground, features, *arguments, **keywords)
    with pytest.raises(ValueError, match="aerial images"):
        model.encode_aerial(aerial[..., :128])


def test_unused_branches_of_published_checkpoints_are_ignored(tmp_path: Path) -> None:
    state = create_model("ggcvt-small").state_dict()
    unused = ("SatFeatureNet.conv_dec3.1.weight", "SatFeatureNet.conf0.1.weight", "TransRefine.head.bias")
    path = tmp_path / "model.pt"
    torch.save({**state, **{key: torch.zeros(4) for key in unused}}, path)
    loaded = load_checkpoint(path, "ggcvt-small").model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    torch.save({**state, "SatFeatureNet.extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected weights \(first: SatFeatureNet.extra\)"):
        load_checkpoint(path, "ggcvt-small")


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        RECORDED,
        **{f"{name}/{i}": level for name in CONFIGS for i, level in enumerate(sampled(run(name)), start=1)},
    )
