"""Knowledge self-distillation: a teacher's pseudo ground truth, filtered, makes a better student (ECCV 2024).

Every stage is a file or folder whose name carries a digest of what went into it. A stage that is there
already is not done again: a run that was cut off goes on, and ablations share what they have in common.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch.utils.data import default_collate

from xview_loc.adaptation.indicators import LabelFreeValidation, Views, look
from xview_loc.adaptation.pseudo_labels import (
    AdaptationError,
    LabelledPairs,
    PseudoLabels,
    label_pairs,
    reliable,
)
from xview_loc.datasets.base import PairSource
from xview_loc.losses import DistillationLoss
from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.checkpoint import Checkpoint, load_checkpoint
from xview_loc.training import BEST_FILE, Standing, TrainingOptions, train

Array = NDArray[np.float64]
# (stage, pairs or steps done, of how many)
OnProgress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class AdaptationOptions:
    """How to adapt; :meth:`published` has the paper's settings.

    levels: K', how many of the model's levels are supervised. keep: T, the share of labels that survive the
    outlier filter (1: no filter). sigma: of the pseudo ground truth's Gaussian, pixels of the finest map.
    mode_based: labels are Gaussians at the maxima, not the teacher's heat maps. held_out: share of the pairs
    that training does not see; they pick the epoch and the verdict. training: of both students; its heading
    priors hold for the teacher as well (one of them).
    """

    levels: int
    keep: float
    training: TrainingOptions
    sigma: float = 4.0
    mode_based: bool = True
    held_out: float = 0.1

    @classmethod
    def published(cls, model: CrossViewModel, **changes: Any) -> AdaptationOptions:
        """The paper's for CCVPE or GGCVT; ``changes`` replace fields of these or of the training options."""
        ccvpe = isinstance(model, CCVPE)
        training: dict[str, Any] = {"epochs": 3, "batch_size": 8 if ccvpe else 4}
        training |= {
            name: changes.pop(name) for name in list(changes) if name in TrainingOptions.__annotations__
        }
        settings = {"levels": 2 if ccvpe else 3, "keep": 0.8 if ccvpe else 0.7, **changes}
        return cls(training=TrainingOptions(**training), **settings)

    @property
    def heading_prior_deg(self) -> float | None:
        """How far the heading may be off, for teacher and students; None: it is unknown."""
        (prior,) = self.training.heading_priors_deg
        return prior


@dataclass(frozen=True)
class Student:
    """A trained student: its best checkpoint's file, and the figures after each epoch."""

    path: Path
    history: list[dict[str, float]] = field(hash=False)

    def load(self) -> Checkpoint:
        """The model of its best epoch."""
        return load_checkpoint(self.path)


