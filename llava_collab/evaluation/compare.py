"""What changed between two runs: paired differences with intervals and tests, and the samples behind them."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llava_collab.evaluation.report import Row, Run, Table, by_category, differences, matched
from llava_collab.evaluation.statistics import MACRO, Interval, bootstrap, mcnemar, sign_flip

Pair = tuple[Row, Row]
COLUMNS: tuple[str, ...] = ("sample_id", "category", "family", "change", "difference", "score_a", "score_b", "prompt", "references")
COLUMNS += ("output_a", "output_b", "error_a", "error_b", "prompt_b")


@dataclass(frozen=True)
class Change:
    """Second minus first over the samples of one group: scores 0..100, how many rose, fell and stayed, and a paired test's p."""

    first: float
    second: float
    difference: Interval
    better: int
    worse: int
    p: float
    test: str

    @property
    def same(self) -> int:
        return self.difference.n - self.better - self.worse


@dataclass(frozen=True)
class Comparison:
    """Two runs, sample by sample; `pairs` are the rows of the samples that both answered.

    Raises RecordError where they have no answered sample in common, or score one differently.
    """

    first: Run
    second: Run

    @cached_property
    def pairs(self) -> list[Pair]:
        return matched(self.first, self.second)

    @cached_property
    def categories(self) -> dict[str, Change]:
        """Per category in the order of CMT, and their mean under `MACRO`."""
        groups = self._groups(lambda row: row["category"])
        groups = {name: groups[name] for name in by_category([b for _, b in self.pairs])}
        changes = _changes(groups)
        if len(changes) > 1:
            every = list(changes.values())
            # The macro-average is a weighted sum over items, so its test flips the items' signs with these weights.
            terms = np.concatenate([differences(pairs)[0] / len(pairs) / len(groups) for pairs in groups.values()])
            changes[MACRO] = Change(
                float(np.mean([change.first for change in every])),
                float(np.mean([change.second for change in every])),
                bootstrap({name: differences(pairs) for name, pairs in groups.items()})[MACRO],
                sum(change.better for change in every),
                sum(change.worse for change in every),
                sign_flip(terms),
                "sign flips",
            )
        return changes

    def families(self, category: str) -> dict[str, Change]:
        """Per family of one category, by name; {} where there is one only."""
        groups = self._groups(lambda row: row.get("family", ""), category)
        return _changes(dict(sorted(groups.items()))) if len(groups) > 1 else {}

    def _groups(self, key: Callable[[Row], str], category: str | None = None) -> dict[str, list[Pair]]:
        groups: dict[str, list[Pair]] = defaultdict(list)
        for a, b in self.pairs:
            if category in (None, b["category"]):
                groups[key(b)].append((a, b))
        return groups

    @cached_property
    def only_first(self) -> list[Row]:
        """Rows of samples that the second run was not asked, or has not come to."""
        return _without(self.first.rows, self.second.rows)

    @cached_property
    def only_second(self) -> list[Row]:
        return _without(self.second.rows, self.first.rows)

    def largest(self, count: int) -> list[Pair]:
        """The samples whose score changed most, either way; equal changes by id."""
        changed = [(a, b) for a, b in self.pairs if a["score"] != b["score"]]
        return sorted(changed, key=lambda pair: (-abs(pair[1]["score"] - pair[0]["score"]), pair[0]["sample_id"]))[:count]

    def differing(self) -> Iterator[tuple[str, Row | None, Row | None]]:
        """Every sample that is not alike in both: what changed from first to second, and the two rows (None: not asked)."""
        theirs = {row["sample_id"]: row for row in self.second.rows}
        for a in self.first.rows:
            b = theirs.get(a["sample_id"])
            if b is not None and (change := _change(a, b)):
                yield change, a, b
        yield from (("only in A", a, None) for a in self.only_first)
        yield from (("only in B", None, b) for b in self.only_second)

    def table(self) -> Table:
        """One line a category and family; scores 0..100, the difference with its 95 % interval, counts, and the test's p."""
        lines = []
        for category, change in self.categories.items():
            lines.append(_line(category, change))
            if category != MACRO:
                lines += [_line(f"· {family or '(no family)'}", of) for family, of in self.families(category).items()]
        header = ["B - A", "A", "B", "difference [95 %]", "better", "worse", "same", "p", "test"]
        return Table(f"{self.second.label} (B) minus {self.first.label} (A), samples that both answered", header, lines, [])

    def csv_text(self) -> str:
        """All differing samples, one line each; references as a JSON list. `prompt_b` is given where the two were asked differently."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for change, a, b in self.differing():
            one = a or b or {}
            line = {name: one.get(name, "") for name in ("sample_id", "category", "family", "prompt")}
            line |= {"change": change, "references": json.dumps(one["references"], ensure_ascii=False)}
            for letter, row in (("a", a), ("b", b)):
                line |= {f"{name}_{letter}": row[name] for name in ("score", "output", "error")} if row else {}
            if a and b:
                line["prompt_b"] = b["prompt"] if a["prompt"] != b["prompt"] else ""
                line["difference"] = "" if None in (a["score"], b["score"]) else round(b["score"] - a["score"], 4)
            writer.writerow(line)
        return text.getvalue()


def _without(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    known = {row["sample_id"] for row in others}
    return [row for row in rows if row["sample_id"] not in known]


def _change(a: Row, b: Row) -> str | None:
    failed = [letter for letter, row in (("A", a), ("B", b)) if row["status"] != "ok"]
    if failed:
        return None if len(failed) == 2 and a["error"] == b["error"] else f"error in {' and '.join(failed)}"
    if a["score"] != b["score"]:
        return "better" if b["score"] > a["score"] else "worse"
    return "same score" if a["output"] != b["output"] else None


def _changes(groups: dict[str, list[Pair]]) -> dict[str, Change]:
    intervals = bootstrap({name: differences(pairs) for name, pairs in groups.items()})
    return {name: _of(pairs, intervals[name]) for name, pairs in groups.items()}


def _of(pairs: Sequence[Pair], interval: Interval) -> Change:
    scores = np.array([[a["score"], b["score"]] for a, b in pairs], dtype=np.float64)
    steps: NDArray[np.float64] = scores[:, 1] - scores[:, 0]
    better, worse = int((steps > 0).sum()), int((steps < 0).sum())
    exact = bool(np.isin(scores, (0, 100)).all())
    p, test = (mcnemar(better, worse), "exact McNemar") if exact else (sign_flip(steps), "sign flips")
    return Change(float(scores[:, 0].mean()), float(scores[:, 1].mean()), interval, better, worse, p, test)


def _line(name: str, change: Change) -> list[str]:
    d = change.difference
    cells = [f"{change.first:.1f}", f"{change.second:.1f}", f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"]
    cells += [str(change.better), str(change.worse), str(change.same), f"{change.p:.3f}" if change.p >= 0.001 else "<0.001", change.test]
    return [name, *cells]
