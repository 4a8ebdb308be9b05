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
    "inconsistency_m": "model contradicts itself by, m",
    "drive_m": "model off whole drives by, m",
    "held_out_error_m": "model off by (mean), m",
    "held_out_median_m": "median, m",
}


def figures_of(done: Round, true_from_fix: NDArray[np.float64] | None) -> dict[str, Any]:
    """Summarise a round as JSON values; errors only where true positions are known."""
    figures: dict[str, Any] = {
        "pairs": len(done.labels),
        "label_std_m": float(done.smoothed.std_m.mean()),
        "inconsistency_m": float(done.indicators.self_terms().mean()),
        "drive_m": done.indicators.summary().get("drive"),
        "epochs": done.student.history,
        "verdict": None if done.verdict is None else asdict(done.verdict),
    }
    if true_from_fix is not None:
        for name, table in (("label", done.labels), ("held_out", done.held_out)):
            errors = table.errors_m(true_from_fix)
            if np.isfinite(errors).any():
                figures[f"{name}_error_m"] = float(np.nanmean(errors))
                figures[f"{name}_median_m"] = float(np.nanmedian(errors))
    return figures


def line_of(number: int, figures: Mapping[str, Any]) -> str:
    """Describe a round in one line."""
    text = f"round {number}: {figures['pairs']} labels uncertain by {figures['label_std_m']:.1f} m"
    if "label_error_m" in figures:
        text += f" (off by {figures['label_error_m']:.1f} m)"
    text += f"; the model contradicts itself by {figures['inconsistency_m']:.2f} m"
    if "held_out_error_m" in figures:
        text += f" (off by {figures['held_out_error_m']:.2f} m)"
    return text


def outcome(rounds: Sequence[Round]) -> str:
    """Say which round's model is kept, and why it went no further."""
    last = len(rounds)
    if rounds[-1].better:
        return f"The model is that of round {last}, the last one. Further rounds (--rounds) may improve it."
    return f"The model is that of round {last - 1}: that of round {last} is not clearly better."


def write_bootstrap(
    rounds: Sequence[Round], figures: Sequence[Mapping[str, Any]], folder: Path, facts: Mapping[str, Any]
) -> None:
    """Write the model of the last better round, ``metrics.json`` and the page.

    ``facts`` become metadata of the checkpoint, beside the figures.
    """
    best = max(number for number, done in enumerate(rounds, start=1) if done.better)
    model = rounds[best - 1].student.load().model
    content = finite({**facts, "round": best, "rounds": list(figures)})
    save_checkpoint(model, folder / MODEL_FILE, {"bootstrap": content})
    write_whole(folder / METRICS_FILE, json.dumps(content, indent=1).encode())
    page = Page(f"{model.spec.name}, trained without true positions")
    page.text(outcome(rounds))
    page.text(
        "In the first round, fixes and odometry place the pairs; in every further one the model's heat maps "
        "do so too. The model contradicts itself where its estimates of held-out pairs differ from those on "
        "shifted tiles and turned panoramas, and from odometry; it is off whole drives where they lie "
        "elsewhere than these place the pairs."
    )
    known = {name: text for name, text in _COLUMNS.items() if any(_has(one, name) for one in figures)}
    rows = [
        [str(number), *(f"{one[name]:.4g}" if _has(one, name) else "" for name in known)]
        for number, one in enumerate(figures, start=1)
    ]
    page.table(["round", *known.values()], rows)
    del known["pairs"]
    page.figure(_curve(figures, known), "The same, by round")
    page.heading("Settings")
    page.table(["setting", "value"], [[name, str(value)] for name, value in facts.items()])
    page.write(folder / REPORT_FILE)


def _has(figures: Mapping[str, Any], name: str) -> bool:
    return figures.get(name) is not None


def _curve(figures: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> Figure:
    drawn = Figure(figsize=(7, 3.2))
    axes = drawn.add_subplot()
    for name, text in known.items():
        numbers = [number for number, one in enumerate(figures, start=1) if _has(one, name)]
        axes.plot(numbers, [figures[number - 1][name] for number in numbers], "o-", label=text)
    axes.set(xlabel="round", ylabel="m", xticks=range(1, len(figures) + 1), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
