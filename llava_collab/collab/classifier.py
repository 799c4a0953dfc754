"""Transformers' sequence classifiers as leaves, and how a language model becomes one: its upper blocks learn, on kept states of the lower.

Shapes: B texts, T tokens, D width, C labels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..types import Answer, Request, Usage
from .single import check_choices, chosen


class Classifier:
    """A `ScoringModel` of a folder that `AutoModelForSequenceClassification` reads; its labels are those of `config.id2label`.

    Texts are cut to `tokens` (the config's `classifier_tokens`, else the tokenizer's limit), their beginning is kept.
    """

    def __init__(self, folder: str | Path, name: str, *, device: torch.device | str = "cpu", bf16: bool = True) -> None:
        self.name = name
        self.network: Any = cast(Any, AutoModelForSequenceClassification.from_pretrained(folder)).to(device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.labels = tuple(self.network.config.id2label[k] for k in range(self.network.config.num_labels))
        self.tokens = getattr(self.network.config, "classifier_tokens", None) or min(self.tokenizer.model_max_length, 1024)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.bf16 = bf16
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The likeliest choice; of a request without choices, the likeliest label."""
        start = time.perf_counter()
        batch = encode(self.tokenizer, [request.text for request in requests], self.tokens)
        device = self.network.device
        with torch.inference_mode(), self._lock, torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            p_BC = self.network(**{key: value.to(device) for key, value in batch.items()}).logits.float().softmax(-1).cpu()
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        tokens = batch["attention_mask"].sum(1).tolist()
        return [self._answer(r, p.tolist(), n, seconds) for r, p, n in zip(requests, p_BC, tokens, strict=True)]

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.ScoringModel`."""
        for request in requests:
            check_choices(request)
        return self.generate(requests)

    def _answer(self, request: Request, p_C: list[float], tokens: int, seconds: float) -> Answer:
        usage = Usage(1, 0, tokens, 0, 2.0 * self.parameters * tokens, seconds)
        own = dict(zip(self.labels, p_C, strict=True))
        if not request.choices:
            best = max(own, key=lambda label: own[label])
            return Answer(best, usage, self.name, likelihood=own[best])
        if not any(choice in own for choice in request.choices):
            reason = f"{request.id}: {request.choices[0]!r} and its other choices are none of {self.name}'s {len(own)} labels"
            return Answer("", usage, self.name, error=reason)
        scores = [own[choice] + 1e-30 if choice in own else 0.0 for choice in request.choices]
        return chosen(request, [p / sum(scores) for p in scores], usage, self.name)


def encode(tokenizer: Any, texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Ids and mask, padded on the left: the last position is every text's last token, which the head reads."""
    tokenizer.padding_side, tokenizer.truncation_side = "left", "right"
    options: dict[str, Any] = {"truncation": True, "max_length": tokens, "padding": True, "return_tensors": "pt"}
    return {key: value for key, value in tokenizer(list(texts), **options).items() if key in ("input_ids", "attention_mask")}


class UpperBlocks(nn.Module):
    """A student for the `Distiller`: the upper `learning` blocks of a language model and a fresh head over its last token.

    Inputs are indices of texts, whose states below those blocks are computed once (`keep`) and kept in bfloat16.
    """

    def __init__(
        self, base: str | Path, labels: Sequence[str], *, learning: int, tokens: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        names = dict(enumerate(labels))
        self.tokenizer, self.tokens = tokenizer, tokens
        options: dict[str, Any] = {"num_labels": len(labels), "id2label": names, "label2id": {name: k for k, name in names.items()}}
        self.network: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **options)
        self.network.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.network.config.classifier_tokens = tokens
        blocks = self.network.model.layers
        if not 0 < learning <= len(blocks):
            raise ValueError(f"{base} has {len(blocks)} blocks; {learning} of them can't learn")
        self.network.requires_grad_(False)
        for part in (blocks[len(blocks) - learning :], self.network.model.norm, self.network.score):
            part.requires_grad_(True)
        self._lower = len(blocks) - learning
        self.to(device)
        self._states: list[Tensor] = []

    @torch.inference_mode()
    def keep(self, texts: Sequence[str], batch_size: int = 32) -> None:
        """Compute the lower blocks' states [T,D] of each text, in order of length; inputs of `forward` are places in `texts`."""
        kept: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        caught: list[Tensor] = []
        hook = self.network.model.layers[self._lower].register_forward_pre_hook(_catch(caught), with_kwargs=True)
        try:
            for at in tqdm(range(0, len(order), batch_size), desc="states", unit="batch"):
                rows = order[at : at + batch_size]
                batch = encode(self.tokenizer, [texts[k] for k in rows], self.tokens)
                caught.clear()
                with torch.autocast(self.network.device.type, torch.bfloat16):
                    try:
                        self.network.model(**{key: value.to(self.network.device) for key, value in batch.items()}, use_cache=False)
                    except _Enough:
                        pass
                for row, state_TD, mask_T in zip(rows, caught[0], batch["attention_mask"], strict=True):
                    kept[row] = state_TD.cpu()[mask_T.bool()].to(torch.bfloat16).clone()
        finally:
            hook.remove()
        self._states = [kept[k] for k in range(len(texts))]

    def forward(self, inputs: Sequence[int]) -> Tensor:
        """[B,C]"""
        states = [self._states[k] for k in inputs]
        longest = max(len(state) for state in states)
        x_BTD = torch.zeros(len(states), longest, states[0].shape[1])
        mask_BT = torch.zeros(len(states), longest, dtype=torch.long)
        for b, state in enumerate(states):
            x_BTD[b, longest - len(state) :], mask_BT[b, longest - len(state) :] = state.float(), 1
        whole = self.network.model.layers
        self.network.model.layers = whole[self._lower :]
        try:  # the upper blocks are a smaller decoder, whose embeddings are the kept states
            device = self.network.device
            return self.network(inputs_embeds=x_BTD.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
        finally:
            self.network.model.layers = whole

    def save(self, folder: Path) -> None:
        """The whole network, as transformers reads it."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class _Enough(Exception):
    """Thrown where the lower blocks end."""


def _catch(caught: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    return hook
