"""How fast a run is and what it waits for: tokens and samples a second, MFU, and each rank's data wait and memory.

MFU, the share of the devices' arithmetic that the model needs (Chowdhery et al. 2022, PaLM, appendix B): FLOPs / (seconds x ranks x peak).

    FLOPs of a step = positions x (2 + 2 + 2 t) N_llm + 3 x 4 T^2 width blocks rows + patches x (2 or 6) N_tower, N = parameters that
    multiply what runs through them; t = 1 where the part learns whole, the adapters' share of it where they do, 0 where it is frozen

The embedding looks up and does not multiply; a tied head does. Padding counts (it is computed), recomputation by gradient checkpointing
does not (the model does not need it). Generators and projector are counted as the language model is, by images and rows.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from llava_collab.training.components import component_of
from llava_collab.training.recipe import Recipe
from llava_collab.training.step import Counts

PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A6000": 155, "4090": 165}
"""Dense bf16 peaks of the vendor's data sheets, by a part of the device's name; the first that fits counts."""


class Meter:
    """Measures steps; one on every rank, read together."""

    def __init__(self, model: Any, recipe: Recipe, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.peak = recipe.run.peak_tflops or known_peak(accelerator.device)
        self._costs = costs(model, cached=recipe.data.feature_cache)
        self._began = time.perf_counter()
        self._waited = 0.0

    def start(self) -> None:
        """The first step begins now."""
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around reading data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def read(self, counts: Counts) -> dict[str, Any]:
        """Figures since the last reading (a step), for the log; all ranks call it."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        own = torch.tensor([self._waited, memory_bytes(self.accelerator.device) / 2**30], dtype=torch.float64)
        self._waited = 0.0
        ranks = [own]
        if self.accelerator.num_processes > 1:
            own = own.float().to(self.accelerator.device)
            gathered = [torch.empty_like(own) for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather(gathered, own)
            ranks = [rank.cpu() for rank in gathered]
        flops = sum(getattr(counts, unit) * cost for unit, cost in self._costs.items())
        row: dict[str, Any] = {
            "tokens_per_second": counts.tokens / seconds,
            "samples_per_second": counts.samples / seconds,
            "seconds": seconds,
            "data_wait_seconds": [round(float(rank[0]), 4) for rank in ranks],
            "memory_gib": [round(float(rank[1]), 3) for rank in ranks],
            "tflops_per_second": flops / seconds / 1e12,
        }
        if self.peak is not None:
            row["mfu"] = flops / seconds / (self.peak * 1e12 * self.accelerator.num_processes)
        return row


def costs(model: nn.Module, cached: bool) -> dict[str, float]:
    """Training FLOPs for each unit that a step counts: positions, squared row lengths, images (see the top of this file)."""
    config: Any = model.config
    text = config.get_text_config()
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    tied = any(p is embedding for name, p in model.named_parameters(remove_duplicate=False) if name.endswith("lm_head.weight"))
    found = {"positions": 0.0, "images": 0.0, "samples": 0.0, "squares": 12.0 * text.hidden_size * text.num_hidden_layers}
    patches = config.image_seq_length
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (parameter is embedding and not tied):
            continue
        packed = 2 if type(parameter).__name__ == "Params4bit" else 1  # weights a byte
        cost = (4 + 2 * parameter.requires_grad) * packed * parameter.numel()
        match component_of(name):
            case "llm" | "adapter":
                found["positions"] += cost
            case "projector":
                found["images"] += cost * patches
            case "vision_tower" if not cached:  # nothing behind a frozen tower asks for a gradient
                found["images"] += (6 if parameter.requires_grad else 2) * parameter.numel() * patches
            case "visual_expert":
                found["images"] += cost
            case "language_expert":
                found["samples"] += cost
    return found


def known_peak(device: torch.device) -> float | None:
    """Peak TFLOP/s of a CUDA device whose data sheet is known; else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def memory_bytes(device: torch.device) -> int:
    """The most this process has held: on the device, or on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
