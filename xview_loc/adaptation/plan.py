"""Estimate what an adaptation would do and how long it takes, without doing it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

from torch.utils.data import default_collate

from xview_loc.adaptation.distillation import Distillation
from xview_loc.adaptation.heat_map_store import stored_bytes
from xview_loc.adaptation.indicators import label_views
from xview_loc.adaptation.labelling import ReadOptions
from xview_loc.adaptation.labels import LabelledPairs

# Seconds per pair for both passes of smoothing, on one processor core.
_SMOOTHING_S = 0.005
# Stages that further rounds of other recipes do not have: their verdict is by the first round's.
_SMOOTHING = ("teacher heat maps", "smoothing")
# Bytes of labels per pair.
_LABEL_BYTES = 50


@dataclass(frozen=True)
class PlannedStage:
    """A stage: its name, number of pairs, and estimated duration."""

    name: str
    pairs: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and the disk space it needs."""

    stages: list[PlannedStage]
    megabytes: float


def plan_run(distillation: Distillation) -> Plan:
    """Plan :meth:`Distillation.run` from the start, timing one batch and one training step."""
    options, rounds = distillation.options, distillation.options.rounds or 1
    prior, epochs = options.heading_prior_deg, options.training.epochs
    recipe = distillation.recipe(distillation.smoothing)
    label_s, train_s = _seconds_per_pair(distillation, recipe.levels)
    count, trained = len(distillation.source), len(distillation.training_index)
    replayed = 0 if distillation.replay is None else len(distillation.replay)
    judge_s = 3 * len(distillation.held_out_index) * label_s
    kept = round(trained * recipe.keep)
    stages = [PlannedStage("teacher labels", count, count * label_s)]
    megabytes = 0.0
    if distillation.drives or distillation.smoothing:
        # Unknown headings are read again at the smoothed positions.
        smoothing_s = _SMOOTHING_S + (label_s if prior != 0 else 0.0)
        stages += [
            PlannedStage("teacher heat maps", count, count * label_s),
            PlannedStage("smoothing", count, count * smoothing_s),
        ]
        megabytes = count * stored_bytes(distillation.teacher.model) / 1e6
    if recipe.keep < 1:
        stages += [
            PlannedStage(
                "auxiliary student", trained + replayed, epochs * ((trained + replayed) * train_s + judge_s)
            ),
            PlannedStage("auxiliary labels", count, count * label_s),
        ]
    kept += replayed
    stages.append(PlannedStage("student", kept, epochs * (kept * train_s + judge_s)))
    again = [stage for stage in stages if distillation.smoothing or stage.name not in _SMOOTHING]
    for number in range(2, rounds + 1):
        stages += [replace(stage, name=f"{stage.name}, round {number}") for stage in again]
    stages.append(PlannedStage("indicators", len(distillation.held_out_index), (1 + rounds) * judge_s))
    # Each student keeps its best weights and its state: weights and Adam's two moments.
    weights = sum(value.nbytes for value in distillation.teacher.model.state_dict().values())
    students = 2 if recipe.keep < 1 else 1
    kept_bytes = rounds * (4 * students * weights + 2 * _LABEL_BYTES * count)
    return Plan(stages, megabytes + kept_bytes / 1e6)


def _seconds_per_pair(distillation: Distillation, levels: int) -> tuple[float, float]:
    fabric, model, source = distillation.fabric, distillation.teacher.model, distillation.source
    prior = distillation.options.heading_prior_deg
    index = distillation.training_index[: distillation.options.training.batch_size]
    start = time.perf_counter()
    views = label_views(fabric, model, source, index, ReadOptions(prior))
    view_count = 2 if views.turned is None else 3
    label_s = (time.perf_counter() - start) / len(index) / view_count
    data = LabelledPairs(source, views.plain, "")
    batch = fabric.to_device(default_collate([data[row] for row in range(len(data))]))
    student = fabric.to_device(copy.deepcopy(model).train())
    start = time.perf_counter()
    value = distillation.loss(levels)(student, batch, prior)  # type: ignore[arg-type]
    value.backward()
    return label_s, (time.perf_counter() - start) / len(data) + label_s
