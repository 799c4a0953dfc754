"""One optimiser step's gradient: micro-batches, ranks, and a loss that divides by the global count of supervised tokens.

Averaging each micro-batch by its own count would weigh a token by how few supervised neighbours it happens to have; here every
supervised token of the step counts the same, however the step is cut into micro-batches and over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llava_collab.training.components import Named

if TYPE_CHECKING:
    from llava_collab.training.engines import DataParallel

Batch = dict[str, Any]
_BUCKET = 32_000_000  # elements reduced at once


class EmptyStepError(RuntimeError):
    """No sample of a step has a supervised token, so there is nothing to learn from."""


@dataclass(frozen=True)
class Counts:
    """What one optimiser step holds, over all ranks and micro-batches."""

    supervised: int = 0
    tokens: int = 0
    positions: int = 0
    samples: int = 0
    images: int = 0
    squares: int = 0
    """Squared row lengths, for the arithmetic of attention."""
    stop: int = 0
    """Ranks that were asked to stop (rides along so that all ranks stop at the same step)."""


def count(micro_batches: Sequence[Batch], accelerator: Accelerator, stop: bool = False) -> Counts:
    """Counts of a step, summed over ranks. Supervised tokens are those that the shifted loss sees (a label at position 0 is not).
    Idle rows, the last of a batch, do not count.

    Raises EmptyStepError, on all ranks, where there are none.
    """
    totals = torch.zeros(len(fields(Counts)), dtype=torch.int64)
    for batch in micro_batches:
        images = next((batch[key].shape[0] for key in ("pixel_values", "image_features") if batch.get(key) is not None), 0)
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        idle = batch.get("idle_rows", 0)
        rows, columns = batch["input_ids"].shape[0] - idle, batch["input_ids"].shape[1]
        if idle:  # which may be the longest
            columns = int(batch["attention_mask"][:rows].sum(1).max())
        tokens = int(batch["attention_mask"][:rows].sum())
        samples = int(batch["segment_ids"][:rows].amax(1).sum()) if "segment_ids" in batch else rows
        totals += torch.tensor([supervised, tokens, rows * columns, samples, images - min(idle, images), rows * columns**2, 0])
    totals[-1] = int(stop)
    counts = Counts(*_sum(totals, accelerator).tolist())
    if counts.supervised == 0:
        ids = ", ".join(str(i) for batch in micro_batches for i in batch.get("sample_ids", ()))
        raise EmptyStepError(f"a step without any supervised token; its samples on this rank: {ids or 'none'}. Check their labels.")
    return counts


def level(micro_batches: Sequence[Batch], idle: Batch | None, accelerator: Accelerator) -> list[Batch]:
    """As many micro-batches as the rank with most has, idle ones added; without `idle` as they are (ranks need not keep step)."""
    if idle is None:
        return list(micro_batches)
    most = torch.tensor([len(micro_batches)], device=accelerator.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return [*micro_batches, *[idle] * (int(most) - len(micro_batches))]


def accumulate(engine: DataParallel, micro_batches: Sequence[Batch], supervised: int) -> list[Tensor]:
    """Forward and backward of this rank's micro-batches; returns their losses (detached, each already divided by `supervised`).

    The losses of all micro-batches and ranks add up to the step's loss, and so do the gradients: nothing is averaged.
    """
    losses = []
    for number, batch in enumerate(micro_batches, start=1):
        inputs = {key: value.to(engine.accelerator.device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
        loss = engine.forward(**inputs, num_items_in_batch=supervised, supervised_logits_only=True, use_cache=False)
        engine.backward(loss, last=number == len(micro_batches))
        losses.append(loss.detach())
    return losses


def reduce_gradients(trainable: Named, accelerator: Accelerator) -> set[str]:
    """Sum gradients over ranks; returns the names that got a gradient on no rank (their `.grad` stays None).

    A rank whose share had no use for a parameter (no image, say) contributes zeros, so ranks can't wait for each other forever.
    """
    present = torch.tensor([parameter.grad is not None for parameter in trainable.values()], dtype=torch.int64)
    anywhere = _sum(present, accelerator).tolist()
    missing = {name for name, ranks in zip(trainable, anywhere, strict=True) if not ranks}
    if accelerator.num_processes > 1:
        for parameters in _buckets([p for name, p in trainable.items() if name not in missing]):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)
            for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return missing


def total_loss(losses: Sequence[Tensor], accelerator: Accelerator) -> float:
    """The step's loss: the sum over micro-batches and ranks."""
    own = torch.stack([loss.double() for loss in losses]).sum().cpu() if losses else torch.zeros((), dtype=torch.float64)
    return float(_sum(own.reshape(1), accelerator))


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size + parameter.numel() > _BUCKET and buckets[-1]:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return [bucket for bucket in buckets if bucket]


def _sum(value: Tensor, accelerator: Accelerator) -> Tensor:
    if accelerator.num_processes > 1:
        value = value.to(accelerator.device)
        torch.distributed.all_reduce(value)
    return value.cpu()
