"""Means with bootstrap intervals: items are resampled within their category, so that the macro-average keeps its seven equal shares.

Where a model was trained with several seeds, seeds are resampled too, crossed with the items. So few draws make too small a variance: what
the S seeds deviate by is enlarged by sqrt(S / (S - 1)). Even so an interval over two or three seeds is rough.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MACRO = "Macro"
RESAMPLES = 2000
PERMUTATIONS = 10_000
_POWER = 1.96 + 0.84  # standard errors at which a two-sided test at 5 % finds a true difference four times in five
_CHUNK = 4_000_000  # indices drawn at once: bounds the memory, not the result


@dataclass(frozen=True)
class Interval:
    """A mean over `n` items and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    error: float
    """Standard error: the deviation of the bootstrap's means."""

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def detectable(self) -> float:
        """Of a difference: how large a true one had to be to be found with 80 % power at the 5 % level."""
        return _POWER * self.error


def bootstrap(
    groups: Mapping[str, NDArray[np.float64]], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> dict[str, Interval]:
    """Intervals of every group's mean, and of the macro-average (the mean of these means) under `MACRO`.

    `groups` maps a category to its item scores, [n] or [seeds, n]; empty ones are left out. A category's draws of items depend on the seed
    and its name only, not on the other categories; the draws of seeds are the same in all. Raises ValueError without any item.
    """
    full = {name: np.atleast_2d(np.asarray(values, dtype=np.float64)) for name, values in groups.items() if np.size(values)}
    if not full:
        raise ValueError("no scored item to average; look at the `error` fields of the record file")
    tails = [50 * (1 - level), 50 * (1 + level)]
    draws = {name: _resampled_means(values, name, seed, resamples) for name, values in full.items()}
    result = {name: _interval(float(values.mean()), draws[name], tails, values.shape[1]) for name, values in full.items()}
    macro = float(np.mean([values.mean() for values in full.values()]))
    result[MACRO] = _interval(macro, np.mean(list(draws.values()), axis=0), tails, sum(values.shape[1] for values in full.values()))
    return result


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64], *, seed: int = 0, level: float = 0.95) -> Interval:
    """Ratio of the means of two scores of the same items, both [n], with its paired bootstrap interval. Denominators are positive."""
    top, bottom = (_resampled_means(np.atleast_2d(values), "ratio", seed, RESAMPLES) for values in (numerator, denominator))
    return _interval(float(np.mean(numerator) / np.mean(denominator)), top / bottom, [50 * (1 - level), 50 * (1 + level)], len(numerator))


def draws(rows: Sequence[NDArray[np.float64]], *, seed: int = 0, name: str = "draws") -> list[NDArray[np.float64]]:
    """Bootstrap means [RESAMPLES] of several scores of the same items, [n] or [seeds, n] each, over the same draws of seeds and items."""
    full = np.broadcast_arrays(*(np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in rows))
    return [_resampled_means(values, name, seed, RESAMPLES) for values in full]


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of the exact McNemar test (1947, with the binomial in place of chi squared): were changes as likely either way?"""
    n, fewer = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def sign_flip(terms: NDArray[np.float64], *, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of the paired permutation test: how often is |sum of terms| as large when every term's sign is a coin toss?

    `terms` [n]: paired differences (times a weight each, where the statistic is a weighted mean). By Monte Carlo, the observed
    assignment counted, so p is at least 1 / (permutations + 1) and never too small on average (Phipson and Smyth 2010).
    """
    terms = terms[terms != 0]
    if not len(terms):
        return 1.0
    observed = abs(terms.sum()) - 1e-9 * np.abs(terms).sum()  # ties are ties, whatever the order of summation
    rng = np.random.default_rng([seed, len(terms)])
    step = max(1, _CHUNK // len(terms))
    extreme = 0
    for start in range(0, permutations, step):
        signs = rng.integers(0, 2, size=(min(step, permutations - start), len(terms)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ terms) >= observed).sum())
    return (1 + extreme) / (1 + permutations)


def _interval(mean: float, draws: NDArray[np.float64], tails: list[float], n: int) -> Interval:
    low, high = np.percentile(draws, tails)
    return Interval(mean, float(low), float(high), n, float(draws.std()))


def _resampled_means(values: NDArray[np.float64], name: str, seed: int, resamples: int) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement of n items, and of the seeds, from values [seeds, n]; [resamples]."""
    seeds, items = values.shape
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _CHUNK // items)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, items, size=(min(step, resamples - start), items))
        parts.append(np.stack([one[drawn].mean(axis=1) for one in values]))
    means = np.concatenate(parts, axis=1)  # [seeds, resamples]
    if seeds == 1:
        return means[0]
    centre = means.mean(axis=0)
    means = centre + (means - centre) * np.sqrt(seeds / (seeds - 1))
    chosen = np.random.default_rng([seed, seeds]).integers(0, seeds, size=(seeds, resamples))
    return np.take_along_axis(means, chosen, axis=0).mean(axis=0)
