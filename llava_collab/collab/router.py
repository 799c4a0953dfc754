"""Learned routers: a gate that predicts from the request alone whether the small model's answer will do (Hybrid LLM, arXiv 2404.14618).

With q the quality of an answer and H(x) = q(small(x)) - q(large(x)) over R sampled answers of each, a router learns by cross-entropy

    deterministic    y = 1[ H >= 0 ]  for one answer each
    probabilistic    y = Pr[ H >= 0 ]  over all pairs of answers
    transformed      y(t*) = Pr[ H >= -t* ],  t* = argmax_t mean |y_i(t) - y_j(t)|   where the large model nearly always wins

Shapes: M requests, R answers of each model, F features.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ..files import write_bytes
from ..types import Answer, Request, Usage
from .distill import Distiller, Targets
from .gates import Confidence, Floats
from .single import Single

_PIECE = 16  # requests whose state is read at once
Form = Literal["deterministic", "probabilistic", "transformed"]


def routing_targets(form: Form, small_MR: Floats, large_MR: Floats) -> tuple[Floats, float]:
    """Targets y [M] and the relaxation t (0 but for `transformed`) from the qualities of R answers of either model to each request.

    Raises ValueError for an unknown form or shapes that differ in M.
    """
    if small_MR.ndim != 2 or large_MR.ndim != 2 or len(small_MR) != len(large_MR):
        raise ValueError(f"qualities have to be [requests, answers] of the same requests, got {small_MR.shape} and {large_MR.shape}")
    if form == "deterministic":
        return (small_MR[:, 0] >= large_MR[:, 0]).astype(float), 0.0
    if form not in ("probabilistic", "transformed"):
        raise ValueError(f"no router {form!r}; there are deterministic, probabilistic and transformed ones")
    gaps_MP = (small_MR[:, :, None] - large_MR[:, None, :]).reshape(len(small_MR), -1)
    t = best_relaxation(gaps_MP) if form == "transformed" else 0.0
    return _reaches(gaps_MP, t), t


def best_relaxation(gaps_MP: Floats, candidates: int = 200) -> float:
    """t* >= 0 of the largest mean |y_i(t) - y_j(t)| over pairs of requests; the smallest of several. Searched among the observed gaps."""
    observed = np.unique(np.maximum(0.0, -gaps_MP)) + 0.0  # no negative zero
    grid = np.unique(np.quantile(observed, np.linspace(0, 1, candidates), method="nearest"))
    spreads = [_spread(_reaches(gaps_MP, t)) for t in grid]
    return float(grid[int(np.argmax(np.round(spreads, 12)))])


def _reaches(gaps_MP: Floats, t: float) -> Floats:
    return (gaps_MP >= -t - 1e-12).mean(1)


def _spread(y_M: Floats) -> float:
    """mean over all pairs of |y_i - y_j|, in M log M."""
    count, ordered = len(y_M), np.sort(y_M)
    return float(2 * np.sum(ordered * (2 * np.arange(count) - count + 1)) / count**2)


class Features(Protocol):
    """What a router sees. `name` and `size` say which features a stored router needs; `reads` whether they need a draft."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def reads(self) -> Literal["draft", "request"]: ...

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[Tensor, list[Usage]]:
        """Float [M,F], and what they cost. `drafts` is empty for features that read requests."""
        ...


@dataclass(frozen=True)
class HashedText:
    """Words and pairs of words of the question, hashed into `size` buckets; rows of length 1. Costs nothing that counts."""

    size: int = 4096
    reads: Literal["request"] = "request"

    @property
    def name(self) -> str:
        return f"hashed-text-{self.size}"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[Tensor, list[Usage]]:
        from sklearn.feature_extraction.text import HashingVectorizer

        hashed: Any = HashingVectorizer(n_features=self.size, ngram_range=(1, 2), alternate_sign=False)
        rows_MF = hashed.transform([request.text for request in requests]).toarray()
        return torch.tensor(rows_MF, dtype=torch.float32), [Usage()] * len(requests)


@dataclass(frozen=True)
class Draft:
    """The small model's answer: its three confidences (`gates.Confidence`; of free text its likelihood, thrice) and the answer's text,
    hashed into a one-hot, so that a router can learn which answers are to be trusted (FrugalGPT's scorer reads the answer too)."""

    size: int = 259
    name: str = "draft"
    reads: Literal["draft"] = "draft"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[Tensor, list[Usage]]:
        rows_MF = torch.zeros(len(drafts), self.size)
        for row_F, draft in zip(rows_MF, drafts, strict=True):
            kinds = ("max", "margin", "entropy") if draft.scores is not None else ("max",) * 3
            row_F[:3] = torch.tensor([Confidence(kind)([], [draft])[0] for kind in kinds])
            row_F[3 + zlib.crc32(draft.text.encode()) % (self.size - 3)] = 1.0
        return rows_MF, [Usage()] * len(drafts)


