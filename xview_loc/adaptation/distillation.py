"""Knowledge self-distillation: train a student on a teacher's filtered pseudo ground truth (ECCV 2024).

Every stage is a file or folder named by a digest of its inputs, and is not repeated if it exists. So an
interrupted run resumes, and ablations share stages.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray

from xview_loc.adaptation.heat_map_store import store_heat_maps
from xview_loc.adaptation.held_out import held_out_edges
from xview_loc.adaptation.indicators import (
    Indicators,
    LabelFreeValidation,
    LabelsByView,
    held_out_file,
    label_views,
)
from xview_loc.adaptation.labelling import ReadOptions, label_pairs, with_model_headings
from xview_loc.adaptation.labels import AdaptationError, LabelledPairs, PseudoLabels, reliable
from xview_loc.adaptation.motion import from_drives
from xview_loc.adaptation.parallel_smoothing import smooth_drives
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.datasets.base import JoinedPairs, JoinedPoses, PairSource, PoseDataset
from xview_loc.evaluation.errors import Errors
from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from xview_loc.statistics import MIN_MEASUREMENTS
from xview_loc.training.losses import DistillationLoss, GeoDistillLoss, HeatMapLoss
from xview_loc.training.trainer import (
    BEST_FILE,
    PoseValidation,
    TrainingOptions,
    TrainingProgress,
    Validation,
    check_heading,
    comparable,
    train,
)

Array = NDArray[np.float64]
# Part of every stage's digest: raise it when the content of stages changes.
_FORMAT = 3
# The same, for smoothed labels only.
_SMOOTHING_FORMAT = 3
# Rounds start by themselves up to this number, while the labels' mean standard deviation exceeds this.
_MAX_ROUNDS, UNCERTAIN_M = 3, 1.0
# Sector that GeoDistill's students see, as published: least and most, degrees.
_GEODISTILL_SEEN_DEG = (180.0, 240.0)
# (stage, pairs or steps done, total)
OnProgress = Callable[[str, int, int], object]


class Recipe(NamedTuple):
    """How students are trained.

    K' supervised ``levels``; T, the share of labels to ``keep`` (1: no filter); on panoramas ``turned`` at
    random by any angle, whatever is known of their headings, so that one student serves with and without a
    heading.
    """

    levels: int
    keep: float
    turned: bool


@dataclass(frozen=True)
class AdaptationOptions:
    """Settings of an adaptation; use :meth:`published` for the paper's.

    ``training`` is for both students, except its heading priors (:meth:`student_training`).
    ``heading_prior_deg`` is the largest error of the pairs' headings, for all labels (None: headings are
    unknown). ``levels``, ``keep`` and ``turned`` are those of :class:`Recipe` (None: the default of
    :meth:`recipe`), ``sigma`` is the standard deviation of the label in tile pixels. The share ``held_out``
    of the pairs selects the epoch and decides the verdict. ``smooth`` corrects labels with whole drives
    (None: if the pairs come from drives). ``geodistill`` trains by GeoDistill's loss instead of labels. From
    the second of at most ``rounds`` rounds on, the previous round's student labels the pairs (None: at most
    three, the next one only while labels are uncertain).
    """

    training: TrainingOptions
    heading_prior_deg: float | None = 0.0
    levels: int | None = None
    keep: float | None = None
    turned: bool | None = None
    sigma: float = 4.0
    held_out: float = 0.1
    smooth: bool | None = False
    geodistill: bool = False
    rounds: int | None = 1

    @classmethod
    def published(cls, model: CrossViewModel, **changes: Any) -> AdaptationOptions:
        """Return the paper's options for a model; ``changes`` are fields of these or the training options."""
        training = {name: changes.pop(name) for name in TrainingOptions.__annotations__ if name in changes}
        defaults = {"epochs": 3, "batch_size": 8 if isinstance(model, CCVPE) else 4}
        return cls(TrainingOptions(**{**defaults, **training}), **changes)

    def recipe(self, model: CrossViewModel, smoothed: bool) -> Recipe:
        """Fill in defaults: the paper's for a model's own maxima.

        ``smoothed`` labels are nearly as good as true ones: all levels, and no filter.
        """
        if smoothed or self.geodistill:
            default = Recipe(model.level_count, 1.0, False)
        elif isinstance(model, CCVPE):
            default = Recipe(2, 0.8, model.spec.camera == "panorama")
        else:
            default = Recipe(3, 0.7, False)
        given = {name: getattr(self, name) for name in Recipe._fields}
        return default._replace(**{name: value for name, value in given.items() if value is not None})

    def student_training(self, recipe: Recipe) -> TrainingOptions:
        """Return the training options of a recipe's students."""
        prior = None if recipe.turned else self.heading_prior_deg
        seen = self.training.field_of_view_deg or (_GEODISTILL_SEEN_DEG if self.geodistill else None)
        return replace(self.training, heading_priors_deg=(prior,), field_of_view_deg=seen)


