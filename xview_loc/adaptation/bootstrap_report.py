"""Write the outcome of a bootstrap: the model, figures of every round as JSON, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xview_loc.adaptation.bootstrap import Round
from xview_loc.files import write_whole
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.report import Page, finite

MODEL_FILE, REPORT_FILE, METRICS_FILE = "model.safetensors", "report.html", "metrics.json"
_COLUMNS = {
    "pairs": "pairs trained on",
    "label_std_m": "labels uncertain by, m",
    "label_error_m": "labels off by, m",
    "inconsistency_m": "model inconsistent by, m",
    "held_out_error_m": "model off by (mean), m",
    "held_out_median_m": "median, m",
}


def figures_of(done: Round, true_from_fix: NDArray[np.float64] | None) -> dict[str, Any]:
    """Summarise a round as JSON values; errors only where true positions are known."""
    figures: dict[str, Any] = {
        "pairs": len(done.labels),
        "label_std_m": float(done.smoothed.std_m.mean()),
        "inconsistency_m": done.indicators.summary()["score"],
        "epochs": done.student.history,
        "verdict": None if done.verdict is None else asdict(done.verdict),
    }
    if true_from_fix is not None:
        labels, held_out = (_known(table.errors_m(true_from_fix)) for table in (done.labels, done.held_out))
        figures |= {
            "label_error_m": float(labels.mean()),
            "held_out_error_m": float(held_out.mean()),
            "held_out_median_m": float(np.median(held_out)),
        }
    return figures


def _known(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    return errors[np.isfinite(errors)]


def line_of(number: int, figures: Mapping[str, Any]) -> str:
    """Describe a round in one line."""
    text = f"round {number}: {figures['pairs']} labels uncertain by {figures['label_std_m']:.1f} m"
    if "label_error_m" in figures:
        text += f" (off by {figures['label_error_m']:.1f} m)"
    text += f"; the model is inconsistent by {figures['inconsistency_m']:.2f} m"
    if "held_out_error_m" in figures:
        text += f" (off by {figures['held_out_error_m']:.2f} m)"
    return text


def write_bootstrap(
    rounds: Sequence[Round], figures: Sequence[Mapping[str, Any]], folder: Path, facts: Mapping[str, Any]
) -> int:
    """Write the model of the last better round, ``metrics.json`` and the page; return that round's number.

    ``facts`` become metadata of the checkpoint, beside the figures.
    """
    best = max(number for number, done in enumerate(rounds, start=1) if done.better)
    model = rounds[best - 1].student.load().model
    content = finite({**facts, "round": best, "rounds": list(figures)})
    save_checkpoint(model, folder / MODEL_FILE, {**content, "bootstrap": content})
    write_whole(folder / METRICS_FILE, json.dumps(content, indent=1).encode())
    page = Page(f"{model.spec.name}, trained without true positions")
    page.text(f"The model is that of round {best} of {len(rounds)}.")
    verdict = rounds[-1].verdict
    if verdict is not None:
        page.text(f"Last round: {verdict.summary}")
    page.text(
        "In the first round, fixes and odometry place the pairs; in every further one the model's heat maps "
        "do so too. The inconsistency is by how much estimates of held-out pairs contradict odometry, and "
        "those on shifted tiles and turned panoramas."
    )
    known = {name: text for name, text in _COLUMNS.items() if name in figures[0]}
    rows = [
        [str(number), *(f"{one[name]:.4g}" for name in known)] for number, one in enumerate(figures, start=1)
    ]
    page.table(["round", *known.values()], rows)
    page.figure(_curve(figures), "Uncertainty of labels and inconsistency of the model, by round")
    page.heading("Settings")
    page.table(["setting", "value"], [[name, str(value)] for name, value in facts.items()])
    page.write(folder / REPORT_FILE)
    return best


def _curve(figures: Sequence[Mapping[str, Any]]) -> Figure:
    drawn = Figure(figsize=(7, 3.2))
    axes = drawn.add_subplot()
    numbers = range(1, len(figures) + 1)
    for name, text in _COLUMNS.items():
        if name in figures[0] and name != "pairs":
            axes.plot(numbers, [one[name] for one in figures], "o-", label=text)
    axes.set(xlabel="round", ylabel="m", xticks=list(numbers), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
