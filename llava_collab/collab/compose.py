"""Composites: several models as one `Model`, with one bill.

    Shunt(small, large, gate, threshold, hint)   the small model answers, and the large one where the small is unsure   Data Shunt, DS+
    Route(small, large, gate, threshold)         one of the two answers; the gate reads the request alone               Hybrid LLM
    Ensemble(models)                             all answer; their probabilities are averaged                           the baseline

They nest: a cascade is a shunt whose large model is a shunt. Nobody keeps counters: an answer carries the parts that it was made of, and
its usage is exactly their sum, gates included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from ..types import Answer, Model, Request, Usage
from .asking import Verb, ask
from .gates import Gate
from .hints import Hint
from .single import chosen


@runtime_checkable
class BilledGate(Protocol):
    """A gate that asks a model itself, as a router that reads a model's state does: its cost goes on the bill."""

    def billed(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[float], list[Usage]]:
        """Confidences and costs, of each request."""
        ...


@dataclass(frozen=True)
class _Pair:
    small: Model
    large: Model
    gate: Gate
    threshold: float
    """The small model answers where the gate's confidence reaches it: at 0 always, above 1 never."""
    name: str = ""
    degrade: bool = False
    """Where the large model fails, give the small one's answer (and say so in `note`) instead of an error."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.Model`."""
        return self._run(requests, "generate")

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.ScoringModel`. Choices that a hint took away have a probability of exactly 0."""
        return self._run(requests, "score")

    def _run(self, requests: Sequence[Request], verb: Verb) -> list[Answer]:
        raise NotImplementedError

    def gated(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[float], list[Answer]]:
        """Confidences, and the gate's cost as a part of each answer. A failed draft has a confidence of -inf: the large model is asked."""
        start = time.perf_counter()
        fine = [k for k in range(len(requests)) if not drafts or drafts[k].error is None]
        asked = [requests[k] for k in fine]
        own = [drafts[k] for k in fine] if drafts else []
        if not fine:
            found, bills = [], []
        elif isinstance(self.gate, BilledGate):
            found, bills = self.gate.billed(asked, own)
        else:
            found, bills = self.gate(asked, own), [Usage()] * len(fine)
        confidences, costs = dict(zip(fine, found, strict=True)), dict(zip(fine, bills, strict=True))
        if bad := [requests[k].id for k in fine if not confidences[k] == confidences[k]]:
            raise ValueError(f"{self.name}: the gate {self.gate.name!r} gave no number for {bad[0]!r}")
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        every = range(len(requests))
        parts = [Answer("", replace(costs.get(k, Usage()), seconds=seconds), self.gate.name) for k in every]
        return [confidences.get(k, float("-inf")) for k in every], parts


@dataclass(frozen=True)
class Shunt(_Pair):
    """The small model answers first; where it is unsure (confidence < threshold) the large one does, told by a hint what the small one
    found (Data Shunt, AAAI 2024; DS+, arXiv 2406.15471). A request costs small, or small + large."""

    hint: Hint | None = None
    prior: float = 0.0
    """Soft pruning for a large model that scores choices and reads no hints: p(choice) ~ large(choice) x small(choice)^prior. 0: off."""

    def _run(self, requests: Sequence[Request], verb: Verb) -> list[Answer]:
        drafts = ask(self.small, requests, verb)
        confidences, gates = self.gated(requests, drafts)
        parts = [[draft, gate] for draft, gate in zip(drafts, gates, strict=True)]
        hard = [k for k in range(len(requests)) if confidences[k] < self.threshold]
        asked = [requests[k] for k in hard]
        if self.hint is not None and asked:
            asked, helpers = self.hint(asked, [drafts[k] for k in hard])
            for k, helper in zip(hard, helpers, strict=False):
                parts[k].append(helper)
        answers = {k: _aligned(requests[k], to, answer) for k, to, answer in zip(hard, asked, ask(self.large, asked, verb), strict=True)}
        for k, answer in answers.items():
            parts[k].append(answer)
        if self.prior:
            answers = {k: _with_prior(requests[k], answer, drafts[k], self.prior) for k, answer in answers.items()}
        return [
            _made(answers.get(k, drafts[k]), parts[k], confidences[k], drafts[k] if self.degrade else None) for k in range(len(requests))
        ]


@dataclass(frozen=True)
class Route(_Pair):
    """Each request goes to one of the two models, by a gate that has not seen an answer (Hybrid LLM, ICLR 2024, arXiv 2404.14618)."""

    def __post_init__(self) -> None:
        if self.gate.reads != "request":
            raise ValueError(
                f"{self.name or 'route'}: the gate {self.gate.name!r} reads a draft, and a route has none; use a shunt, or a gate that "
                "reads the request (random, oracle, a learned router)"
            )

    def _run(self, requests: Sequence[Request], verb: Verb) -> list[Answer]:
        confidences, gates = self.gated(requests, [])
        easy = [k for k in range(len(requests)) if confidences[k] >= self.threshold]
        hard = [k for k in range(len(requests)) if confidences[k] < self.threshold]
        answers = dict(zip(easy, ask(self.small, [requests[k] for k in easy], verb), strict=True))
        answers |= dict(zip(hard, ask(self.large, [requests[k] for k in hard], verb), strict=True))
        parts = {k: [gates[k], answers[k]] for k in range(len(requests))}
        failed = [k for k in hard if self.degrade and answers[k].error is not None]
        spare = dict(zip(failed, ask(self.small, [requests[k] for k in failed], verb), strict=True))
        for k, answer in spare.items():
            parts[k].insert(1, answer)
        return [_made(answers[k], parts[k], confidences[k], spare.get(k)) for k in range(len(requests))]


@dataclass(frozen=True)
class Ensemble:
    """All models answer. `score`: the mean of their distributions, if all give one. Else, and in `generate`: the text that most of them
    give; of several, the one whose first giver comes first. A model that fails is left out, as long as one answers."""

    models: tuple[Model, ...]
    name: str = "ensemble"

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.Model`."""
        return self._run(requests, "generate", lambda request, fine: _voted(fine))

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.ScoringModel`."""
        return self._run(requests, "score", _averaged)

    def _run(self, requests: Sequence[Request], verb: Verb, join: Callable[[Request, list[Answer]], Answer]) -> list[Answer]:
        answers = [ask(model, requests, verb) for model in self.models]
        joined = []
        for request, *given in zip(requests, *answers, strict=True):
            fine = [answer for answer in given if answer.error is None]
            made = join(request, fine) if fine else given[0]
            joined.append(_made(made, given, None, None))
        return joined


