"""Means with bootstrap intervals: items are resampled within their category, so that the macro-average keeps its seven equal shares."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MACRO = "Macro"
RESAMPLES = 2000
_CHUNK = 4_000_000  # indices drawn at once: bounds the memory, not the result


@dataclass(frozen=True)
class Interval:
    """A mean over `n` items and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def bootstrap(
    groups: Mapping[str, NDArray[np.float64]], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> dict[str, Interval]:
    """Intervals of every group's mean, and of the macro-average (the mean of these means) under `MACRO`.

    `groups` maps a category to its item scores [n]; empty ones are left out. A category's draws depend on the seed and its name only,
    not on the other categories. Raises ValueError without any item.
    """
    full = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items() if len(values)}
    if not full:
        raise ValueError("no scored item to average; look at the `error` fields of the record file")
    tails = [50 * (1 - level), 50 * (1 + level)]
    draws = {name: _resampled_means(values, name, seed, resamples) for name, values in full.items()}
    result = {name: _interval(float(values.mean()), draws[name], tails, len(values)) for name, values in full.items()}
    macro = float(np.mean([values.mean() for values in full.values()]))
    result[MACRO] = _interval(macro, np.mean(list(draws.values()), axis=0), tails, sum(map(len, full.values())))
    return result


def _interval(mean: float, draws: NDArray[np.float64], tails: list[float], n: int) -> Interval:
    low, high = np.percentile(draws, tails)
    return Interval(mean, float(low), float(high), n)


def _resampled_means(values: NDArray[np.float64], name: str, seed: int, resamples: int) -> NDArray[np.float64]:
    """Means of `resamples` draws of n items with replacement, [resamples]."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _CHUNK // len(values))
    parts = [
        values[rng.integers(0, len(values), size=(min(step, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)
