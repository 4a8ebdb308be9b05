"""How to adapt: the paper's settings, and what labels of whole drives change about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE
from xview_loc.training.trainer import TrainingOptions


class Recipe(NamedTuple):
    """K', how many of the model's levels labels supervise, and T, the share of them that survives the outlier
    filter (1: there is none)."""

    levels: int
    keep: float


@dataclass(frozen=True)
class AdaptationOptions:
    """How to adapt; :meth:`published` has the paper's settings.

    levels, keep: see :meth:`recipe`. sigma: of the pseudo ground truth's Gaussian, pixels of the finest map.
    smooth: whether whole drives correct the labels (:mod:`xview_loc.adaptation.sequence`). rounds: at most so
    many times students are trained, each time on what the last ones make of the pairs.
    held_out: share of the pairs that training does not see; they pick the epoch and the verdict. training: of
    both students; its one heading prior holds for the teacher as well.
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
        """The paper's for CCVPE or GGCVT; ``changes`` replace fields of these or of the training options."""
        training: dict[str, Any] = {"epochs": 3, "batch_size": 8 if isinstance(model, CCVPE) else 4}
        training |= {
            name: changes.pop(name) for name in list(changes) if name in TrainingOptions.__annotations__
        }
        return cls(training=TrainingOptions(**training), **changes)

    def recipe(self, model: CrossViewModel, smoothed: bool) -> Recipe:
        """As chosen; otherwise the paper's for a teacher's maxima, and for ``smoothed`` labels, which are
        nearly as good as true ones, all levels and no filter."""
        if smoothed:
            usual = Recipe(model.level_count, 1.0)
        else:
            usual = Recipe(2, 0.8) if isinstance(model, CCVPE) else Recipe(3, 0.7)
        return Recipe(
            usual.levels if self.levels is None else self.levels,
            usual.keep if self.keep is None else self.keep,
        )

    @property
    def heading_prior_deg(self) -> float | None:
        """How far the heading may be off, for teacher and students; None: it is unknown."""
        (prior,) = self.training.heading_priors_deg
        return prior
