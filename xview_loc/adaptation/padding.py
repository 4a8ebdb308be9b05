"""Find out which padding a published CCVPE file was trained with: its keys and shapes do not say."""

from __future__ import annotations

import numpy as np
from lightning_fabric import Fabric

from xview_loc.adaptation.indicators import Indicators, label_views
from xview_loc.adaptation.labelling import ReadOptions
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.datasets.base import PairSource
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import Checkpoint
from xview_loc.statistics import MIN_MEASUREMENTS

# Models that differ in their padding alone.
_ALTERNATIVES = {"ccvpe-vigor": "ccvpe-vigor-reflect", "ccvpe-vigor-reflect": "ccvpe-vigor"}
# Pairs that both are compared on: enough for a verdict, a fraction of an adaptation.
_PAIRS = 96


def padding_warning(
    fabric: Fabric, checkpoint: Checkpoint, source: PairSource, options: ReadOptions
) -> str | None:
    """Run a published CCVPE file with both paddings; return a line if the other one fits better.

    Returns None also for models without an alternative, for files that name their model, and for too few
    pairs. Raises AdaptationError if no pair can be used.
    """
    name = checkpoint.model.spec.name
    published = "format" not in checkpoint.metadata
    if not published or name not in _ALTERNATIVES or len(source) < MIN_MEASUREMENTS:
        return None
    other = create_model(_ALTERNATIVES[name])
    other.load_state_dict(checkpoint.model.state_dict())
    verdict = compare(fabric, checkpoint.model, other, source, options)
    if not verdict.deploy:
        return None
    change, low, high = verdict.score_change
    return (
        f"the weights fit {other.spec.name} better than {name}: on {min(_PAIRS, len(source))} pairs its "
        f"estimates are more consistent by {-change:.2f} m (95 % interval {-high:.2f} to {-low:.2f}); "
        f"if they were trained with the other padding, give --model {other.spec.name}"
    )


def compare(
    fabric: Fabric, model: CrossViewModel, other: CrossViewModel, source: PairSource, options: ReadOptions
) -> Verdict:
    """Judge without ground truth whether ``other`` is better than ``model``, on evenly spread pairs."""
    count = min(_PAIRS, len(source))
    index = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    views = (label_views(fabric, net, source, index, options) for net in (model, other))
    before, after = (Indicators.of(labels, None) for labels in views)
    return judge(before, after)
