"""One plot of a score table: a dot and its interval for each category and run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_collab.evaluation.report import Run, by_category
from llava_collab.evaluation.statistics import MACRO

# Okabe and Ito's palette: distinguishable with colour blindness and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def plot_scores(runs: Sequence[Run], path: Path) -> None:
    """Write a dot plot with 95 % intervals, categories from top to bottom, one colour and marker a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*by_category([row for run in runs for row in run.ok]), MACRO]
    figure, axes = plt.subplots(figsize=(8, 1.2 + len(names) * (0.25 + 0.16 * len(runs))), layout="constrained")
    for number, run in enumerate(runs):
        intervals = run.intervals()
        if set(names) - set(intervals):
            intervals.pop(MACRO, None)  # as in the table: no macro over other categories
        shown = [(at, intervals[name]) for at, name in enumerate(names) if name in intervals]
        offset = (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
        axes.errorbar(
            [value.mean for _, value in shown],
            [at + offset for at, _ in shown],
            xerr=[[max(0.0, v.mean - v.low) for _, v in shown], [max(0.0, v.high - v.mean) for _, v in shown]],
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            capsize=2,
            markersize=5,
            label=run.label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(-1.5, 101.5)  # room for markers at the ends
    axes.set_xlabel("score, 0 to 100 (bars: 95 % bootstrap interval)")
    axes.axhline(len(names) - 1.5, color="0.6", linewidth=0.8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(3, len(runs)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
