"""Find out which padding a published CCVPE file was trained with: its keys and shapes do not say."""

from __future__ import annotations

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray

from xview_loc.adaptation.labelling import ReadOptions, label_batch, prepare_model, tabulate
from xview_loc.adaptation.labels import PseudoLabels
from xview_loc.datasets.base import Batch, PairSource
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import Checkpoint
from xview_loc.statistics import MIN_MEASUREMENTS, SIGNIFICANT, certainty_of_decrease

# Models that differ in their padding alone.
_ALTERNATIVES = {"ccvpe-vigor": "ccvpe-vigor-reflect", "ccvpe-vigor-reflect": "ccvpe-vigor"}
# Pairs that both are compared on.
_PAIRS = 96


def padding_warning(
    fabric: Fabric, checkpoint: Checkpoint, source: PairSource, options: ReadOptions
) -> str | None:
    """Run a published CCVPE file with both paddings; return a line if the other one fits better.

    It does if, with 95 % certainty each, its heat maps are sharper and agree better with the coarse fixes.
    Returns None also for models without an alternative, for files that name their model, and for too few
    readable pairs.
    """
    name = checkpoint.model.spec.name
    published = "format" not in checkpoint.metadata
    if not published or name not in _ALTERNATIVES or len(source) < MIN_MEASUREMENTS:
        return None
    other = create_model(_ALTERNATIVES[name])
    other.load_state_dict(checkpoint.model.state_dict())
    own, others = (_labels(fabric, model, source, options) for model in (checkpoint.model, other))
    if own is None or others is None or len(own) < MIN_MEASUREMENTS:
        return None
    sharper = certainty_of_decrease((own.peak_mass - others.peak_mass).astype(np.float64))
    closer = certainty_of_decrease((others.stray_sigmas - own.stray_sigmas).astype(np.float64))
    if min(sharper, closer) < SIGNIFICANT:
        return None
    return (
        f"the weights seem to be those of {other.spec.name}, not {name}: on {len(own)} pairs its heat maps "
        f"hold {others.peak_mass.mean():.0%} of the probability near their maximum instead of "
        f"{own.peak_mass.mean():.0%}, and agree better with the coarse fixes; give --model {other.spec.name} "
        "unless you know their padding"
    )


def _labels(
    fabric: Fabric, model: CrossViewModel, source: PairSource, options: ReadOptions
) -> PseudoLabels | None:
    """Label pairs spread evenly over the source; None if none can be read."""
    model = prepare_model(fabric, model)
    index = np.linspace(0, len(source) - 1, min(_PAIRS, len(source))).round().astype(np.int64)

    def table_of(batch: Batch, turns: NDArray[np.int64] | None) -> PseudoLabels:
        return label_batch(model, batch, options.heading_prior_deg, turns=turns)[0]

    return tabulate(fabric, source, index, options, table_of)[0]
