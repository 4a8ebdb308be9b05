"""Decide whether to deploy a student, from paired evidence on held-out pairs without ground truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.indicators import Indicators
from xview_loc.estimation.localizer import SEARCH_SIGMAS
from xview_loc.statistics import MIN_MEASUREMENTS, SIGNIFICANT, bootstrap_means, certainty_of_decrease

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """Verdict on a student: True if it may replace its teacher, and the evidence, line by line.

    ``probability_better``: probability that the student's label-free score is better than its teacher's.
    ``score_change``: mean and 95 % interval, m; negative is better.
    """

    deploy: bool
    reasons: list[str]
    probability_better: float
    score_change: tuple[float, float, float]


def judge(before: Indicators, after: Indicators) -> Verdict:
    """Compare teacher and student on the same held-out pairs, in the order in which they were driven."""
    change = after.score_terms() - before.score_terms()
    means = bootstrap_means(change)
    low, high = np.quantile(means, [0.025, 0.975])
    better = float((means < 0).mean())
    mean = float(np.nanmean(change))
    enough = len(change) >= MIN_MEASUREMENTS
    consistent = better >= SIGNIFICANT
    scores = (
        f"score (mean inconsistency of the estimates) {np.nanmean(after.score_terms()):.2f} m, previously "
        f"{np.nanmean(before.score_terms()):.2f} m"
    )
    change_text = f" ({mean:+.2f} m, 95 % interval {low:+.2f} to {high:+.2f}): "
    change_text += "better" if consistent else "not significantly better"
    # From too few pairs, the interval would mean nothing.
    reasons = [scores + change_text if enough else scores]
    if not enough:
        reasons.append(f"{len(change)} held-out pairs are too few to judge: {MIN_MEASUREMENTS} are needed")
    far_before, far_after = (
        np.where(np.isnan(i.stray_sigmas), math.nan, i.stray_sigmas > SEARCH_SIGMAS) for i in (before, after)
    )
    close = True
    if np.isnan(far_after).all():
        reasons.append("the fixes have no covariance: agreement of the estimates with them is not checked")
    else:
        close = certainty_of_decrease(far_before - far_after) < SIGNIFICANT
        reasons.append(
            f"{np.nanmean(far_after):.1%} of the maxima of whole heat maps lie more than {SEARCH_SIGMAS:.0f} "
            f"sigma from their coarse fix, previously {np.nanmean(far_before):.1%}: "
            + ("not significantly more" if close else "more than before")
        )
    return Verdict(consistent and close and enough, reasons, better, (mean, float(low), float(high)))
