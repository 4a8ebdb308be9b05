"""Train a model from drives alone, without any surveyed position: expectation-maximisation.

In the first round, fixes and odometry of whole drives place the pairs, to several metres. These errors do not
depend on what an image shows, so a model learns their mean, which is nearly the truth. In every further round
the model's heat maps, odometry and fixes place the pairs anew (the expectation), and it is trained further on
these places (the maximisation). Labels are as wide as they are uncertain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation, OnProgress, Student
from xview_loc.adaptation.indicators import Indicators, LabelsByView
from xview_loc.adaptation.labels import AdaptationError, PseudoLabels
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.datasets.base import PairSource
from xview_loc.models import create_model
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from xview_loc.training.losses import CCVPELoss
from xview_loc.training.trainer import TrainingOptions


@dataclass(frozen=True)
class BootstrapOptions:
    """Settings of at most ``rounds`` rounds of ``training`` each.

    The share ``held_out`` of the pairs judges the rounds; ``sigma`` is the least standard deviation of a
    label, tile pixels.
    """

    training: TrainingOptions
    rounds: int = 4
    held_out: float = 0.1
    sigma: float = 2.0


@dataclass(frozen=True, eq=False)
class Round:
    """A round: ``labels`` that trained ``student``, ``smoothed`` rows of them with their covariance.

    ``held_out`` are the student's labels of the held-out pairs, with their ``indicators``; ``verdict`` is
    that on the student against the previous round's, None in the first.
    """

    labels: PseudoLabels
    smoothed: Smoothed
    student: Student
    held_out: PseudoLabels
    indicators: Indicators
    verdict: Verdict | None

    @property
    def better(self) -> bool:
        """True unless the student is not clearly better than the previous round's."""
        return self.verdict is None or self.verdict.deploy


def bootstrap(
    fabric: Fabric,
    model_name: str,
    source: PairSource,
    folder: Path,
    options: BootstrapOptions,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Iterator[Round]:
    """Yield each round; the first that is not better than the one before is the last.

    ``folder`` keeps the stages, with which an interrupted run goes on. Raises AdaptationError if the pairs do
    not come from drives, are too few, or the model cannot learn from uncertain positions, and the errors of
    :func:`xview_loc.training.trainer.train`.
    """
    labeller = _blank(fabric, model_name, folder, options.training.seed)
    loss, training = CCVPELoss(options.sigma), options.training
    adaptation = AdaptationOptions(training, held_out=options.held_out, smooth=True, rounds=options.rounds)
    before: LabelsByView | None = None
    for number in range(1, options.rounds + 1):
        run = Distillation(fabric, labeller, source, folder, adaptation, on_progress=on_progress)
        if not run.drives:
            raise AdaptationError(f"{source.name} does not come from drives, which alone can place the pairs")
        name = f", round {number}"
        smoothed = run.smoothed(labeller, name) if number > 1 else None
        run.placed = smoothed
        if smoothed is None or not smoothed.mostly_usable:
            # The model sees too little to place the pairs. Fixes do, too coarsely to judge a model by.
            run.placed, smoothed = None, run.smoothed(labeller, name, by_fixes=True)
        smoothed = smoothed.of(run.training_index)
        labels = smoothed.labels(run.labels_of(labeller, f"teacher labels{name}").of(smoothed.index))
        smoothed = smoothed.rows(smoothed.usable)
        student = run.student(labels, loss, f"training{name}", training=training, std_m=smoothed.std_m)
        labeller = student.load()
        views = run.held_out_labels(labeller)
        after = run.indicators(views)
        verdict = None if before is None else judge(run.indicators(before), after)
        done = Round(labels, smoothed, student, views.plain, after, verdict)
        yield done
        if not done.better:
            return
        before = views


def _blank(fabric: Fabric, name: str, folder: Path, seed: int) -> Checkpoint:
    """Return a model with random weights, which the first process makes."""
    torch.manual_seed(seed)
    model = create_model(name)
    if not isinstance(model, CCVPE):
        raise AdaptationError(f"{name} cannot learn from uncertain positions: take a CCVPE model")
    path = folder / f"blank-{name}-{seed}.safetensors"
    if fabric.is_global_zero and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, path)
    fabric.barrier()
    return load_checkpoint(path, name)
