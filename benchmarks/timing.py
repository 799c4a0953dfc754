"""Timing ways of doing one thing in turn, in one process: what the speed programs share.

A GPU is timed with events around work that it alone does in between; a CPU by the clock and by its own seconds, which other programs on
the machine do not lengthen as much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def ratio_row(
    name: str, found: Mapping[str, list[Took]], over: str, under: str, device: torch.device, target: float | None
) -> dict[str, Any]:
    """A row of a result file. Off a GPU the name says so, and there is no target: targets are decided on one."""
    on_gpu, both = device.type == "cuda", ratio(found, over, under)
    row: dict[str, Any] = {"name": name if on_gpu else f"cpu: {name}", "value": round(both.wall, 3), "unit": "ratio", "better": "lower"}
    row |= {"target": target if on_gpu else None, "repeats": len(found[over])}
    row["milliseconds"] = [round(1000 * median(found[side]).wall, 2) for side in (over, under)]
    return row if on_gpu else row | {"cpu_time_ratio": round(both.cpu, 3)}


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Bars of ratios from top to bottom; 1 as a line, targets as marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["unit"] == "ratio"]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.34 * len(shown)), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [row["value"] for row in shown], color="#0072B2", height=0.6)
    for place, row in zip(places, shown, strict=True):
        axes.text(row["value"], place, f" {row['value']:.3g}", va="center", fontsize=8)
        if row.get("target") is not None:
            axes.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="#D55E00", linewidth=2)
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [row["name"] for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(row["value"] for row in shown))
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