def _voted(answers: Sequence[Answer]) -> Answer:
    texts = [answer.text for answer in answers]
    return answers[texts.index(max(texts, key=texts.count))]


def _averaged(request: Request, answers: Sequence[Answer]) -> Answer:
    rows = [answer.scores for answer in answers if answer.scores is not None]
    if len(rows) < len(answers):  # one of them can only name a choice
        return _voted(answers)
    scores = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    best = max(range(len(scores)), key=lambda k: scores[k])
    return Answer(request.choices[best], model=" + ".join(answer.model for answer in answers), scores=scores)


def _aligned(request: Request, asked: Request, answer: Answer) -> Answer:
    """Scores over the choices that were asked, as scores over the request's own: what a hint took away has 0."""
    if answer.scores is None or asked.choices == request.choices:
        return answer
    given = dict(zip(asked.choices, answer.scores, strict=True))
    return replace(answer, scores=tuple(given.get(choice, 0.0) for choice in request.choices))


def _with_prior(request: Request, answer: Answer, draft: Answer, weight: float) -> Answer:
    if answer.scores is None or draft.scores is None:
        return answer
    products = [large * small**weight for large, small in zip(answer.scores, draft.scores, strict=True)]
    total = sum(products)
    return chosen(request, [p / total for p in products], answer.usage, answer.model) if total > 0 else answer


def _made(answer: Answer, parts: Sequence[Answer], confidence: float | None, spare: Answer | None) -> Answer:
    """`answer` as the composite's, with everything that it took; `spare` takes its place if it failed and the spare did not."""
    note = answer.note
    if answer.error is not None and spare is not None and spare.error is None:
        answer, note = spare, f"{answer.model} failed ({answer.error}); {spare.model} answered"
    return replace(answer, usage=sum((part.usage for part in parts), Usage()), confidence=confidence, parts=tuple(parts), note=note)
