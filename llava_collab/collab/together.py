"""One run that trains a small model, a large model and the gate between them, with the expected cost in the loss.

With g the gate's probability that the small model answers, l_s and l_l the two models' losses on a sample, c the price of a large call:

    together   2 / (1 + 2 keep) (mean[ g l_s + (1 - g) (l_l + c) ] + keep mean[ l_s + l_l ])
    apart      mean[ l_s + l_l ] + mean[ g l_s' + (1 - g) (l_l' + c) ],  ' : without gradient

Together, each model learns most where it is asked; apart, all learn from the same samples in the same steps, and the gate only watches. The
factor makes a sample's weights in both models' losses add up to 2 either way, so the two differ in whether the models feel the gate.
Shapes: B samples, S supervised tokens, F features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .distill import STATE, TokenStudent, load_state, rate, rows_of, save_state


@dataclass(frozen=True)
class Step:
    """What a step was like: mean losses of both models, mean probability that the small one answers, and the whole loss."""

    small: float
    large: float
    asked_small: float
    loss: float


@dataclass(frozen=True)
class Together:
    """How to train the three; `fit` does it."""

    steps: int = 250
    batch_size: int = 16
    small_lr: float = 2e-4
    large_lr: float = 2e-4
    gate_lr: float = 1e-2
    cost: float = 0.1
    """c: what a large call costs, in nats a token of mean loss."""
    keep: float = 0.25
    """How much both models go on learning from every sample, whoever is asked: without it, one that is never asked never learns."""
    joint: bool = True
    """Together, or apart."""
    warmup: float = 0.06
    clip_norm: float = 1.0
    seed: int = 0

    def fit(
        self,
        small: TokenStudent,
        large: TokenStudent,
        gate: nn.Linear,
        rows: Sequence[Any],
        features_MF: Tensor,
        *,
        folder: Path | None = None,
        save_every: int = 0,
        of: str = "",
        quiet: bool = False,
    ) -> list[Step]:
        """Train in place what requires gradients of the three, on `rows` [M], which both models take, and `features_MF`, what the gate
        sees of them; `gate` maps [B,F] to [B,1]. With `folder` and `save_every` (steps), the same call after a kill goes on from the last
        save; `of` tells apart what the settings here do not: data and models.

        Raises ValueError for no rows, more or fewer features than rows, a folder of another training, and, before the update, for an
        infinite loss.
        """
        if not rows or len(rows) != len(features_MF):
            raise ValueError(f"{len(rows)} rows with {len(features_MF)} features: all have to be of the same samples, one at least")
        groups, learning = [], {}
        for name, module, lr in (("small", small, self.small_lr), ("large", large, self.large_lr), ("gate", gate, self.gate_lr)):
            if own := {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}:
                groups.append({"params": list(own.values()), "lr": lr, "highest": lr})
                learning |= own
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        kept, same = folder / STATE if folder is not None and save_every else None, {"together": json.dumps(asdict(self)), "of": of}
        about = load_state(kept, learning, optimizer, same) if kept is not None else {}
        steps = [Step(**step) for step in json.loads(about.get("steps", "[]"))]
        small.train()
        large.train()
        whole, name = range(len(steps), self.steps), "together" if self.joint else "apart"
        for step in tqdm(whole, desc=name, unit="step", initial=len(steps), total=self.steps, disable=quiet):
            drawn = rows_of(step, self.batch_size, len(rows), self.seed).tolist()
            batch = [rows[k] for k in drawn]
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * rate(step, self.steps, self.warmup)
            small_B = sample_losses(small, batch)
            large_B = sample_losses(large, batch).to(small_B)
            device = next(gate.parameters()).device
            g_B = gate(features_MF[drawn].to(device))[:, 0].sigmoid().to(small_B)
            loss = self.loss(g_B, small_B, large_B)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"step {step + 1}: the loss is {loss.item()}; the batch's rows start with {drawn[:8]}. Look at them, or lower a rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
            optimizer.step()
            steps.append(Step(*(float(value.detach().mean()) for value in (small_B, large_B, g_B, loss))))
            if kept is not None and (step + 1) % save_every == 0:
                save_state(kept, learning, optimizer, same | {"steps": json.dumps([asdict(step) for step in steps])})
        small.eval()
        large.eval()
        return steps

    def loss(self, g_B: Tensor, small_B: Tensor, large_B: Tensor) -> Tensor:
        """See the head of this file."""
        if self.joint:
            asked = (g_B * small_B + (1 - g_B) * (large_B + self.cost)).mean()
            return 2 / (1 + 2 * self.keep) * (asked + self.keep * (small_B + large_B).mean())
        watched = g_B * small_B.detach() + (1 - g_B) * (large_B.detach() + self.cost)
        return (small_B + large_B).mean() + watched.mean()


def sample_losses(student: TokenStudent, rows: Sequence[Any]) -> Tensor:
    """[B]: each sample's mean cross-entropy over its own supervised tokens."""
    logits_SV = student(rows).float()
    at_S, tokens_S = (value.to(logits_SV.device) for value in student.positions(rows))
    own_S = F.cross_entropy(logits_SV, tokens_S, reduction="none")
    zeros_B = own_S.new_zeros(len(rows))
    return zeros_B.index_add(0, at_S, own_S) / zeros_B.index_add(0, at_S, torch.ones_like(own_S)).clamp(min=1)
