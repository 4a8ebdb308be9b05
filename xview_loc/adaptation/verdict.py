"""Decide whether to deploy a student, from paired evidence on held-out pairs without ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.indicators import Indicators
from xview_loc.estimation.localizer import SEARCH_SIGMAS
from xview_loc.statistics import MIN_MEASUREMENTS, SIGNIFICANT, bootstrap_means, certainty_of_decrease

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """Verdict on a student: True if it may replace its teacher, why, and what to do next.

    ``summary`` and ``advice`` are sentences, ``reasons`` the evidence, line by line. ``probability_better``:
    probability that the student's label-free score is better than its teacher's. ``score_change``: mean and
    95 % interval, m; negative is better.
    """

    deploy: bool
    summary: str
    advice: str
    reasons: list[str]
    probability_better: float
    score_change: tuple[float, float, float]


def refused(verdict: Verdict, faults: Sequence[str]) -> Verdict:
    """Return the verdict on a student of faulty pairs: not to deploy it, whatever the evidence."""
    return replace(
        verdict,
        deploy=False,
        summary=f"The pairs are faulty: {'; '.join(faults)}.",
        advice="Keep the teacher. Correct this or leave the faulty bags out, and adapt again.",
    )


def judge(before: Indicators, after: Indicators) -> Verdict:
    """Compare teacher and student on the same held-out pairs, in the order in which they were driven."""
    terms = before.score_terms(), after.score_terms()
    change = terms[1] - terms[0]
    means = bootstrap_means(change)
    low, high = (float(bound) for bound in np.quantile(means, [0.025, 0.975]))
    better, mean = float((means < 0).mean()), float(np.nanmean(change))
    enough, consistent = len(change) >= MIN_MEASUREMENTS, better >= SIGNIFICANT
    scores = [float(np.nanmean(values)) for values in terms]
    inconsistency = (
        f"the student's estimates are inconsistent by {scores[1]:.2f} m on average, the teacher's by "
        f"{scores[0]:.2f} m"
    )
    reasons = [inconsistency]
    if enough:
        # From too few pairs, the interval would mean nothing.
        reasons[0] += f" (difference {mean:+.2f} m, 95 % interval {low:+.2f} to {high:+.2f} m)"
    far = [
        np.where(np.isnan(i.stray_sigmas), math.nan, i.stray_sigmas > SEARCH_SIGMAS) for i in (before, after)
    ]
    close = True
    if np.isnan(far[1]).all():
        reasons.append("the fixes have no covariance: whether the estimates agree with them is not checked")
    else:
        close = certainty_of_decrease(far[0] - far[1]) < SIGNIFICANT
        reasons.append(
            f"of the maxima of whole heat maps, {np.nanmean(far[1]):.1%} of the student's and "
            f"{np.nanmean(far[0]):.1%} of the teacher's lie more than {SEARCH_SIGMAS:.0f} sigma from their "
            "coarse fix"
        )
    if not enough:
        summary = (
            f"{len(change)} held-out pairs are too few to tell whether the student is better: "
            f"{MIN_MEASUREMENTS} are needed."
        )
        times = math.ceil(MIN_MEASUREMENTS / max(1, len(change)))
        advice = f"Record {times} times as many pairs, or hold out a larger share of them (--held-out)."
    elif not consistent:
        found = "worse than" if low > 0.0 else "not clearly better than"
        summary = f"The student is {found} the teacher: {inconsistency}."
        advice = (
            "Keep the teacher. Record more streets, preferably in several drives with odometry, and check "
            "headings, stamps and map of the pairs."
        )
    elif not close:
        summary = "The student contradicts the coarse fixes more often than the teacher does."
        advice = "Keep the teacher. Check the map, the headings, and the covariance of the fixes."
    else:
        summary = f"The student is better than the teacher: {inconsistency}."
        advice = (
            "Activate it on the vehicle with xview-loc deploy, or let the node compare both first "
            "(shadow_checkpoint)."
        )
    deploy = consistent and close and enough
    return Verdict(deploy, summary, advice, reasons, better, (mean, low, high))
