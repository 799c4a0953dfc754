"""Gates: who should answer? A gate says how sure it is that the small model's answer will do; above a threshold the small one answers.

Gates that read the small model's draft are for `Shunt` (Data Shunt, AAAI 2024, arXiv 2406.15471): its confidence. Those that read the
request alone are for `Route` too; `Random` and `Oracle` are the two baselines between which every gate has to lie, and
`collab.router` learns one. Shapes: M requests, N choices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..types import Answer, Request

Floats = NDArray[np.float64]


class Gate(Protocol):
    """See the head of this file. `reads` says what it needs."""

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> Literal["draft", "request"]: ...

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[float]:
        """[M] confidences that the small model's answer will do. `drafts` is empty for a gate that reads requests."""
        ...


@dataclass(frozen=True)
class Confidence:
    """How sure the small model is, by its own scores, in [0, 1]: the largest probability, its lead over the second, 1 - entropy / log N.

    `temperature` calibrates scores first (softmax(log p / T), see `fit_temperature`). Drafts of free text have no scores; their
    `likelihood` (geometric mean probability of their tokens) is the "max" of them, and they have no margin and no entropy.
    """

    kind: Literal["max", "margin", "entropy"] = "max"
    temperature: float = 1.0
    reads: Literal["draft"] = "draft"

    @property
    def name(self) -> str:
        return f"{self.kind} probability" if self.kind == "max" else self.kind

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[float]:
        """Raises ValueError for a draft without the probabilities that this gate reads."""
        return [self._of(draft) for draft in drafts]

    def _of(self, draft: Answer) -> float:
        if draft.scores is None and draft.likelihood is not None and self.kind == "max" and self.temperature == 1.0:
            return draft.likelihood
        if draft.scores is None:
            raise ValueError(
                f"the gate {self.name!r} reads probabilities, and {draft.model} gave none; give the requests choices and a model that "
                "scores them, or use a gate that reads the request"
            )
        p_N = temper(np.array([draft.scores]), self.temperature)[0]
        if self.kind == "entropy":
            entropy = -float(np.sum(p_N * np.log(np.clip(p_N, 1e-300, None))))
            return 1.0 - entropy / math.log(len(p_N)) if len(p_N) > 1 else 1.0
        largest = np.sort(p_N)[::-1]
        return float(largest[0] - (largest[1] if self.kind == "margin" and len(p_N) > 1 else 0.0))


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1) by the hash of seed and request: the baseline that spends the same share of large calls on nobody in particular."""

    seed: int = 0
    reads: Literal["request"] = "request"
    name: str = "random"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[float]:
        digests = (hashlib.sha256(f"{self.seed}/{request.id}".encode()).digest() for request in requests)
        return [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]


@dataclass(frozen=True)
class Oracle:
    """Knows how much better the small model's answer will be than the large one's: the bound of all gates. `gains` is by request id."""

    gains: Mapping[str, float]
    reads: Literal["request"] = "request"
    name: str = "oracle"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[float]:
        """Raises ValueError for a request that it was not told of."""
        if unknown := [request.id for request in requests if request.id not in self.gains]:
            raise ValueError(
                f"the oracle was not told of {unknown[0]!r}; it knows {len(self.gains)} requests whose answers were scored before"
            )
        return [self.gains[request.id] for request in requests]


def temper(scores_MN: Floats, temperature: float) -> Floats:
    """softmax(log p / T) of each row; exact zeros stay zero."""
    if temperature == 1.0:
        return scores_MN
    logits_MN = np.log(scores_MN, out=np.full_like(scores_MN, -np.inf), where=scores_MN > 0) / temperature
    exp_MN = np.exp(logits_MN - logits_MN.max(1, keepdims=True))
    return exp_MN / exp_MN.sum(1, keepdims=True)


def fit_temperature(scores_MN: Floats, right_M: NDArray[np.int64]) -> float:
    """The temperature at which the right choices are likeliest (Guo et al. 2017, arXiv 1706.04599), searched in [0.05, 20]."""

    def loss(log_t: float) -> float:
        tempered_MN = temper(scores_MN, math.exp(log_t))
        return -float(np.log(np.clip(tempered_MN[np.arange(len(right_M)), right_M], 1e-12, None)).mean())

    low, high, golden = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:  # the loss has one minimum in log T
        first, second = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    return math.exp((low + high) / 2)
