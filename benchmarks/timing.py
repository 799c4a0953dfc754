"""What the speed programs share: timing in turns, ratios of medians, and a plot of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


class Seconds(NamedTuple):
    """One measurement. On a CPU that others use as well, CPU seconds (of this process, all threads) are the ones to believe."""

    wall: float
    cpu: float


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, what: str = "") -> dict[str, list[Seconds]]:
    """Every run `repeats` times after one for warming up, in turns, the order reversed every other time."""
    found: dict[str, list[Seconds]] = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 1), desc=what, unit="round", leave=False):
        for name in list(runs)[:: 1 if repeat % 2 else -1]:
            seconds = timed(runs[name], device)
            if repeat:
                found[name].append(seconds)
    return found


def timed(run: Callable[[], Any], device: torch.device) -> Seconds:
    """One run, until the device has finished it."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(over: Sequence[Seconds], under: Sequence[Seconds], clock: str = "wall") -> float:
    """The median of the ratios of neighbouring measurements."""
    return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in zip(over, under, strict=True))


def ratio_row(name: str, over: Sequence[Seconds], under: Sequence[Seconds], device: torch.device, target: float | None) -> dict[str, Any]:
    """A row of a result file. Off a GPU the name says so, and there is no target: those are decided on one."""
    on_gpu = device.type == "cuda"
    row: dict[str, Any] = {"name": name if on_gpu else f"cpu: {name}", "value": round(ratio(over, under), 3), "unit": "ratio"}
    row |= {"better": "lower", "target": target if on_gpu else None, "repeats": len(over)}
    row["milliseconds"] = [round(1000 * statistics.median(s.wall for s in side), 2) for side in (over, under)]
    if not on_gpu:
        row["cpu_time_ratio"] = round(ratio(over, under, "cpu"), 3)
    return row


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Bars of ratios from top to bottom, 1 and the targets as lines."""
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