@dataclass(frozen=True)
class Student:
    """A trained student: the file of its best checkpoint, and the figures of each epoch."""

    path: Path
    history: list[dict[str, float]] = field(hash=False)

    def load(self) -> Checkpoint:
        """Load the model of the best epoch. Raises AdaptationError if the file is damaged."""
        try:
            return load_checkpoint(self.path)
        except CheckpointError as error:
            raise AdaptationError(f"{error}; delete {self.path.parent} to train this student again") from None


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """The student that the outlier filter compares with, and its labels of the same pairs, row by row."""

    student: Student
    labels: PseudoLabels


@dataclass(frozen=True, eq=False)
class Adapted:
    """The outcome of an adaptation; all but ``before`` is of the round whose student is kept.

    ``labeller`` is the teacher, or the student of the previous round, ``maxima`` its labels of the training
    pairs, ``smoothed`` these corrected by whole drives, if requested, ``labels`` the pseudo ground truth
    derived from them, and ``kept`` (N,) selects the labels that trained the student. ``auxiliary`` is None
    without outlier filter. ``before`` and ``after`` are labels of the held-out pairs, by teacher and student.
    ``rounds`` has a verdict per further round, on its student against the previous; only the last may be bad.
    """

    labeller: Checkpoint
    maxima: PseudoLabels
    labels: PseudoLabels
    kept: NDArray[np.bool_]
    auxiliary: Auxiliary | None
    student: Student
    before: LabelsByView
    after: LabelsByView
    recipe: Recipe
    smoothed: Smoothed | None
    rounds: tuple[Verdict, ...] = ()


