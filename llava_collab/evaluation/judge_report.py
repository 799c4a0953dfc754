"""Figures of a judge's verdicts: ratios with intervals, wins, and how much the judge minds the order of the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava_collab.evaluation.judge import ORDERS, last
from llava_collab.evaluation.records import Row
from llava_collab.evaluation.report import Table, by_category
from llava_collab.evaluation.statistics import bootstrap, ratio

ALL = "All"


def judge_table(rows: Sequence[Row], baseline: str, runs: Sequence[str]) -> Table:
    """One line a run and category, over the samples with a verdict in both orders.

    `ratio` is 100 x sum of the run's scores / sum of the baseline's, as in LLaVA-Bench; above 100 the run is better. `first - second`: how
    many points more the first place gets, whoever stands there; `turned`: samples whose better answer changes with the order.
    """
    pairs: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for (sample_id, run, order), row in last(rows).items():
        if row["status"] == "ok":
            pairs[run, sample_id][order] = row
    lines = []
    for run in runs:
        both = [orders for (name, _), orders in pairs.items() if name == run and len(orders) == len(ORDERS)]
        groups = by_category([orders[ORDERS[0]] for orders in both])
        names = [*groups, ALL] if len(groups) > 1 else list(groups)
        for name in names:
            chosen = [orders for orders in both if name in (ALL, orders[ORDERS[0]]["category"])]
            lines.append([f"{run}: {name}", *_cells(_scores(chosen))])
        if not both:
            lines.append([f"{run}: no sample with a verdict in both orders", "0", *["–"] * 6])
    header = [
        f"run against {baseline}",
        "n",
        "run",
        "baseline",
        "ratio % [95 %]",
        "better / worse / same",
        "first - second [95 %]",
        "turned",
    ]
    return Table(f"Judged against {baseline} (1 to 10, mean of both orders)", header, lines, [])


def _scores(pairs: Sequence[dict[str, Row]]) -> NDArray[np.float64]:
    """[n, order, 2]: baseline's and run's score."""
    return np.array([[[orders[order]["baseline_score"], orders[order]["score"]] for order in ORDERS] for orders in pairs])


def _cells(scores_NO2: NDArray[np.float64]) -> list[str]:
    base, run = scores_NO2.mean(axis=1).T
    share = ratio(100 * run, base)
    gains = scores_NO2[:, :, 1] - scores_NO2[:, :, 0]
    # The baseline stands first in order 0, the run in order 1: half of the difference of its gains is what the place is worth.
    place = bootstrap({"place": (gains[:, 1] - gains[:, 0]) / 2})["place"]
    better, worse = int((run > base).sum()), int((run < base).sum())
    turned = np.mean(np.sign(gains[:, 0]) != np.sign(gains[:, 1]))
    return [
        str(len(run)),
        f"{run.mean():.2f}",
        f"{base.mean():.2f}",
        f"{share.mean:.1f} [{share.low:.1f}, {share.high:.1f}]",
        f"{better} / {worse} / {len(run) - better - worse}",
        f"{place.mean:+.2f} [{place.low:+.2f}, {place.high:+.2f}]",
        f"{100 * turned:.0f} %",
    ]
