"""Thresholds: chosen on validation data for a cost or a quality budget, stored with what they were chosen for, refused for anything else.

Shapes: M validation items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import read_json, write_json
from .gates import Floats

ALL_LARGE = 2.0
"""Above every confidence: the small model never answers."""


@dataclass(frozen=True)
class Threshold:
    """The small model answers where the gate's confidence reaches `value`. `rule` is how it was chosen; `of`: gate, models, hint."""

    value: float
    rule: str
    share_large: float
    """Share of the validation items that the large model answers at this threshold."""
    quality: float
    """Mean quality on the validation items, with `quality_large` of the large model alone beside it."""
    quality_large: float
    of: Mapping[str, str]

    @classmethod
    def at(cls, value: float, rule: str, confidence_M: Floats, small_M: Floats, large_M: Floats, of: Mapping[str, str]) -> Threshold:
        """A threshold of this value, with what it means on the validation items."""
        hard_M = confidence_M < value
        return cls(value, rule, float(hard_M.mean()), float(np.where(hard_M, large_M, small_M).mean()), float(large_M.mean()), dict(of))

    def save(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self) | {"of": dict(self.of)})


def load_threshold(path: Path, of: Mapping[str, str]) -> Threshold:
    """A stored threshold. Raises ValueError where the file is none, or was chosen for another gate, model or data than `of` says."""
    try:
        threshold = Threshold(**read_json(path))
        differ = sorted(key for key in of.keys() | threshold.of.keys() if of.get(key) != threshold.of.get(key))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a stored threshold ({type(error).__name__}: {error}); choose one on validation data") from error
    if differ:
        lines = "; ".join(f"{key}: {threshold.of.get(key)!r} there, {of.get(key)!r} here" for key in differ)
        raise ValueError(f"{path} was chosen for something else ({lines}); a threshold means nothing there: choose one on validation data")
    return threshold


def choose_threshold(
    confidence_M: Floats, small_M: Floats, large_M: Floats, *, drop: float | None = None, share: float | None = None, of: Mapping[str, str]
) -> Threshold:
    """The threshold for a budget, from the qualities of the small and the large model (with its hint, if any) on the same items.

    drop: the fewest large calls at which quality is at least (1 - drop) times the large model's (Hybrid LLM, section 4.5).
    share: the best quality with at most this share of large calls; of equals, the fewest calls.
    Raises ValueError unless exactly one of the two is given.
    """
    if (drop is None) == (share is None):
        raise ValueError("a threshold is chosen for a quality budget (`drop`) or for a cost budget (`share`): give one of the two")
    budget = 1.0 if share is None else share
    values, shares, qualities = sweep(confidence_M, small_M, large_M)
    large = float(large_M.mean())
    if drop is not None:
        fine = np.flatnonzero(qualities >= (1 - drop) * large - 1e-12)  # all-large is among them
        best = int(fine[np.argmin(shares[fine])])
    else:
        fine = np.flatnonzero(shares <= budget + 1e-12)  # all-small is among them
        best = int(fine[np.lexsort((shares[fine], -qualities[fine]))[0]])
    rule = f"fewest large calls at a drop of at most {drop:g}" if drop is not None else f"best quality at a share of at most {share:g}"
    return Threshold.at(float(values[best]), rule, confidence_M, small_M, large_M, of)


def threshold_for_traffic(confidence_M: Floats, share: float) -> float:
    """The threshold below which at most this share of the traffic lies. Needs no label and no answer of the large model, only the gate's
    confidences of requests as they come (RouteLLM calibrates so): the budget holds where the traffic is not like the validation data."""
    values, shares, _ = sweep(confidence_M, np.zeros_like(confidence_M), np.zeros_like(confidence_M))
    return float(values[np.flatnonzero(shares <= share + 1e-12)[-1]])


def sweep(confidence_M: Floats, small_M: Floats, large_M: Floats) -> tuple[Floats, Floats, Floats]:
    """Every threshold that makes a difference, from all-small to all-large: values, shares of large calls, mean qualities, each [K]."""
    order = np.argsort(confidence_M, kind="stable")
    sorted_M = confidence_M[order]
    gained = np.concatenate([[0.0], np.cumsum(large_M[order] - small_M[order])])
    cuts = np.flatnonzero(np.concatenate([[True], sorted_M[1:] > sorted_M[:-1], [True]]))  # how many items are below each threshold
    values = np.append(sorted_M, ALL_LARGE)[cuts]
    if np.isneginf(sorted_M[0]):  # of failed drafts: no threshold lets the small model answer them
        cuts, values = cuts[1:], values[1:]
    values[0] = values[0] if values[0] == ALL_LARGE else min(0.0, values[0])  # all-small, whatever comes
    return values, cuts / len(sorted_M), (small_M.sum() + gained[cuts]) / len(sorted_M)