class Distillation:
    """Adapt ``teacher`` to the pairs of ``source``; ``folder`` keeps the stages.

    ``true_from_fix`` (N, 2), metres east and north from each pair's coarse fix to its true position, is only
    for reported errors and never decides anything. With ``validation``, all pairs of ``source`` are for
    training: the epoch is selected by the true errors on this dataset, as in the paper, and its pairs are the
    held-out ones. Students are also trained on all pairs of ``replay``, with their true poses. Raises
    AdaptationError if there are too few pairs or none can be read, and the errors of :func:`train`.
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
        validation: PoseDataset | None = None,
        replay: PoseDataset | None = None,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> None:
        self._validation, self._training_pairs, self.replay = validation, len(source), replay
        if validation is not None:
            known = np.full((len(source), 2), math.nan) if true_from_fix is None else true_from_fix
            true_from_fix = np.concatenate([known, validation.true_from_fix()])
            source = JoinedPairs(source, validation)
        self.options, self.source, self.teacher, self.fabric = options, source, teacher, fabric
        self.true_from_fix, self._folder, self.on_progress = true_from_fix, folder, on_progress
        training, prior = options.training, options.heading_prior_deg
        self.reading = ReadOptions(prior, training.seed, training.workers)
        # What labels depend on: the seed only matters for random turns.
        self._turns = [prior, training.seed if prior != 0 else 0]
        self._model = teacher.model.eval()
        self.track = source.track() if len(source) else None
        if options.smooth and self.track is None:
            why = "with a validation dataset, drives cannot be used" if validation else "use the recipe paper"
            raise AdaptationError(f"{source.name} has no drives to correct the labels: {why}")
        self.drives = self.track is not None and from_drives(self.track)
        self.smoothing = self.drives if options.smooth is None else options.smooth
        if options.geodistill and ((options.rounds or 1) > 1 or (options.keep or 1.0) < 1.0):
            raise AdaptationError("GeoDistill has no labels to filter or to make again: no keep, one round")
        for smoothed in {False, self.smoothing}:
            check_heading(teacher.model.spec, options.student_training(self.recipe(smoothed)))
        levels = self.recipe(self.smoothing).levels
        if not 1 <= levels <= teacher.model.level_count:
            raise AdaptationError(
                f"{teacher.model.spec.name} has {teacher.model.level_count} levels to supervise, not {levels}"
            )
        self.training_index, self.held_out_index = self._split()

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return training and held-out pairs.

        Held out is the validation dataset, or the edge of each area that drives cover, or random pairs.
        """
        count, share = len(self.source), self.options.held_out
        if self._validation is not None:
            held = np.arange(self._training_pairs, count)
        elif self.track is None:
            order = np.random.default_rng(self.options.training.seed).permutation(count)
            held = order[: round(count * share)]
        else:
            held = held_out_edges(self.track, share)
        held = np.sort(held).astype(np.int64)
        batch = self.options.training.batch_size * self.fabric.world_size
        # Smoothing may fall back to the paper's recipe.
        keep = min(self.recipe(smoothed).keep for smoothed in {False, self.smoothing})
        if len(held) < 2 or math.floor((count - len(held)) * keep) < batch:
            raise AdaptationError(
                f"{count} pairs are too few: at least two must be held out (now {len(held)}), and {keep:.0%} "
                f"of the others must fill a batch of {batch}"
            )
        if (self.options.rounds or 1) > 1 and len(held) < MIN_MEASUREMENTS:
            raise AdaptationError(
                f"{len(held)} held-out pairs are too few to compare rounds on: {MIN_MEASUREMENTS} are needed"
            )
        return np.setdiff1d(np.arange(count), held), held

    def run(self) -> Adapted:
        """Run all rounds: the teacher labels the pairs in the first, the previous student in the others.

        The first round whose student is not significantly better than the previous one, judged without ground
        truth, is the last, and its student is discarded.
        """
        adapted = self._round(self.teacher, 1)
        verdicts: list[Verdict] = []
        for number in range(2, (self.options.rounds or _MAX_ROUNDS) + 1):
            if self.options.rounds is None and not self._gains_from_another(adapted):
                break
            again = self._round(adapted.student.load(), number, adapted.before)
            verdicts.append(judge(self.indicators(adapted.after), self.indicators(again.after)))
            if not verdicts[-1].deploy:
                break
            adapted = again
        return replace(adapted, rounds=tuple(verdicts))

    def _gains_from_another(self, adapted: Adapted) -> bool:
        """Return True if the labels leave room for another round, which the held-out pairs can judge."""
        if adapted.smoothed is None or not adapted.smoothed.mostly_usable:
            return False
        enough = len(self.held_out_index) >= MIN_MEASUREMENTS
        return enough and adapted.smoothed.uncertainty_m > UNCERTAIN_M

    def _round(self, labeller: Checkpoint, number: int, before: LabelsByView | None = None) -> Adapted:
        """Run one round: labels, auxiliary student, outlier filter, student (Sections 3.1 and 3.2).

        ``before``: the teacher's labels of the held-out pairs, if known.
        """
        name = "" if number == 1 else f", round {number}"
        maxima = labels = self.labels_of(labeller, f"teacher labels{name}").of(self.training_index)
        smoothed = self.smoothed(labeller, name).of(self.training_index) if self.smoothing else None
        corrected = smoothed is not None and smoothed.mostly_usable
        if smoothed is not None and corrected:
            labels = smoothed.labels(maxima.of(smoothed.index))
        recipe = self.recipe(corrected)
        loss: HeatMapLoss = self.loss(recipe.levels)
        if self.options.geodistill:
            # A copy, which moves with the student.
            loss = GeoDistillLoss(recipe.levels, copy.deepcopy(self._model))
        auxiliary = None
        kept = np.ones(len(labels), bool)
        if recipe.keep < 1:
            auxiliary_student = self.student(labels, loss, f"auxiliary student{name}", recipe)
            others = self.labels_of(auxiliary_student.load(), f"auxiliary labels{name}").of(labels.index)
            labels = labels.of(others.index)  # a pair may have become unreadable
            kept = reliable(labels, others, recipe.keep)
            auxiliary = Auxiliary(auxiliary_student, others)
        student = self.student(labels.rows(kept), loss, f"student{name}", recipe)
        before = self.held_out_labels(self.teacher) if before is None else before
        after = self.held_out_labels(student.load())
        return Adapted(labeller, maxima, labels, kept, auxiliary, student, before, after, recipe, smoothed)

    @cached_property
    def placed(self) -> Smoothed | None:
        """Pairs that the teacher's heat maps along whole drives place, to judge models by; None without."""
        found = self.smoothed(self.teacher) if self.drives else None
        return found if found is not None and found.mostly_usable else None

    def recipe(self, smoothed: bool) -> Recipe:
        """Return the recipe for the teacher's class of model."""
        return self.options.recipe(self._model, smoothed)

    def loss(self, levels: int, mode_based: bool = True) -> DistillationLoss:
        """Supervise the first ``levels`` levels, by labels or by the teacher's heat maps."""
        teacher = None if mode_based else self._model
        return DistillationLoss(levels, self.options.sigma, teacher, self.options.heading_prior_deg)

    def teacher_labels(self) -> PseudoLabels:
        """Return the teacher's labels of the training pairs."""
        return self.labels_of(self.teacher, "teacher labels").of(self.training_index)

    def smoothed(self, labeller: Checkpoint, name: str = "", *, by_fixes: bool = False) -> Smoothed:
        """Correct a model's labels of all pairs, held-out ones too, with whole drives.

        ``name`` is appended to the names of the stages. ``by_fixes``: from fixes and odometry, without the
        model's heat maps.
        """
        assert self.track is not None
        labels = self.labels_of(labeller, f"teacher labels{name}")
        content = _digest(labels.index.tobytes(), labels.position.tobytes())
        inputs = [self.source.name, content, *self._turns, _SMOOTHING_FORMAT, *["fixes"] * by_fixes]
        path = self._path("smoothed", labeller.sha256, inputs).with_suffix(".npz")
        folder = path.with_suffix(".maps")
        found: Smoothed | None = self.fabric.broadcast(Smoothed.load(path))
        if found is not None:
            if self.fabric.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            return found

        def on_pairs(done: int) -> None:
            self.on_progress(f"teacher heat maps{name}", done, len(labels))

        model, index = labeller.model, labels.index
        if by_fixes:
            index = index[:0]
        store = store_heat_maps(self.fabric, model, self.source, index, folder, self.reading, on_pairs)
        progress, workers = partial(self.on_progress, f"smoothing{name}"), self.reading.workers
        found = smooth_drives(self.fabric, self.track, labels, store, workers, progress, by_fixes=by_fixes)
        if self.reading.heading_prior_deg != 0:
            moved = replace(labels, position=found.position)
            turned = with_model_headings(self.fabric, labeller.model, self.source, moved, self.reading)
            found = replace(found.of(turned.index), heading=turned.heading)
        if self.fabric.is_global_zero:
            found.save(path)
            shutil.rmtree(folder)
        return found

    def student(
        self,
        labels: PseudoLabels,
        loss: HeatMapLoss,
        stage: str,
        recipe: Recipe | None = None,
        *,
        training: TrainingOptions | None = None,
        std_m: Array | None = None,
    ) -> Student:
        """Train a copy of the teacher on labelled pairs; the validation's score selects the epoch.

        ``recipe`` decides on turned panoramas; default: that of a model's own maxima. ``training`` replaces
        the training options. ``std_m`` (N,) are the labels' standard deviations along an axis, metres.
        """
        parts: list[NDArray[Any]] = [
            labels.index,
            labels.position,
            labels.heading,
            *([] if std_m is None else [std_m]),
        ]
        content = _digest(*(part.tobytes() for part in parts))
        data: PoseDataset = LabelledPairs(self.source, labels, f"labels {content}", std_m)
        if self.replay is not None:
            data = JoinedPoses(data, self.replay)
        options = training or self.options.student_training(recipe or self.recipe(smoothed=False))
        inputs = [data.name, loss.to_json(), comparable(options), self.held_out_index.tolist()]
        if self.placed is not None:
            inputs.append(_digest(self.placed.position.tobytes()))
        folder = self._path("student", self.teacher.sha256, inputs, self.fabric.world_size)
        validation: Validation
        if self._validation is None:
            validation = LabelFreeValidation(
                self.fabric,
                self.source,
                self.held_out_index,
                self.track,
                folder,
                self.reading,
                self.placed,
            )
        else:
            prior = self.reading.heading_prior_deg
            validation = PoseValidation(self._validation, (prior,), options.batch_size, options.workers)

        def on_step(progress: TrainingProgress) -> None:
            self.on_progress(stage, progress.steps, options.epochs * progress.steps_per_epoch)

        model, parent = copy.deepcopy(self._model), {"parent": self.teacher.sha256}
        progress = train(
            self.fabric, model, data, validation, folder, loss, options, metadata=parent, on_step=on_step
        )
        on_step(progress)
        return Student(folder / BEST_FILE, progress.history)

    def labels_of(self, checkpoint: Checkpoint, stage: str, source: PairSource | None = None) -> PseudoLabels:
        """Return a model's labels of all pairs of ``source`` (default: the one adapted to)."""
        source = source or self.source
        path = self._path("labels", checkpoint.sha256, [source.name, *self._turns]).with_suffix(".npz")

        def on_pairs(done: int) -> None:
            self.on_progress(stage, done, len(source))

        return label_pairs(self.fabric, checkpoint.model, source, path, self.reading, on_pairs)

    def held_out_labels(self, checkpoint: Checkpoint) -> LabelsByView:
        """Return a model's labels of the held-out pairs in every view."""
        return label_views(self.fabric, checkpoint.model, self.source, self.held_out_index, self.reading)

    def indicators(self, views: LabelsByView) -> Indicators:
        """Return the label-free evidence for the model that labelled the held-out pairs."""
        return Indicators.of(views, self.track, self.placed)

    def true_errors_m(self, labels: PseudoLabels) -> Array:
        """Return the distances (N,) from the true positions, metres; NaN where these are unknown."""
        if self.true_from_fix is None:
            return np.full(len(labels), math.nan)
        return labels.errors_m(self.true_from_fix)

    def true_errors(self, labels: PseudoLabels, true_from_fix: Array) -> Errors:
        """Summarise distances from true positions; also by direction if tiles are turned to the camera's."""
        parts = None
        if self.teacher.model.spec.aerial_up == "left":
            ahead, left = labels.errors_on_tile_m(true_from_fix).T
            parts = ahead, left
        return Errors.of(labels.errors_m(true_from_fix), parts)

    def history(self, student: Student) -> list[dict[str, float]]:
        """Return a student's figures of each epoch, with its true held-out errors where known."""
        entries = [dict(entry) for entry in student.history]
        for entry in entries:
            labels = PseudoLabels.load(held_out_file(student.path.parent, int(entry["epoch"])))
            errors = self.true_errors_m(labels) if labels else np.zeros(0)
            errors = errors[np.isfinite(errors)]
            if len(errors):
                entry.update(true_mean_m=float(errors.mean()), true_median_m=float(np.median(errors)))
        return entries

    def _path(self, kind: str, sha256: str, *inputs: Any) -> Path:
        """Return the path of a stage that starts from the weights with this digest."""
        spec, precision = self.teacher.model.spec, self.fabric.strategy.precision.precision
        content = json.dumps([_FORMAT, spec.name, spec.normalisation, precision, sha256, *inputs])
        return self._folder / "stages" / f"{kind}-{_digest(content.encode())}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
