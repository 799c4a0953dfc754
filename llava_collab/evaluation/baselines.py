"""Baselines without a network: what guessing from the training answers alone is worth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llava_collab.evaluation.metrics import references
from llava_collab.types import Answer, Request, Usage

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


class Majority:
    """A `Model` that gives the most frequent training answer of the question's family, or of its category where the family is new.

    A request carries no family, so the baseline is told which question is of which family; it never sees their answers.
    """

    def __init__(self, train: Iterable[Sample], asked: Iterable[Sample], name: str = "majority") -> None:
        """Fit on `train`; `asked` are the samples it will be asked. Raises ValueError without training samples."""
        self.name = name
        counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for sample in train:
            for answer in references(sample)[:1]:
                counts[sample.category, sample.family][answer] += 1
                counts[sample.category,][answer] += 1
        if not counts:
            raise ValueError("the majority baseline needs training samples; name a train file in the suite")
        # Ties go to the alphabetically first answer, so that the baseline is a constant of the data.
        self._answers = {key: min(counter, key=lambda answer: (-counter[answer], answer)) for key, counter in counts.items()}
        self._families = {sample.id: (sample.category, sample.family) for sample in asked}

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        if request.id not in self._families:
            return Answer("", model=self.name, error=f"majority: {request.id!r} is not among the questions it was told of")
        category, family = self._families[request.id]
        text = self._answers.get((category, family)) or self._answers.get((category,))
        if text is None:
            return Answer("", model=self.name, error=f"majority: no training answer of category {category!r}")
        return Answer(text, Usage(calls=1, images=len(request.images)), self.name)
