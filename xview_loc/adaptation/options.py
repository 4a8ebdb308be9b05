"""Settings of an adaptation, with the paper's as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE
from xview_loc.training.trainer import TrainingOptions


class Recipe(NamedTuple):
    """How students are trained: K' supervised levels, and T, the share of labels kept (1: no filter)."""

    levels: int
    keep: float


@dataclass(frozen=True)
class AdaptationOptions:
    """Settings of an adaptation; use :meth:`published` for the paper's.

    ``training`` is for both students; its only heading prior applies to the teacher too. ``levels`` and
    ``keep`` are those of :class:`Recipe` (None: the default of :meth:`recipe`), ``sigma`` is the standard
    deviation of the label in pixels of the finest heat map. The share ``held_out`` of the pairs selects the
    epoch and decides the verdict. ``smooth`` corrects labels with whole drives. From the second of at most
    ``rounds`` rounds on, the previous round's student labels the pairs.
    """

    training: TrainingOptions
    levels: int | None = None
    keep: float | None = None
    sigma: float = 4.0
    held_out: float = 0.1
    smooth: bool = False
    rounds: int = 1

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
        levels, keep = (2, 0.8) if isinstance(model, CCVPE) else (3, 0.7)
        if smoothed:
            levels, keep = model.level_count, 1.0
        return Recipe(
            levels if self.levels is None else self.levels, keep if self.keep is None else self.keep
        )

    @property
    def heading_prior_deg(self) -> float | None:
        """Largest error of the heading, for teacher and students; None: the heading is unknown."""
        (prior,) = self.training.heading_priors_deg
        return prior
