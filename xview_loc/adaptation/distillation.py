"""Knowledge self-distillation: a teacher's pseudo ground truth, filtered, makes a better student (ECCV 2024).

Every stage is a file or folder whose name carries a digest of what went into it. A stage that is there
already is not done again: a run that was cut off goes on, and ablations share what they have in common.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch.utils.data import default_collate

from xview_loc.adaptation.heat_map_store import store_heat_maps, stored_bytes
from xview_loc.adaptation.indicators import Indicators, LabelFreeValidation, Views, held_out_file, look
from xview_loc.adaptation.labels import (
    AdaptationError,
    LabelledPairs,
    PseudoLabels,
    label_pairs,
    reliable,
    with_headings_at,
)
from xview_loc.adaptation.options import AdaptationOptions, Recipe
from xview_loc.adaptation.smoothing import Smoothed, smooth
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.datasets.base import PairSource
from xview_loc.models.checkpoint import Checkpoint, load_checkpoint
from xview_loc.statistics import MIN_MEASUREMENTS
from xview_loc.training.losses import DistillationLoss
from xview_loc.training.trainer import BEST_FILE, TrainingProgress, check_heading, comparable, train

Array = NDArray[np.float64]
# Raise it when a stage's content changes its meaning.
_FORMAT = 1
# The same of smoothing: what smoothed labels are called depends on it, and no other stage.
_SMOOTHING_FORMAT = 2
# Both passes, a pair, on one processor core.
_SMOOTHING_S = 0.005
# (stage, pairs or steps done, of how many)
OnProgress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Student:
    """A trained student: its best checkpoint's file, and the figures after each epoch."""

    path: Path
    history: list[dict[str, float]] = field(hash=False)

    def load(self) -> Checkpoint:
        """The model of its best epoch."""
        return load_checkpoint(self.path)


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """The student that the outlier filter compares with, and its labels of the same pairs, row by row."""

    student: Student
    labels: PseudoLabels


@dataclass(frozen=True, eq=False)
class Adapted:
    """What a whole adaptation leaves behind.

    labeller: the teacher, or the student of the round before; maxima: what it makes of the training pairs.
    labels: the pseudo ground truth made of them; kept: (N,), which of it the student was trained on;
    auxiliary: None without an outlier filter. before, after: teacher and student on the held-out pairs.
    recipe: how the students were trained. smoothed: what the drives made of the maxima, where they were
    asked. rounds: verdicts on the student of each further round against the one before; all but the last are
    good.
    """

    labeller: Checkpoint
    maxima: PseudoLabels
    labels: PseudoLabels
    kept: NDArray[np.bool_]
    auxiliary: Auxiliary | None
    student: Student
    before: Views
    after: Views
    recipe: Recipe
    smoothed: Smoothed | None
    rounds: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would do, on how many pairs, and about how long it takes."""

    name: str
    pairs: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run would do, and what it leaves on the disk."""

    stages: list[PlannedStage]
    megabytes: float


