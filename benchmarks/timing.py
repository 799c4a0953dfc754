"""Timing two ways of doing one thing in turn, in one process: what `hyperllava.py` and `growth.py` share.

A GPU is timed with events around work that it alone does in between; a CPU by the clock and by its own seconds, which other programs on
the machine do not lengthen as much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

Work = Callable[[], object]


@dataclass(frozen=True)
class Took:
    """Seconds of one piece of work."""

    wall: float
    cpu: float
    """CPU seconds of this process, all threads."""


def timed(work: Work, device: torch.device) -> Took:
    """Run it once; nothing that was asked for before is still running when it starts, nor it when this returns."""
    cpu = time.process_time()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return Took(time.perf_counter() - start, time.process_time() - cpu)
    torch.cuda.synchronize(device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return Took(first.elapsed_time(last) / 1000, time.process_time() - cpu)


def alternate(ways: Mapping[str, Work], rounds: int, warm_up: int, device: torch.device, label: str) -> dict[str, list[Took]]:
    """Each way once a round, in an order that turns from round to round; the first `warm_up` rounds do not count."""
    found: dict[str, list[Took]] = {name: [] for name in ways}
    for number in tqdm(range(-warm_up, rounds), desc=label, unit="round", leave=False):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            took = timed(ways[name], device)
            if number >= 0:
                found[name].append(took)
    return found


def ratio(found: Mapping[str, list[Took]], over: str, under: str) -> Took:
    """Median over rounds of one way's seconds over another's in the same round."""
    pairs = list(zip(found[over], found[under], strict=True))
    return Took(statistics.median(a.wall / b.wall for a, b in pairs), statistics.median(a.cpu / b.cpu for a, b in pairs))


def median(took: list[Took]) -> Took:
    """Median seconds of each kind."""
    return Took(statistics.median(t.wall for t in took), statistics.median(t.cpu for t in took))