class Joined:
    """Several features side by side."""

    def __init__(self, parts: Sequence[Features]) -> None:
        self.parts = parts
        self.name = " + ".join(part.name for part in parts)
        self.size = sum(part.size for part in parts)
        self.reads: Literal["draft", "request"] = "draft" if any(part.reads == "draft" for part in parts) else "request"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[Tensor, list[Usage]]:
        found = [part(requests, drafts) for part in self.parts]
        return torch.cat([rows for rows, _ in found], 1), [sum(own, Usage()) for own in zip(*(usage for _, usage in found), strict=True)]


class PooledState:
    """The mean of a small model's last hidden states over the prompt, pictures included: text and image in one vector, for one prefill."""

    def __init__(self, model: Single) -> None:
        self.model = model
        self.name = f"state-of-{model.name}"
        self.size = int(model.network.get_output_embeddings().weight.shape[1])
        self.reads: Literal["request"] = "request"

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[Tensor, list[Usage]]:
        pieces = [self._piece(requests[at : at + _PIECE]) for at in range(0, len(requests), _PIECE)]
        return torch.cat([rows for rows, _ in pieces]), [bill for _, bills in pieces for bill in bills]

    def _piece(self, requests: Sequence[Request]) -> tuple[Tensor, list[Usage]]:
        batch = self.model.processor.encode_requests(requests).to(self.model.network.device)
        caught: list[Tensor] = []
        head = self.model.network.get_output_embeddings()
        with self.model.lock, torch.inference_mode():  # nobody else's states come through the hook
            hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
            try:
                self.model.network(**batch)
            finally:
                hook.remove()
        mask_BT1 = batch["attention_mask"][:, :, None]
        pooled_BF = (caught[0] * mask_BT1).sum(1) / mask_BT1.sum(1)
        tokens, flops = batch["attention_mask"].sum(1).tolist(), 2.0 * self.model.parameters
        bills = [Usage(1, len(r.images), n, 0, flops * n) for r, n in zip(requests, tokens, strict=True)]
        return F.normalize(pooled_BF.float().cpu(), dim=1), bills


class Router:
    """A learned gate: sigmoid(w . features + b). `about` is what it was learnt from, for the reader."""

    def __init__(
        self, features: Features, weight_F: Tensor, bias: float, name: str = "router", about: dict[str, object] | None = None
    ) -> None:
        self.features, self.weight_F, self.bias, self.name, self.about = features, weight_F, bias, name, about or {}
        self.reads: Literal["draft", "request"] = features.reads

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[float]:
        return self.billed(requests, drafts)[0]

    def billed(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[float], list[Usage]]:
        """Confidences, and what they cost: see `compose.BilledGate`."""
        rows_MF, usage = self.features(requests, drafts)
        return torch.sigmoid(rows_MF @ self.weight_F + self.bias).tolist(), usage

    def save(self, path: Path) -> None:
        """One safetensors file that names its features."""
        about = {"name": self.name, "features": self.features.name, "about": json.dumps(self.about)}
        write_bytes(path, save({"weight": self.weight_F.contiguous(), "bias": torch.tensor([self.bias])}, about))


def load_router(path: Path, features: Features) -> Router:
    """What `save` wrote. Raises ValueError for a file that is no router, or one that was learnt on other features."""
    try:
        with safe_open(path, framework="pt") as file:
            about, weight_F, bias = file.metadata() or {}, file.get_tensor("weight"), float(file.get_tensor("bias"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a stored router ({error}); train one with train/router.py") from error
    if about.get("features") != features.name or weight_F.shape != (features.size,):
        raise ValueError(
            f"{path} was learnt on {about.get('features')!r} ({weight_F.shape[0]}), not on {features.name!r} ({features.size})"
        )
    return Router(features, weight_F, bias, about["name"], json.loads(about["about"]))


def fit_router(
    form: Form,
    features: Features,
    requests: Sequence[Request],
    small_MR: Floats,
    large_MR: Floats,
    *,
    drafts: Sequence[Answer] = (),
    epochs: int = 40,
    seed: int = 0,
) -> Router:
    """Learn a router by the `Distiller`: classes "large" and "small will do", with targets of `form`. `drafts` where features read them.

    Thresholds have to be chosen on other requests than these: a router is surer of those that it has seen.
    """
    targets_M, t = routing_targets(form, small_MR, large_MR)
    rows_MF, _ = features(requests, drafts)
    student = _TwoClasses(features.size)
    soft_M2 = torch.tensor(np.stack([1 - targets_M, targets_M], 1), dtype=torch.float32)
    size = min(64, len(requests))
    distiller = Distiller(steps=epochs * -(-len(requests) // size), batch_size=size, lr=1e-2, weight_decay=1e-2, seed=seed)
    losses = distiller.fit(student, list(rows_MF), Targets(soft_M2), quiet=True)
    about: dict[str, object] = {"form": form, "t": t, "requests": len(requests), "mean_target": float(targets_M.mean()), "loss": losses[-1]}
    weight_F = (student.layer.weight[1] - student.layer.weight[0]).detach().clone()
    return Router(features, weight_F, float((student.layer.bias[1] - student.layer.bias[0]).detach()), f"{form} router", about)


class _TwoClasses(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(size, 2)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.layer(torch.stack(list(inputs)))