class Distillation:
    """The stages of one adaptation of ``teacher`` to the pairs of ``source``, with results in ``folder``.

    ``true_from_fix`` (N, 2), metres east and north from each pair's coarse fix to its true place, is
    measured against where it is given, and never decides anything.
    Raises AdaptationError where the pairs are too few or none can be read; :func:`train`'s errors besides.
    """

    def __init__(
        self,
        fabric: Fabric,
        teacher: Checkpoint,
        source: PairSource,
        folder: Path,
        options: AdaptationOptions,
        *,
        true_from_fix: Array | None = None,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> None:
        self.options, self.source, self.teacher = options, source, teacher
        self.true_from_fix = true_from_fix
        self._fabric, self._folder = fabric, folder
        self._on_progress = on_progress
        self._model = teacher.model.eval()
        check_heading(teacher.model.spec, options.training)
        levels = self.recipe(options.smooth).levels
        if not 1 <= levels <= teacher.model.level_count:
            raise AdaptationError(
                f"{teacher.model.spec.name} has {teacher.model.level_count} levels to supervise, not {levels}"
            )
        self.track = source.track() if len(source) else None
        self.training_index, self.held_out_index = self._split()
        if options.smooth and self.track is None:
            raise AdaptationError(f"{source.name} is not of drives, which smoothing needs")

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs to train on and held-out ones: of drives the last stretch, else some at random."""
        count, share = len(self.source), self.options.held_out
        if self.track is None:
            order = np.random.default_rng(self.options.training.seed).permutation(count)
            held = order[: round(count * share)]
        else:
            drives = [np.flatnonzero(self.track.drive == drive) for drive in np.unique(self.track.drive)]
            held = np.concatenate([d[len(d) - round(len(d) * share) :] for d in drives])
        held = np.sort(held).astype(np.int64)
        # What is smoothed may fall back.
        keep = min(self.recipe(smoothed).keep for smoothed in {False, self.options.smooth})
        if len(held) < 2 or math.floor((count - len(held)) * keep) < self._batch:
            raise AdaptationError(
                f"{count} pairs are too few: {len(held)} of them are held out, which must leave two, and "
                f"{keep:.0%} of the others must fill a batch of {self._batch}"
            )
        if self.options.rounds > 1 and len(held) < MIN_MEASUREMENTS:
            raise AdaptationError(
                f"{len(held)} held-out pairs are too few to compare rounds on: {MIN_MEASUREMENTS} are needed"
            )
        return np.setdiff1d(np.arange(count), held), held

    def run(self) -> Adapted:
        """All rounds: in the first the teacher labels the pairs, in the others the student before.

        A round whose student is not surely better than the one before, as far as can be told without labels,
        is the last, and its student is not taken.
        """
        adapted = self._round(self.teacher, 1)
        verdicts: list[Verdict] = []
        for number in range(2, self.options.rounds + 1):
            again = self._round(adapted.student.load(), number, adapted.before)
            pair = (Indicators.of(views, self.track) for views in (adapted.after, again.after))
            verdicts.append(judge(*pair))
            if not verdicts[-1].deploy:
                break
            adapted = again
        return replace(adapted, rounds=tuple(verdicts))

    def _round(self, labeller: Checkpoint, number: int, before: Views | None = None) -> Adapted:
        """Labels, auxiliary student, outlier filter, student (Sections 3.1 and 3.2).

        ``before``: the teacher's views, where they are at hand.
        """
        name = "" if number == 1 else f", round {number}"
        maxima = self.labels_of(labeller, f"teacher labels{name}").of(self.training_index)
        labels, smoothed = maxima, None
        if self.options.smooth:
            smoothed = self.smoothed(maxima, labeller, name)
        corrected = smoothed is not None and smoothed.has_grounds
        if smoothed is not None and corrected:
            labels = smoothed.labels(maxima.of(smoothed.index))
        recipe = self.recipe(corrected)
        loss = self.loss(recipe.levels)
        auxiliary = None
        kept = np.ones(len(labels), bool)
        if recipe.keep < 1:
            auxiliary_student = self.student(labels, loss, f"auxiliary student{name}")
            others = self.labels_of(auxiliary_student.load(), f"auxiliary labels{name}").of(labels.index)
            labels = labels.of(others.index)  # should a pair have become unreadable since
            kept = reliable(labels, others, recipe.keep)
            auxiliary = Auxiliary(auxiliary_student, others)
        student = self.student(labels.rows(kept), loss, f"student{name}")
        before = self.views(self.teacher) if before is None else before
        after = self.views(student.load())
        return Adapted(labeller, maxima, labels, kept, auxiliary, student, before, after, recipe, smoothed)

    def recipe(self, smoothed: bool) -> Recipe:
        """See :meth:`AdaptationOptions.recipe`."""
        return self.options.recipe(self._model, smoothed)

    def plan(self) -> Plan:
        """What :meth:`run` does from the start; seconds are measured on one batch and one training step."""
        options, prior = self.options.training, self.options.heading_prior_deg
        recipe = self.recipe(self.options.smooth)
        index = self.training_index[: options.batch_size]
        start = time.perf_counter()
        views = look(self._fabric, self._model, self.source, index, heading_prior_deg=prior)
        # Three views of each pair.
        label_s = (time.perf_counter() - start) / len(index) / 3
        data = LabelledPairs(self.source, views.plain, "")
        batch = self._fabric.to_device(default_collate([data[row] for row in range(len(data))]))
        student = self._fabric.to_device(copy.deepcopy(self._model).train())
        start = time.perf_counter()
        value = self.loss(recipe.levels)(student, batch, prior)  # type: ignore[arg-type]
        value.backward()
        train_s = (time.perf_counter() - start) / len(data) + label_s
        count, trained = len(self.source), len(self.training_index)
        judge_s = 3 * len(self.held_out_index) * label_s
        kept = round(trained * recipe.keep)
        stages = [PlannedStage("teacher labels", count, count * label_s)]
        # Where headings are unknown, those at the smoothed places are asked for.
        smoothing_s = _SMOOTHING_S + (label_s if prior != 0 else 0.0)
        megabytes = 0.0
        if self.options.smooth:
            stages += [
                PlannedStage("teacher heat maps", trained, trained * label_s),
                PlannedStage("smoothing", trained, trained * smoothing_s),
            ]
            megabytes = trained * stored_bytes(self._model) / 1e6
        if recipe.keep < 1:
            stages += [
                PlannedStage("auxiliary student", trained, options.epochs * (trained * train_s + judge_s)),
                PlannedStage("auxiliary labels", count, count * label_s),
            ]
        stages.append(PlannedStage("student", kept, options.epochs * (kept * train_s + judge_s)))
        first = list(stages)
        for number in range(2, self.options.rounds + 1):
            stages += [replace(stage, name=f"{stage.name}, round {number}") for stage in first]
        stages.append(
            PlannedStage("indicators", len(self.held_out_index), (1 + self.options.rounds) * judge_s)
        )
        # Each student keeps its best weights, and its state (weights and Adam's two moments).
        weights = sum(value.nbytes for value in self._model.state_dict().values())
        students = 2 if recipe.keep < 1 else 1
        kept_bytes = self.options.rounds * (4 * students * weights + 2 * 50 * count)
        return Plan(stages, megabytes + kept_bytes / 1e6)

    def loss(self, levels: int, mode_based: bool = True) -> DistillationLoss:
        """Coarse-only supervision of the first ``levels`` levels, by maxima or by the teacher's heat maps."""
        return DistillationLoss(levels, self.options.sigma, None if mode_based else self._model)

    def teacher_labels(self) -> PseudoLabels:
        """The teacher's labels of the training pairs."""
        return self.labels_of(self.teacher, "teacher labels").of(self.training_index)

    def smoothed(self, labels: PseudoLabels, labeller: Checkpoint, name: str = "") -> Smoothed:
        """What whole drives make of a model's labels; ``name`` is added to the stages'."""
        assert self.track is not None
        prior, seed = self.options.heading_prior_deg, self.options.training.seed
        content = _digest(labels.index.tobytes(), labels.position.tobytes())
        inputs = [self.source.name, content, prior, seed if prior != 0 else 0, _SMOOTHING_FORMAT]
        path = self._path("smoothed", labeller.sha256, inputs).with_suffix(".npz")
        folder = path.with_suffix(".maps")
        found: Smoothed | None = self._fabric.broadcast(Smoothed.load(path))
        if found is not None:
            if self._fabric.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # cut off before that was done
            return found
        workers = self.options.training.workers
        store = store_heat_maps(
            self._fabric,
            labeller.model,
            self.source,
            labels.index,
            folder,
            heading_prior_deg=prior,
            workers=workers,
            seed=seed,
            on_pairs=lambda done: self._on_progress(f"teacher heat maps{name}", done, len(labels)),
        )
        if self._fabric.is_global_zero:
            found = smooth(
                self.track, labels, store, lambda done, of: self._on_progress(f"smoothing{name}", done, of)
            )
        found = self._fabric.broadcast(found)
        assert found is not None
        if prior != 0:
            moved = replace(labels, position=found.position)
            turned = with_headings_at(
                self._fabric,
                labeller.model,
                self.source,
                moved,
                heading_prior_deg=prior,
                workers=workers,
                seed=seed,
            )
            found = replace(found.of(turned.index), heading=turned.heading)
        if self._fabric.is_global_zero:
            found.save(path)
            shutil.rmtree(folder)
        return found

    def student(self, labels: PseudoLabels, loss: DistillationLoss, stage: str) -> Student:
        """A copy of the teacher, trained on labelled pairs; the label-free score picks its epoch."""
        content = _digest(labels.index.tobytes(), labels.position.tobytes(), labels.heading.tobytes())
        data = LabelledPairs(self.source, labels, f"labels {content}")
        options = self.options.training
        inputs = [data.name, loss.to_json(), comparable(options), self.held_out_index.tolist()]
        folder = self._path("student", self.teacher.sha256, inputs, self._fabric.world_size)
        validation = LabelFreeValidation(
            self._fabric,
            self.source,
            self.held_out_index,
            self.track,
            folder,
            self.options.heading_prior_deg,
            options.workers,
        )

        def on_step(progress: TrainingProgress) -> None:
            self._on_progress(stage, progress.steps, options.epochs * progress.steps_per_epoch)

        progress = train(
            self._fabric,
            copy.deepcopy(self._model),
            data,
            validation,
            folder,
            loss,
            options,
            metadata={"parent": self.teacher.sha256},
            on_step=on_step,
        )
        on_step(progress)
        return Student(folder / BEST_FILE, progress.history)

    def labels_of(self, checkpoint: Checkpoint, stage: str, source: PairSource | None = None) -> PseudoLabels:
        """A model's labels of all pairs, or of those of another source."""
        source = source or self.source
        prior, seed = self.options.heading_prior_deg, self.options.training.seed
        # Without random turns the seed does not matter.
        path = self._path("labels", checkpoint.sha256, [source.name, prior, seed if prior != 0 else 0])
        return label_pairs(
            self._fabric,
            checkpoint.model,
            source,
            path.with_suffix(".npz"),
            heading_prior_deg=prior,
            workers=self.options.training.workers,
            seed=seed,
            on_pairs=lambda done: self._on_progress(stage, done, len(source)),
        )

    def views(self, checkpoint: Checkpoint) -> Views:
        """A model's labels of the held-out pairs in every view."""
        return look(
            self._fabric,
            checkpoint.model,
            self.source,
            self.held_out_index,
            heading_prior_deg=self.options.heading_prior_deg,
            workers=self.options.training.workers,
        )

    def true_errors_m(self, labels: PseudoLabels) -> Array:
        """Metres (N,) from the true places, not-a-number where these are not known."""
        if self.true_from_fix is None:
            return np.full(len(labels), math.nan)
        return labels.errors_m(self.true_from_fix)

    def history(self, student: Student) -> list[dict[str, float]]:
        """A student's figures after each epoch, with its true errors on the held-out pairs where known."""
        entries = []
        for entry in student.history:
            labels = PseudoLabels.load(held_out_file(student.path.parent, int(entry["epoch"])))
            errors = self.true_errors_m(labels) if labels else np.zeros(0)
            errors = errors[np.isfinite(errors)]
            true = {}
            if len(errors):
                true = {"true_mean_m": float(errors.mean()), "true_median_m": float(np.median(errors))}
            entries.append({**entry, **true})
        return entries

    @property
    def _batch(self) -> int:
        """Pairs per step of all processes."""
        return self.options.training.batch_size * self._fabric.world_size

    def _path(self, kind: str, sha256: str, *inputs: Any) -> Path:
        """Of a stage that starts from these weights."""
        model, precision = self.teacher.model.spec.name, self._fabric.strategy.precision.precision
        content = json.dumps([_FORMAT, model, precision, sha256, *inputs])
        return self._folder / "stages" / f"{kind}-{_digest(content.encode())}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
