"""Hints: what a small model's draft tells the large one (Data Shunt+, arXiv 2406.15471, "small to large").

A hint turns the request into the one that the large model gets. `Soft` and `Transfer` only add text; `Hard` only takes choices away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..data.conversation import IMAGE_MARK
from ..types import Answer, Model, Request
from .asking import ask
from .gates import Floats


class Hint(Protocol):
    """See the head of this file."""

    @property
    def name(self) -> str: ...

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[Request], list[Answer]]:
        """The requests that the large model gets, and, where a model was asked for them, its answers (else none), which are on the bill."""
        ...


@dataclass(frozen=True)
class Soft:
    """Prompt pruning, soft form: the small model's likeliest choices and their probabilities, as a line of text.

    The paper's form for CLIP is "a photo of a {label} with probability {p}", one prompt a class; here it is one line for all.
    """

    top: int = 3
    name: str = "soft"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[Request], list[Answer]]:
        return [self.apply(request, draft) for request, draft in zip(requests, drafts, strict=True)], []

    def apply(self, request: Request, draft: Answer) -> Request:
        """Raises nothing: a draft without scores is named with its text alone, a failed one not at all."""
        if draft.error is not None:
            return request
        if draft.scores is None:
            said = draft.text
        else:
            best = sorted(range(len(draft.scores)), key=lambda k: -draft.scores[k])[: self.top]  # pyright: ignore[reportOptionalSubscript]
            said = ", ".join(f"{request.choices[k]} ({draft.scores[k]:.2f})" for k in best)
        return request.asking(f"{request.text}\nA small model suggests: {said}.")


@dataclass(frozen=True)
class Hard:
    """Prompt pruning, hard form: the choices that the small model is good at are taken away, since it would have answered them itself.

    `strong` is found on validation data by `strong_choices`. The likeliest choice of a draft is never the reason to keep one of them; if
    nothing (or one choice) were left, all stay.
    """

    strong: frozenset[str]
    name: str = "hard"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[Request], list[Answer]]:
        return [self.apply(request) for request in requests], []

    def apply(self, request: Request) -> Request:
        left = tuple(choice for choice in request.choices if choice not in self.strong)
        return replace(request, choices=left) if len(left) > 1 else request


@dataclass(frozen=True)
class Transfer:
    """Prompt transferring: another small model does a sub-task, and its result is pasted into the large model's prompt.

    `question` is what the sub-task's model is asked of the same pictures ("" : the request as it is); `template` holds `{answer}`.
    """

    model: Model
    question: str = ""
    template: str = "Known from a small model: {answer}."
    least: float = 0.5
    """A result of a smaller likelihood, as a guess of OCR with rules has, is not told."""
    name: str = "transfer"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[Request], list[Answer]]:
        asked = requests
        if self.question:  # about the same pictures, so with their marks
            asked = [r.asking(f"{IMAGE_MARK}\n" * r.text.count(IMAGE_MARK) + self.question) for r in requests]
        results = ask(self.model, asked)
        told = []
        for request, result in zip(requests, results, strict=True):
            unsure = result.likelihood is not None and result.likelihood < self.least
            line = self.template.replace("{answer}", result.text)
            told.append(request if result.error is not None or unsure else request.asking(f"{request.text}\n{line}"))
        return told, results


def strong_choices(
    scores_MN: Floats, right_M: Sequence[int], choices: Sequence[str], threshold: float, share: float = 0.9
) -> frozenset[str]:
    """Choices that the small model would have answered itself, rightly: of the validation items of this choice, at least `share` were
    answered with a largest probability of `threshold` or more, and right. A choice without items is not among them."""
    at_M = np.asarray(right_M)
    own_M = (scores_MN.max(1) >= threshold) & (scores_MN.argmax(1) == at_M)
    return frozenset(choice for k, choice in enumerate(choices) if np.any(at_M == k) and own_M[at_M == k].mean() >= share)
