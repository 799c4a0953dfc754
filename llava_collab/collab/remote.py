"""`Remote`: a chat model behind an OpenAI-compatible endpoint as a `Model`, with its price on the bill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..data.conversation import IMAGE_MARK, SampleError
from ..types import Answer, Request, Usage
from .endpoint import Client, Reply, image_part
from .single import check_choices


@dataclass(frozen=True)
class Remote:
    """Asks `client` (time-outs, retries and keys are its business), `parallel` requests at once.

    Endpoints give no probabilities of whole answers, so `score` gives the choice that the reply names, and no `scores`: a gate can't read
    them. A request with choices names them in its prompt. What the server does not answer in time becomes an answer with `error`. Prices
    are for a million tokens; tokens that the server did not count are not on the bill, which `note` then says.
    """

    client: Client
    name: str
    price_in: float = 0.0
    price_out: float = 0.0
    parallel: int = 8

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.Model`. Raises EndpointError where every request would fail: a wrong address, model or key."""
        with ThreadPoolExecutor(max(1, min(self.parallel, len(requests)))) as pool:
            return list(pool.map(self._one, requests))

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """The choice that each reply names; a reply that names none, or several, stands as it is, and `note` says so: it was paid for."""
        for request in requests:
            check_choices(request)
        return [self._named(request, answer) for request, answer in zip(requests, self.generate(requests), strict=True)]

    def _named(self, request: Request, answer: Answer) -> Answer:
        said = answer.text.strip()
        if answer.error is not None or said in request.choices:
            return replace(answer, text=said)
        plain = f" {_plain(said)} "
        found = [choice for choice in request.choices if _plain(choice) and f" {_plain(choice)} " in plain]
        named = [one for one in found if not any(one != other and f" {_plain(one)} " in f" {_plain(other)} " for other in found)]
        if len(named) == 1:  # "nat gas" names gas no more
            return replace(answer, text=named[0])
        return replace(answer, note="; ".join(filter(None, [answer.note, f"the reply names {len(named)} of the choices"])))

    def _one(self, request: Request) -> Answer:
        start = time.perf_counter()
        try:
            *earlier, last = _messages(request)
        except (SampleError, OSError) as error:
            return Answer("", model=self.name, error=f"{type(error).__name__}: {error}")
        reply = replace(self.client, max_tokens=request.max_new_tokens).ask(last["content"], earlier)
        prompt, generated = reply.prompt_tokens or 0, reply.generated_tokens or 0
        price = (prompt * self.price_in + generated * self.price_out) / 1e6
        usage = Usage(1, len(request.images), prompt, generated, 0.0, time.perf_counter() - start, price)
        return Answer(reply.text, usage, self.name, error=reply.error, note=_uncounted(reply))


def _plain(text: str) -> str:
    """In lower case, marks as spaces, which alone part words."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _uncounted(reply: Reply) -> str:
    notes = ["the server counted no tokens"] if reply.error is None and None in (reply.prompt_tokens, reply.generated_tokens) else []
    return "; ".join(notes + ([f"{reply.lost} attempts without an answer may have been billed"] if reply.lost else []))


def _messages(request: Request) -> list[dict[str, Any]]:
    """The conversation as the API takes it; images stand where their marks do. Raises SampleError."""
    images = list(request.images)
    messages = []
    for turn in request.turns:
        pieces = turn.text.split(IMAGE_MARK)
        if len(pieces) - 1 > len(images):
            raise SampleError(request.id, "image_count", f"more {IMAGE_MARK} marks than images")
        if len(pieces) == 1:
            messages.append({"role": turn.role, "content": turn.text})
            continue
        parts: list[dict[str, Any]] = []
        for k, piece in enumerate(pieces):
            parts += [image_part(images.pop(0))] if k else []
            parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        messages.append({"role": turn.role, "content": parts})
    if images:
        raise SampleError(request.id, "image_count", f"{len(images)} images without a mark {IMAGE_MARK}")
    if request.choices:
        options = f"Answer with one of: {', '.join(request.choices)}."
        content = messages[-1]["content"]
        text = [*content, {"type": "text", "text": options}] if isinstance(content, list) else f"{content}\n{options}"
        messages[-1] = messages[-1] | {"content": text}
    return messages
