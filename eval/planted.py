"""A planted task that only generated weights can solve: does the mechanism work at all?

    python eval/planted.py                      three seeds of dynamic, static and constant experts, about two minutes on one core

A tiny LLaVA is frozen with its attention switched off (output projections zero), so that no token hears of another. A picture in one
of four colours stands before a symbol; the answer is the symbol's image under the permutation that the colour names (every answer
is equally likely for every symbol). At the symbol's place, where the answer is read, nothing is known of the picture, except through
the guidance of the language expert. A dynamic expert can solve this; one with the same weights for every sample can't do better than
one in four, whatever its size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from llava_collab.evaluation.environment import environment
from llava_collab.files import write_json
from llava_collab.models.build import ModelSpec, build

RULES, SYMBOLS = 4, 8
PICTURES = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0], [1.5, 1.5, -1.5]])  # normalised colours


@dataclass(frozen=True)
class Args:
    """Train experts of three kinds on the planted task and print their accuracy on fresh samples."""

    modes: tuple[str, ...] = ("dynamic", "static", "constant")
    """Kinds of expert: dynamic (the method), static (b(n) alone), constant (the whole generator, fed with one guidance)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of model, data order and noise."""
    steps: int = 300
    """Optimiser steps of 64 samples."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the figures to this JSON file."""


def main(args: Args) -> list[dict[str, Any]]:
    """Train and print; one row a mode and seed."""
    rows = []
    for mode in args.modes:
        for seed in args.seeds:
            rows.append({"mode": mode, "seed": seed, "steps": args.steps, "accuracy": run(mode, seed, args.steps)})
            print(f"{mode:9} seed {seed}: accuracy {rows[-1]['accuracy']:.3f} (without the rule at best {1 / RULES:.2f})", flush=True)
    if args.out is not None:
        write_json(args.out, {"rows": rows, **environment()})
    return rows


def run(mode: str, seed: int, steps: int) -> float:
    """Train one expert; returns the share of right answers on 1,024 fresh samples."""
    expert = {"mode": mode, "bottleneck": 16, "code_width": 64}
    model, processor = build(ModelSpec(language_expert=expert), seed=seed)
    size = processor.image_processor.size["height"]
    head = deafen(model)
    generator = torch.Generator().manual_seed(seed)
    trained = list(model.model.language_expert.parameters())  # pyright: ignore[reportOptionalMemberAccess]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        inputs, answers_B = samples(64, size, model.config.image_token_id, processor.tokens_per_image, generator)
        loss = F.cross_entropy(logits(model, head, inputs), answers_B)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        inputs, answers_B = samples(1024, size, model.config.image_token_id, processor.tokens_per_image, generator)
        return (logits(model, head, inputs).argmax(-1) == answers_B).float().mean().item()


def deafen(model: Any) -> Tensor:
    """Freeze everything but the language expert and silence attention; returns a fixed read-out of the last state, [SYMBOLS, D]."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_expert" in name)
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    width = model.config.get_text_config().hidden_size
    return torch.linalg.qr(torch.randn(width, SYMBOLS, generator=torch.Generator().manual_seed(0)))[0].T


def samples(count: int, size: int, image_token: int, tokens: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Noisy pictures [B, 3, H, W] in the rule's colour, ids [B, P + 1] (a picture, a symbol), and the answers [B]."""
    rules_B = torch.randint(RULES, (count,), generator=generator)
    symbols_B = torch.randint(SYMBOLS, (count,), generator=generator)
    pixels = PICTURES[rules_B][:, :, None, None] + torch.randn(count, 3, size, size, generator=generator)
    ids_BT = torch.cat([torch.full((count, tokens), image_token), 10 + symbols_B[:, None]], dim=1)
    return {"input_ids": ids_BT, "pixel_values": pixels}, (symbols_B + 2 * rules_B) % SYMBOLS


def logits(model: Any, head: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """[B, SYMBOLS], read at the symbol."""
    return model.model(**inputs).last_hidden_state[:, -1] @ head.T


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    main(tyro.cli(Args, args=arguments, description=__doc__))
