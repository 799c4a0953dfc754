"""`Proxy`: a large model steered at decoding time by the difference that tuning made to a small one (proxy-tuning, arXiv 2401.08565).

    softmax( s_base + alpha (s_expert - s_anti) )        expert: small and tuned; anti-expert: the same small model before tuning

Nothing of the large model is trained or changed; the three share a vocabulary and advance on the same token, each with its own cache.
Shapes: B rows, T tokens, V vocabulary, K tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..adapters.routing import RoutingContext
from ..types import Answer, Request, Usage
from .single import AnswerLogits, Single


class Proxy(Single):
    """A `TokenModel` of three: decoding and scoring both use the steered logits. An answer's parts are the three models' bills.

    Raises ValueError where the three do not have one vocabulary.
    """

    def __init__(self, base: Single, expert: Single, anti: Single, alpha: float = 1.0, name: str = "proxy") -> None:
        super().__init__(base.network, base.processor, name)
        self.lock = Locks([base.lock, expert.lock, anti.lock])  # each of the three may answer requests of its own
        self.base, self.expert, self.anti, self.alpha = base, expert, anti, alpha
        for other in (expert, anti):
            if problem := _unlike(base, other):
                raise ValueError(f"{name}: {base.name} and {other.name} have to share a vocabulary, and {problem}")

    def answer_logits(self, request: Request, answers: Sequence[str]) -> AnswerLogits:
        """See `types.TokenModel`. Raises ValueError where the three write an answer in other tokens."""
        base, expert, anti = (model.answer_logits(request, answers) for model in (self.base, self.expert, self.anti))
        for other, model in ((expert, self.expert), (anti, self.anti)):
            if any(not torch.equal(own_K, ids_K.to(own_K)) for (_, own_K), (_, ids_K) in zip(base.pairs, other.pairs, strict=True)):
                cure = "give both one template (`template` of a network in a recipe)"
                raise ValueError(f"{self.name}: {self.base.name} and {model.name} end an answer otherwise; {cure}")
        pairs = [
            (b_KV + self.alpha * (e_KV.to(b_KV) - a_KV.to(b_KV)), ids_K)
            for (b_KV, ids_K), (e_KV, _), (a_KV, _) in zip(base.pairs, expert.pairs, anti.pairs, strict=True)
        ]
        return AnswerLogits(pairs, base.tokens, (base.tokens, expert.tokens, anti.tokens))

    def _steering(self, requests: Sequence[Request]) -> Sequence[LogitsProcessor]:
        followers = [Follower(m.network, m.processor.encode_requests(requests).to(m.network.device)) for m in (self.expert, self.anti)]
        self._followers = followers  # the lock is held until the bill is written
        return [Steering(followers[0], followers[1], self.alpha)]

    def _answer(self, requests: Sequence[Request], batch: Any) -> list[Answer]:
        answers = super()._answer(requests, batch)
        prompts = [follower.prompt_tokens for follower in self._followers]
        return [self._billed(a, (a.usage.prompt_tokens, prompts[0][k], prompts[1][k])) for k, a in enumerate(answers)]

    def _chosen(self, request: Request, found: AnswerLogits, seconds: float) -> Answer:
        return self._billed(super()._chosen(request, found, seconds), found.of_parts)

    def _billed(self, answer: Answer, prompts: Sequence[int]) -> Answer:
        """One bill a model, each for the tokens that it read (a tower may make more of a picture than another) and all for those that were
        written; wall time is shared out by FLOPs, since the three run in turns."""
        models, written = (self.base, self.expert, self.anti), answer.usage.generated_tokens
        flops = [2.0 * model.parameters * (prompt + written) for model, prompt in zip(models, prompts, strict=True)]
        parts = []
        for model, prompt, own in zip(models, prompts, flops, strict=True):
            usage = replace(answer.usage, prompt_tokens=prompt, flops=own, seconds=answer.usage.seconds * own / sum(flops))
            parts.append(Answer(answer.text, usage, model.name))
        return replace(answer, usage=sum((part.usage for part in parts), Usage()), parts=tuple(parts))


class Locks:
    """Several locks as one. They are taken in one order, whoever asks, so that two holders never wait for each other."""

    def __init__(self, locks: Sequence[Any]) -> None:
        self._locks = sorted(locks, key=id)

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.acquire()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.release()


class Follower:
    """A model that reads along with another one's decoding, with a cache of its own."""

    def __init__(self, network: Any, prompt: Any) -> None:
        self.network, self._inputs = network, dict(prompt)
        self.rows = int(self._inputs["input_ids"].shape[0])
        self._mask_BT: Tensor = self._inputs["attention_mask"]
        self._kept: dict[str, Any] = {}  # the cache, and the weights that a HyperLLaVA wrote for this prompt
        self._routing = RoutingContext(pending=True)
        self.prompt_tokens: list[int] = self._mask_BT.sum(1).tolist()

    def __call__(self, new_B1: Tensor | None) -> Tensor:
        """Float logits [B,V] behind the prompt (None), or behind one more token."""
        if new_B1 is None:
            inputs = self._inputs
        else:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], 1)
            inputs = {"input_ids": new_B1.to(self._mask_BT.device), "attention_mask": self._mask_BT} | self._kept
        positions_BT = (self._mask_BT.long().cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        with self._routing:
            out = self.network(**inputs, position_ids=positions_BT, use_cache=True, logits_to_keep=1)
        self._kept = {"past_key_values": out.past_key_values}
        if getattr(out, "expert_weights", None) is not None:
            self._kept["expert_weights"] = out.expert_weights
        return out.logits[:, -1].float()


class Steering(LogitsProcessor):
    """scores + alpha (expert - anti-expert), for greedy decoding or sampling.

    Raises ValueError for beam search (rows change places, and the caches here would not follow) and several sequences a prompt.
    """

    def __init__(self, expert: Follower, anti: Follower, alpha: float) -> None:
        self.expert, self.anti, self.alpha = expert, anti, alpha
        self._ids_BT: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        before_BT, self._ids_BT = self._ids_BT, input_ids
        if input_ids.shape[0] != self.expert.rows:
            raise ValueError(
                f"{input_ids.shape[0]} rows are decoded for {self.expert.rows} prompts: a proxy can't do beam search or return several "
                "sequences; use num_beams=1 and num_return_sequences=1"
            )
        if before_BT is not None and not torch.equal(before_BT, input_ids[:, :-1]):
            raise ValueError("the rows were reordered or jumped ahead; a proxy follows one token at a time")
        new_B1 = None if before_BT is None else input_ids[:, -1:]
        expert_BV, anti_BV = self.expert(new_B1), self.anti(new_B1)
        return scores + self.alpha * (expert_BV.to(scores) - anti_BV.to(scores))


def _unlike(one: Single, other: Single) -> str | None:
    """Why two models can't have their logits added, or None if they can."""
    first, second = (model.processor.tokenizer.get_vocab() for model in (one, other))
    if first != second:
        differ = sorted(word for word in first.keys() | second.keys() if first.get(word) != second.get(word))
        return f"their tokenizers give {len(differ)} of {len(first)} and {len(second)} tokens other numbers, such as {differ[0]!r}"
    widths = [model.network.get_output_embeddings().weight.shape[0] for model in (one, other)]
    return None if widths[0] == widths[1] else f"their output layers are {widths[0]} and {widths[1]} wide"
