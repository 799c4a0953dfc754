"""What every floor speaks: a `Request` goes in, an `Answer` with its bill (`Usage`) comes out, and whatever does that is a `Model`.

This is the ground floor: it imports nothing of the package. One network is a `Model` (`collab.single`), and so is any composite of
models (`collab.compose`), so composites nest and one evaluator measures them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; in user turns every `<image>` mark stands for one image, in order."""

    role: Role
    text: str


@dataclass(frozen=True)
class Request:
    """A question: turns that end with the user's, and the images that their `<image>` marks stand for (0, 1 or many).

    Images are paths (opened when needed) or PIL images. `choices` are the answers that a classification allows; empty: any text.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | Any, ...] = ()
    max_new_tokens: int = 64
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last turn's words: the question."""
        return self.turns[-1].text if self.turns else ""

    def asking(self, text: str) -> Request:
        """The same request with other words in its last turn."""
        return replace(self, turns=(*self.turns[:-1], Turn("user", text)))


@dataclass(frozen=True)
class Usage:
    """What an answer cost. Adds up with `+`.

    `flops` follows the usual estimate of 2 x parameters x tokens (dense layers; attention scores left out); `seconds` is wall
    time divided evenly over the requests of a batch; `price` is in the currency of whoever set the prices of a remote model.
    """

    calls: int = 0
    images: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    price: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Answer:
    """The text, its bill, who gave it; `error` is the reason where no answer could be given (then `text` is empty).

    `scores` is a distribution over the request's choices, in their order; `likelihood` the geometric mean of the probabilities of the
    generated tokens. Either is None where a model has none. Of a composite, `parts` are the answers (and gates) that it was made of, in
    order, and `usage` is exactly the sum of theirs; `confidence` is what its gate said of the small model; `note` says what went wrong on
    the way without costing the answer.
    """

    text: str
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    error: str | None = None
    scores: tuple[float, ...] | None = None
    likelihood: float | None = None
    confidence: float | None = None
    parts: tuple[Answer, ...] = ()
    note: str = ""

    @property
    def by(self) -> tuple[str, ...]:
        """The models that were called for this answer, in order; gates that called none are left out."""
        if self.parts:
            return tuple(name for part in self.parts for name in part.by)
        return (self.model,) if self.usage.calls else ()


@runtime_checkable
class Model(Protocol):
    """Anything that answers: a network, a shunt of two, a planner with tools."""

    @property
    def name(self) -> str:
        """What records and bills call it."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. A request that fails gives an `Answer` with `error` set; it never costs the others theirs."""
        ...


@runtime_checkable
class ScoringModel(Model, Protocol):
    """A model that can weigh the choices of a request against each other."""

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """As `generate`, with one of each request's choices as the text, and `scores` over them (None of a model that can only name one).
        Raises ValueError for a request without choices."""
        ...


@runtime_checkable
class TokenModel(ScoringModel, Protocol):
    """A model whose next-token logits can be had. Whoever steers decoding (`collab.proxy`) needs this; nobody else does."""

    network: Any
    processor: Any

    def answer_logits(self, request: Request, answers: Sequence[str]) -> Any:
        """Logits and ids of each answer's tokens behind the request's prompt (`collab.single.AnswerLogits`)."""
        ...
