"""What every floor speaks: a `Request` goes in, an `Answer` with its bill (`Usage`) comes out, and whatever does that is a `Model`.

This is the ground floor: it imports nothing of the package. `Single` makes a `Model` of one network; composites of several
networks satisfy the same protocol, so one evaluator measures them all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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

    Images are paths (opened when needed) or PIL images.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | Any, ...] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Usage:
    """What an answer cost. Adds up with `+`.

    `flops` follows the usual estimate of 2 x parameters x tokens (dense layers; attention scores left out); `seconds` is wall
    time divided evenly over the requests of a batch.
    """

    calls: int = 0
    images: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Answer:
    """The text, its bill, who gave it; `error` is the reason where no answer could be given (then `text` is empty)."""

    text: str
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    error: str | None = None


@runtime_checkable
class Model(Protocol):
    """Anything that answers: a network, a shunt of two, a planner with tools."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. A request that fails gives an `Answer` with `error` set; it never costs the others theirs."""
        ...


class Single:
    """A `Model` made of one network and its processor (greedy decoding, left padding).

    `processor.encode_requests(requests)` gives the padded batch; `network.generate` the tokens; `processor.decode_answers` the texts.
    """

    def __init__(self, network: Any, processor: Any, name: str) -> None:
        self.network = network.eval()
        self.processor = processor
        self.name = name
        self._parameters = sum(p.numel() for p in network.parameters())

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in order. If the batch as a whole can't be encoded, requests are tried one by one, so that only bad ones fail."""
        try:
            batch = self.processor.encode_requests(requests)
        except (ValueError, OSError) as error:
            if len(requests) == 1:
                return [Answer("", model=self.name, error=f"{type(error).__name__}: {error}")]
            return [answer for request in requests for answer in self.generate([request])]
        return self._answer(requests, batch)

    def _answer(self, requests: Sequence[Request], batch: Any) -> list[Answer]:
        import torch

        start = time.perf_counter()
        prompt_length = batch["input_ids"].shape[1]
        with torch.inference_mode():
            out_BT = self.network.generate(
                **batch.to(self.network.device), do_sample=False, max_new_tokens=max(r.max_new_tokens for r in requests)
            )
        seconds = (time.perf_counter() - start) / len(requests)
        texts, lengths = self.processor.decode_answers(out_BT[:, prompt_length:], [r.max_new_tokens for r in requests])
        prompt_tokens = batch["attention_mask"].sum(1).tolist()
        return [
            Answer(text, Usage(1, len(r.images), p, n, 2.0 * self._parameters * (p + n), seconds), self.name)
            for r, text, p, n in zip(requests, texts, prompt_tokens, lengths, strict=True)
        ]
