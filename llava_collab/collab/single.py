"""`Single`: a `Model` made of one network, HyperLLaVA or any text or vision-language model of transformers.

Shapes: B rows, T tokens, V vocabulary, N choices.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList

from ..data.collate import Collator
from ..data.conversation import IGNORE_INDEX, IMAGE_MARK, TEMPLATES, SampleError, check_turns
from ..data.images import load_image
from ..types import Answer, Request, Usage


class Single:
    """A `TokenModel` made of one network and its processor (greedy decoding, left padding; or sampled at a `temperature`).

    `processor.encode_requests(requests)` gives the padded batch; `network.generate` the tokens; `processor.decode_answers` the texts;
    `processor.encode_answers(request, texts)` a
    batch with labels, to score texts with. HyperLLaVA's processor has these; `ChatProcessor`
    gives them to any tokenizer or processor of transformers. Requests from several threads are answered one batch after another.
    What is sampled is drawn from `name`, `draw` and the ids of the batch's requests: it does not depend on what was asked before.
    """

    def __init__(self, network: Any, processor: Any, name: str, *, temperature: float = 0.0, draw: int = 0) -> None:
        self.network = network.eval()
        self.temperature, self.draw = temperature, draw
        self.processor = processor
        self.name = name
        self.parameters = sum(p.numel() for p in network.parameters())
        self.lock = threading.RLock()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in order. If the batch as a whole can't be encoded, requests are tried one by one, so that only bad ones fail."""
        try:
            batch = self.processor.encode_requests(requests)
        except (ValueError, OSError) as error:
            if len(requests) == 1:
                return [Answer("", model=self.name, error=f"{type(error).__name__}: {error}")]
            return [answer for request in requests for answer in self.generate([request])]
        with self.lock:
            return self._answer(requests, batch)

    def answer_logits(self, request: Request, answers: Sequence[str]) -> AnswerLogits:
        """See `types.TokenModel`. Raises SampleError or OSError for a request that can't be encoded."""
        batch = self.processor.encode_answers(request, answers).to(self.network.device)
        with torch.inference_mode(), self.lock:
            logits_NTV = self.network(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
        own_NT = _last_answer(batch["labels"][:, 1:])
        pairs = [(logits_NTV[k][own_NT[k]].float(), batch["labels"][k, 1:][own_NT[k]]) for k in range(len(answers))]
        return AnswerLogits(pairs, int(batch["attention_mask"].sum()))

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """p(choice, end of turn | prompt), normalised over each request's choices. Raises ValueError for a request without choices."""
        return [self._score(request) for request in requests]

    def _answer(self, requests: Sequence[Request], batch: Any) -> list[Answer]:
        start = time.perf_counter()
        prompt_length = batch["input_ids"].shape[1]
        prompt_tokens = batch["attention_mask"].sum(1).tolist()
        likelihood = _Likelihood()
        with torch.inference_mode():
            batch, limit = batch.to(self.network.device), max(r.max_new_tokens for r in requests)
            steered = LogitsProcessorList([*self._steering(requests), likelihood])
            with self._sampling(requests) as how:
                out_BT = self.network.generate(**batch, **how, max_new_tokens=limit, logits_processor=steered)
        likelihood.took(out_BT[:, -1])
        texts, lengths = self.processor.decode_answers(out_BT[:, prompt_length:], [r.max_new_tokens for r in requests])
        seconds = (time.perf_counter() - start) / len(requests)
        return [
            Answer(text, self._bill(r, p, n, seconds), self.name, likelihood=mean)
            for r, text, p, n, mean in zip(requests, texts, prompt_tokens, lengths, likelihood.means(lengths), strict=True)
        ]

    def _score(self, request: Request) -> Answer:
        check_choices(request)
        start = time.perf_counter()
        try:
            found = self.answer_logits(request, request.choices)
        except (SampleError, OSError) as error:
            return Answer("", model=self.name, error=f"{type(error).__name__}: {error}")
        return self._chosen(request, found, time.perf_counter() - start)

    def _chosen(self, request: Request, found: AnswerLogits, seconds: float) -> Answer:
        return chosen(request, found.scores(), self._bill(request, found.tokens, 0, seconds), self.name)

    @contextmanager
    def _sampling(self, requests: Sequence[Request]) -> Iterator[Mapping[str, Any]]:
        """Settings of `generate`, and around it the state that random numbers are drawn from."""
        if not self.temperature:
            yield {"do_sample": False}
            return
        digest = hashlib.sha256("/".join([self.name, str(self.draw), *(request.id for request in requests)]).encode()).digest()
        with torch.random.fork_rng([self.network.device] if self.network.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            yield {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}

    def _steering(self, requests: Sequence[Request]) -> Sequence[LogitsProcessor]:
        """What changes the next token's logits before one is taken: nothing here, see `collab.proxy`."""
        return ()

    def _bill(self, request: Request, prompt: int, generated: int, seconds: float) -> Usage:
        return Usage(1, len(request.images), prompt, generated, 2.0 * self.parameters * (prompt + generated), seconds)


@dataclass(frozen=True)
class AnswerLogits:
    """Of each answer, the logits [K,V] that its K tokens (the end of the turn is the last) are predicted by, and their ids [K]; `tokens` is
    what was read for all of them, `of_parts` what each part of a composite read."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    tokens: int
    of_parts: tuple[int, ...] = ()

    def scores(self) -> list[float]:
        """p(answer | prompt) of each, normalised over the answers."""
        sums = [logits_KV.log_softmax(-1).gather(-1, ids_K[:, None]).double().sum() for logits_KV, ids_K in self.pairs]
        return torch.stack(sums).softmax(-1).tolist()


def _last_answer(labels_NT: Tensor) -> Tensor:
    """bool [N,T]: the last run of supervised tokens in each row; answers of earlier turns stand before it."""
    own_NT = labels_NT != IGNORE_INDEX
    breaks_NT = (~own_NT).flip(1).long().cumsum(1).flip(1)  # how many unsupervised tokens are at or behind each position
    last_N = torch.where(own_NT, breaks_NT, breaks_NT.max() + 1).min(1, keepdim=True).values
    return own_NT & (breaks_NT == last_N)


def check_choices(request: Request) -> None:
    """Raises ValueError for a request that can't be scored: no choices, or one twice."""
    if not request.choices:
        raise ValueError(f"request {request.id!r} has no choices, so there is nothing to score; give it choices, or use generate")
    if len(set(request.choices)) < len(request.choices):
        raise ValueError(f"request {request.id!r} names a choice twice: {', '.join(request.choices)}")


def chosen(request: Request, scores: Sequence[float], usage: Usage, name: str) -> Answer:
    """The answer that scores over the request's choices make: the likeliest choice, the first of several."""
    best = max(range(len(scores)), key=lambda k: scores[k])
    return Answer(request.choices[best], usage, name, scores=tuple(scores))


class _Likelihood(LogitsProcessor):
    """Watches decoding: the log-probability of the token that each step takes. Changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self._logp_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.took(input_ids[:, -1])
        self._logp_BV = scores.float().log_softmax(-1)
        return scores

    def took(self, ids_B: Tensor) -> None:
        """The tokens [B] of the step before; before the first step there is none."""
        if self._logp_BV is not None:
            self.steps.append(self._logp_BV.gather(-1, ids_B[:, None])[:, 0])

    def means(self, lengths: Sequence[int]) -> list[float | None]:
        """Geometric mean probability of each row's first `lengths` tokens; None for a row without tokens."""
        logp_BT = torch.stack(self.steps, 1).cpu() if self.steps else torch.zeros(len(lengths), 0)
        return [float(row[:n].mean().exp()) if n else None for row, n in zip(logp_BT, lengths, strict=True)]


class ChatProcessor:
    """What `Single` needs, on top of any tokenizer or processor of transformers that has a chat template."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "left"
        self.sees = self.tokenizer is not processor
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ValueError("this processor has no chat template; set `chat_template` (see llava_collab.data.conversation.TEMPLATES)")

    def encode_requests(self, requests: Sequence[Request]) -> BatchFeature:
        """A left-padded batch of prompts. Raises SampleError for turns or images that can't be right."""
        conversations = [self._messages(request) for request in requests]
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        return BatchFeature(dict(self.processor.apply_chat_template(conversations, padding=True, **options)))

    def encode_answers(self, request: Request, answers: Sequence[str]) -> BatchFeature:
        """One prompt before each of several answers, padded on the right; `labels` are the answers' tokens and the end of the turn."""
        prompt = self.encode_requests([request])
        ids = [
            torch.tensor([*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]) for text in answers
        ]
        prompt_T = prompt["input_ids"][0]
        rows = [
            {
                "sample_id": request.id,
                "input_ids": torch.cat([prompt_T, own]),
                "labels": torch.cat([torch.full_like(prompt_T, IGNORE_INDEX), own]),
                "guidance_mask": torch.zeros(len(prompt_T) + len(own), dtype=torch.bool),
            }
            for own in ids
        ]
        batch = Collator(self.tokenizer.pad_token_id)(rows)
        more = {k: torch.cat([v] * len(ids)) for k, v in prompt.items() if k not in batch and isinstance(v, Tensor)}
        return BatchFeature({k: v for k, v in batch.items() if k not in ("sample_ids", "guidance_mask")} | more)

    def decode_answers(self, ids_BT: Tensor, max_tokens: Sequence[int]) -> tuple[list[str], list[int]]:
        """Texts up to the end of the turn (at most `max_tokens` each), and how many tokens each one took."""
        stops = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        texts, lengths = [], []
        for row, limit in zip(ids_BT.tolist(), max_tokens, strict=True):
            end = next((k for k, token in enumerate(row[:limit]) if token in stops), len(row[:limit]))
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
            lengths.append(min(end + 1, len(row[:limit])))
        return texts, lengths

    def _messages(self, request: Request) -> list[Mapping[str, Any]]:
        check_turns(request.turns, sample_id=request.id, add_generation_prompt=True)
        if request.images and not self.sees:
            raise SampleError(request.id, "image_count", f"{len(request.images)} images for a model that reads text only")
        if not self.sees:
            return [{"role": turn.role, "content": turn.text} for turn in request.turns]
        images = iter(request.images)
        messages = []
        for turn in request.turns:
            pieces, content = turn.text.split(IMAGE_MARK), []
            for k, piece in enumerate(pieces):
                if k:
                    image = next(images, None)
                    if image is None:
                        raise SampleError(request.id, "image_count", f"more {IMAGE_MARK} marks than the {len(request.images)} images")
                    content.append({"type": "image", "image": load_image(image) if isinstance(image, str | Path) else image})
                if piece.strip():
                    content.append({"type": "text", "text": piece.strip()})
            messages.append({"role": turn.role, "content": content})
        if next(images, None) is not None:
            raise SampleError(request.id, "image_count", f"fewer {IMAGE_MARK} marks than the {len(request.images)} images")
        return messages


def open_single(
    folder: str, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, template: str | None = None
) -> Single:
    """The model in a folder (or hub id) of transformers: HyperLLaVA and its deltas, another vision-language model, or a text model.

    `template` (of `data.conversation.TEMPLATES`; for LLaVA and text models) takes the place of its own: for a model before tuning that is
    asked beside a tuned one. Raises ValueError for a folder that holds no generating model and for a template that it can't take, OSError
    for a folder that is not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from ..models import build  # registers HyperLLaVA's configuration

    kind = AutoConfig.from_pretrained(folder).model_type
    llava, text = kind in ("hyper_llava", "llava"), kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if template is not None and (template not in TEMPLATES or not (llava or text)):
        raise ValueError(
            f"{name}: a {kind!r} model can't be asked by template {template!r}; LLaVA and text models can, by {', '.join(TEMPLATES)}"
        )
    if llava:
        network, processor = build.load(folder, dtype=dtype)
    elif kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        network, processor = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto"),
            AutoProcessor.from_pretrained(folder),
        )
    elif text:
        network, processor = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto"), AutoTokenizer.from_pretrained(folder)
    else:
        reason = "does not generate text, so nobody can ask it; name a causal or image-text-to-text model"
        raise ValueError(f"{folder}: a {kind!r} model {reason}")
    if template is not None:
        processor.chat_template = TEMPLATES[template]
    return Single(cast(Any, network).to(device), processor if llava else ChatProcessor(processor), name)