@dataclass(frozen=True, eq=False)
class Adapted:
    """What a whole adaptation leaves behind.

    teacher, auxiliary: labels of the training pairs, row by row of the same pairs; kept: (N,), which of them
    the final student was trained on. before, after: teacher and student on the held-out pairs.
    """

    teacher: PseudoLabels
    auxiliary: PseudoLabels
    kept: NDArray[np.bool_]
    auxiliary_student: Student
    student: Student
    before: Views
    after: Views


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would do, on how many pairs, and about how long it takes."""

    name: str
    pairs: int
    seconds: float
    done: bool


@dataclass(frozen=True)
class Plan:
    """What a run would do, and what it leaves on the disk."""

    stages: list[PlannedStage]
    megabytes: float


class Distillation:
    """The stages of one adaptation of ``teacher`` to the pairs of ``source``, with results in ``folder``.

    ``true_from_fix`` (N, 2), metres east and north from each pair's coarse fix to its true place, is looked
    at after every epoch where it is given, and never decides anything.
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
        self._check_count()
        self.track = source.track()
        self.training_index, self.held_out_index = self._split()
        self._model = teacher.model.eval()

    def _check_count(self) -> None:
        count, batch = len(self.source), self.options.training.batch_size
        out = math.ceil(count * self.options.held_out)
        if count - out < batch * self._fabric.world_size or out < 2:
            raise AdaptationError(
                f"{count} pairs are too few: with {self.options.held_out:.0%} of them held out "
                f"they must fill a batch of {batch} in each process, and leave two"
            )

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs to train on and held-out ones: of drives the last stretch, else some at random."""
        count = len(self.source)
        if self.track is None:
            out = math.ceil(count * self.options.held_out)
            held = np.random.default_rng(self.options.training.seed).permutation(count)[:out]
        else:
            ends = [np.flatnonzero(self.track.drive == drive) for drive in np.unique(self.track.drive)]
            held = np.concatenate([e[len(e) - math.ceil(len(e) * self.options.held_out) :] for e in ends])
        held = np.sort(held).astype(np.int64)
        return np.setdiff1d(np.arange(count), held), held

    def run(self) -> Adapted:
        """Teacher, auxiliary student, outlier filter, final student (Sections 3.1 and 3.2)."""
        labels = self.teacher_labels()
        loss = self.loss(self.options.levels)
        auxiliary_student = self.student(labels, loss, "auxiliary student")
        auxiliary = self.labels_of(auxiliary_student, "auxiliary labels").of(labels.index)
        kept = reliable(labels, auxiliary, self.options.keep)
        student = auxiliary_student
        if not kept.all():
            student = self.student(labels.rows(kept), loss, "student")
        before, after = self.views(self.teacher.model, "teacher"), self.views(student.load().model, "student")
        return Adapted(labels, auxiliary, kept, auxiliary_student, student, before, after)

    def plan(self) -> Plan:
        """What :meth:`run` would do; seconds are measured on one batch of inference and one training step."""
        options = self.options.training
        index = self.training_index[: options.batch_size]
        start = time.perf_counter()
        rows = look(self._model, self.source, index, heading_prior_deg=self.options.heading_prior_deg).plain
        # Three views of each pair.
        label_s = (time.perf_counter() - start) / len(index) / 3
        start = time.perf_counter()
        student = copy.deepcopy(self._model).train()
        data = LabelledPairs(self.source, rows, "")
        batch = default_collate([data[row] for row in range(len(data))])
        self.loss(self.options.levels)(student, batch, self.options.heading_prior_deg).backward()
        train_s = (time.perf_counter() - start) / len(rows)
        count, trained = len(self.source), len(self.training_index)
        judge_s = len(self.held_out_index) * label_s * 3
        kept = round(trained * self.options.keep)
        stages = [
            PlannedStage(
                "teacher labels",
                count,
                count * label_s,
                self._labels_path(self.teacher.sha256, self.source).exists(),
            )
        ]
        for name, pairs in (("auxiliary student", trained), ("student", kept)):
            seconds = options.epochs * (pairs * train_s + judge_s)
            stages.append(PlannedStage(name, pairs, seconds, False))
        stages.insert(2, PlannedStage("auxiliary labels", count, count * label_s, False))
        stages.append(PlannedStage("indicators", len(self.held_out_index), 2 * judge_s, False))
        # Each student keeps its best weights, and its state (weights and Adam's two moments).
        weights = sum(value.nbytes for value in self._model.state_dict().values())
        return Plan(stages, (9 * weights + 2 * 50 * count) / 1e6)

    def loss(self, levels: int, mode_based: bool | None = None) -> DistillationLoss:
        """Coarse-only supervision of the first ``levels`` levels."""
        mode_based = self.options.mode_based if mode_based is None else mode_based
        return DistillationLoss(levels, self.options.sigma, None if mode_based else self._model)

    def teacher_labels(self) -> PseudoLabels:
        """The teacher's labels of the training pairs."""
        return self._labels(self._model, self.teacher.sha256, "teacher labels").of(self.training_index)

    def labels_of(self, student: Student, stage: str) -> PseudoLabels:
        """A student's labels of all pairs."""
        checkpoint = student.load()
        return self._labels(checkpoint.model, checkpoint.sha256, stage)

    def student(self, labels: PseudoLabels, loss: DistillationLoss, stage: str) -> Student:
        """A copy of the teacher, trained on labelled pairs; the label-free score picks its epoch."""
        name = (
            f"labels {_digest(labels.index.tobytes(), labels.position.tobytes(), labels.heading.tobytes())}"
        )
        data = LabelledPairs(self.source, labels, name)
        options = self.options.training
        inputs = [
            self.teacher.sha256,
            data.name,
            loss.to_json(),
            _numbers(options),
            self.held_out_index.tolist(),
        ]
        folder = self._path("student", inputs)
        validation = LabelFreeValidation(
            self.source,
            self.held_out_index,
            self.track,
            self.options.heading_prior_deg,
            options.batch_size,
            options.workers,
            self._true_figures,
        )

        def on_step(standing: Standing) -> None:
            done = standing.epoch * standing.steps_per_epoch + standing.step_in_epoch
            self._on_progress(stage, done, options.epochs * standing.steps_per_epoch)

        standing = train(
            self._fabric,
            copy.deepcopy(self._model),
            data,
            validation,
            folder,
            loss,
            options,
            metadata={"parent": self.teacher.sha256, "adaptation": _plain(self.options)},
            on_step=on_step,
        )
        on_step(standing)
        return Student(folder / BEST_FILE, standing.history)

    def views(self, model: CrossViewModel, stage: str) -> Views:
        """A model's labels of the held-out pairs in every view."""
        self._on_progress(f"indicators of the {stage}", 0, 1)
        model = self._fabric.to_device(model.eval())  # type: ignore[assignment]
        options = self.options.training
        views = look(
            model,
            self.source,
            self.held_out_index,
            heading_prior_deg=self.options.heading_prior_deg,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        self._on_progress(f"indicators of the {stage}", 1, 1)
        return views

    def true_errors_m(self, labels: PseudoLabels) -> Array:
        """Metres (N,) from the true places, not-a-number where these are not known."""
        if self.true_from_fix is None:
            return np.full(len(labels), math.nan)
        return np.asarray(
            np.linalg.norm(labels.from_fix - self.true_from_fix[labels.index], axis=1), np.float64
        )

    def errors_on(self, checkpoint: Checkpoint, measured: tuple[PairSource, Array] | None = None) -> Array:
        """Metres (N,) of a model's true errors on other pairs, given with the metres (N, 2) from their coarse
        fixes to their true places; by default on the held-out pairs."""
        if measured is None:
            labels = self._labels(checkpoint.model, checkpoint.sha256, "test").of(self.held_out_index)
            return self.true_errors_m(labels)
        source, true_from_fix = measured
        labels = self._labels(checkpoint.model, checkpoint.sha256, "test", source)
        return np.asarray(np.linalg.norm(labels.from_fix - true_from_fix[labels.index], axis=1), np.float64)

    @property
    def level_count(self) -> int:
        """How many levels the model has that can be supervised."""
        return self._model.level_count

    def _true_figures(self, views: Views) -> dict[str, float]:
        errors = self.true_errors_m(views.plain)
        errors = errors[np.isfinite(errors)]
        if not len(errors):
            return {}
        return {"true_mean_m": float(errors.mean()), "true_median_m": float(np.median(errors))}

    def _labels(
        self, model: CrossViewModel, sha256: str, stage: str, source: PairSource | None = None
    ) -> PseudoLabels:
        source = source or self.source
        options = self.options.training
        return label_pairs(
            self._fabric,
            model,
            source,
            self._labels_path(sha256, source),
            heading_prior_deg=self.options.heading_prior_deg,
            workers=options.workers,
            seed=options.seed,
            on_pairs=lambda done: self._on_progress(stage, done, len(source)),
        )

    def _labels_path(self, sha256: str, source: PairSource) -> Path:
        prior, seed = self.options.heading_prior_deg, self.options.training.seed
        # Without random turns the seed does not matter.
        inputs = [sha256, source.name, prior, 0 if prior == 0 else seed]
        inputs.append(self._fabric.strategy.precision.precision)
        return self._path("labels", inputs).with_suffix(".npz")

    def _path(self, kind: str, inputs: Any) -> Path:
        return self._folder / "stages" / f"{kind}-{_digest(json.dumps(inputs).encode())}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _numbers(options: TrainingOptions) -> dict[str, Any]:
    """What of the options decides the weights that come out."""
    return {name: value for name, value in asdict(options).items() if name not in ("workers", "save_every")}


def _plain(options: AdaptationOptions) -> dict[str, Any]:
    return {**asdict(options), "training": _numbers(options.training)}
