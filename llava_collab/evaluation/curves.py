"""What a system of models is judged by: quality against cost over all thresholds, and how much of the gap between two models it closes.

Shapes: M items, K operating points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_collab.collab.thresholds import sweep
from llava_collab.evaluation.statistics import Interval, draws

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Quality over the share of large calls, from all-small to all-large, [K] each; thresholds are those of the gate."""

    thresholds: Floats
    shares: Floats
    qualities: Floats

    @property
    def small(self) -> float:
        return float(self.qualities[0])

    @property
    def large(self) -> float:
        return float(self.qualities[-1])

    def apgr(self, small: float | None = None, large: float | None = None) -> float | None:
        """Area between the curve and the small model's line over the area between the two models (RouteLLM), by trapezoids.

        `small`, `large`: qualities that every system of a table is measured against (default: the curve's own ends). None without a gap.
        """
        small, gap = self._gap(small, large)
        return float(np.trapezoid(self.qualities - small, self.shares) / gap) if gap > 0 else None

    def cpt(self, part: float, small: float | None = None, large: float | None = None) -> float | None:
        """Call-performance threshold (RouteLLM): the least share of large calls that closes `part` of the gap; None without a gap, or where
        it is never closed so far."""
        small, gap = self._gap(small, large)
        reached = np.flatnonzero(self.qualities >= small + part * gap - 1e-12)
        return float(self.shares[reached].min()) if gap > 0 and len(reached) else None

    def _gap(self, small: float | None, large: float | None) -> tuple[float, float]:
        small = self.small if small is None else small
        return small, (self.large if large is None else large) - small

    def at_share(self, share: float) -> float:
        """Quality at a share of large calls, between two operating points by the mixture of both."""
        return float(np.interp(share, self.shares, self.qualities))


def curve(confidence_M: Floats, small_M: Floats, large_M: Floats) -> Curve:
    """The curve of a gate from its confidences and the qualities of both models (the large one with its hint) on the same items."""
    return Curve(*sweep(confidence_M, small_M, large_M))


def pgr(system_M: Floats, small_M: Floats, large_M: Floats, *, seed: int = 0, level: float = 0.95) -> Interval | None:
    """Performance gap recovered, (system - small) / (large - small), with its paired bootstrap interval.

    Several seeds: [seeds, M], resampled too. None, and nobody should print it, where the interval of the gap itself covers 0 (or the large
    model is the worse one): the ratio would be of noise.
    """
    rows = [np.atleast_2d(np.asarray(values, dtype=float)) for values in (system_M, small_M, large_M)]
    system, small, large = draws(rows, seed=seed)  # the same seeds and items for all three
    tails = [50 * (1 - level), 50 * (1 + level)]
    if np.percentile(large - small, tails[0]) <= 0:
        return None
    ratios = (system - small) / (large - small)
    means = [float(row.mean()) for row in rows]
    low, high = np.percentile(ratios, tails)
    return Interval((means[0] - means[1]) / (means[2] - means[1]), float(low), float(high), rows[0].shape[1], float(ratios.std()))


def calibration_error(confidence_M: Floats, right_M: Floats, bins: int = 10) -> float:
    """Expected calibration error: |mean confidence - share right| over equal-width bins of confidence, weighted by their items."""
    place_M = np.clip((confidence_M * bins).astype(int), 0, bins - 1)
    gaps = [
        (place_M == b).mean() * abs(confidence_M[place_M == b].mean() - right_M[place_M == b].mean())
        for b in range(bins)
        if (place_M == b).any()
    ]
    return float(sum(gaps))


def auroc(confidence_M: Floats, right_M: Floats) -> float | None:
    """Probability that an item the small model gets right has a higher confidence than one it gets wrong (ties count half); None if all or
    none are right."""
    wrong, right = np.sort(confidence_M[right_M < 0.5]), confidence_M[right_M >= 0.5]
    if not len(wrong) or not len(right):
        return None
    below, upto = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + upto).mean() / 2 / len(wrong))
