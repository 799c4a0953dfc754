"""Curves of one run or several from their log.jsonl: loss, learning rates, gradient norms, experts, speed, data wait and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
SMOOTH = 25  # steps of the running mean beside the raw loss


def read_log(run: Path) -> list[Row]:
    """The rows of a run's log. Raises FileNotFoundError where there is none, ValueError where it is empty."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no log.jsonl: is it the run folder (run.out) of a training?")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    if not rows:
        raise ValueError(f"{path} is empty: the run has not finished a step yet.")
    return rows


def plot_runs(runs: Sequence[Path], path: Path) -> None:
    """Write all panels that the logs have figures for; one colour a run, one line style a series."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {run.name: read_log(run) for run in runs}
    panels = [panel for panel in PANELS if any(series(rows, panel[1]) for rows in logs.values())]
    columns = 2
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(12, 2.6 * lines), squeeze=False, sharex=True, layout="constrained")
    for axes, (title, read, scale) in zip(grid.flat, panels, strict=False):
        for colour, (name, rows) in zip(_cycle(COLOURS, len(logs)), logs.items(), strict=True):
            for style, (key, points) in zip(_cycle(("-", "--", ":", "-."), 99), series(rows, read).items(), strict=False):
                steps, values = zip(*points, strict=True)
                label = " ".join(part for part in (name if len(logs) > 1 else "", key) if part)
                raw = title == "loss" and len(values) > SMOOTH
                axes.plot(steps, values, style, color=colour, linewidth=0.6 if raw else 1.2, alpha=0.35 if raw else 1, label=label or None)
                if raw:
                    axes.plot(steps[SMOOTH - 1 :], running_mean(values), color=colour, linewidth=1.4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yscale(scale)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[len(panels) - columns : len(panels)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def series(rows: Sequence[Row], read: Callable[[Row], Any]) -> dict[str, list[tuple[int, float]]]:
    """`(step, value)` points by name: a number of a row has the name "", a mapping one for each key, a list `rank N`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value = read(row)
        if isinstance(value, list):
            value = {f"rank {rank}": own for rank, own in enumerate(value)}
        elif not isinstance(value, dict):
            value = {"": value}
        for key, own in value.items():
            if own is not None:
                found.setdefault(key, []).append((row["step"], own))
    return found


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each SMOOTH values in a row."""
    return [sum(values[k : k + SMOOTH]) / SMOOTH for k in range(len(values) - SMOOTH + 1)]


def _ratios(row: Row) -> dict[str, float]:
    return {name: own["output_ratio"] for name, own in row.get("experts", {}).items() if own.get("output_ratio")}


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[k % len(values)] for k in range(count)]


PANELS: tuple[tuple[str, Callable[[Row], Any], str], ...] = (
    ("loss", lambda row: row["loss"], "linear"),
    ("learning rate", lambda row: row["lr"], "linear"),
    ("gradient norm before clipping", lambda row: {k: v for k, v in row["grad_norm"].items() if v > 0}, "log"),
    ("experts: output over the layer beside", _ratios, "log"),
    ("tokens a second", lambda row: row["tokens_per_second"], "linear"),
    ("share of padding", lambda row: row["padding_share"], "linear"),
    ("seconds a step waits for data", lambda row: row.get("data_wait_seconds"), "linear"),
    ("memory, GiB", lambda row: row.get("memory_gib"), "linear"),
    ("MFU", lambda row: row.get("mfu"), "linear"),
)
