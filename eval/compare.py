"""What changed from one evaluation to another: settings, scores, and the samples behind the difference.

    python eval/compare.py runs/static/eval runs/hyper/eval
    python eval/compare.py docs/results/release/llava-0 docs/results/release/hyperllava-0 --top 3 --out runs/changed.csv

A is the first folder, B the second; a difference is B minus A. Intervals are paired bootstraps within a category. p is of the exact
McNemar test where every score is 0 or 100, else of a sign-flip permutation test; the table says which. Tables over many runs, with
seeds pooled: eval/table.py. To look at answers beside their pictures: eval/report.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llava_collab.evaluation import report
from llava_collab.evaluation.compare import Comparison, Pair
from llava_collab.evaluation.records import RecordError, Row
from llava_collab.files import write_text


@dataclass(frozen=True)
class Args:
    """Compare two evaluation folders (what eval/run.py wrote under --out), sample by sample."""

    a: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="A")]]
    """Evaluation folder to start from: run.json with records.jsonl (or records.jsonl.xz, as in docs/results)."""

    b: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="B")]]
    """Evaluation folder to compare with it."""

    top: int = 10
    """How many of the samples with the largest differences to show, with prompt, references, outputs and scores."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """Also write all samples that differ (in score, output or status, or asked in one run only) to this CSV file."""


def main(args: Args) -> None:
    """Compute, print, write. Raises RecordError for folders that can't be read or compared."""
    if args.top < 0:
        raise RecordError(f"--top {args.top}: how many samples to show, 0 or more")
    first, second = report.read_runs([args.a, args.b])
    print(f"A: {first.label}: {first.headline}\nB: {second.label}: {second.headline}\n")
    fields = report.settings_that_differ(first, second)
    print("Header fields that differ (A / B):" if fields else "No header field differs.", *(f"- {line}" for line in fields), sep="\n")
    comparison = Comparison(first, second)
    print("\n" + comparison.table().markdown())
    print("\np is not corrected for the number of lines: of twenty without any difference, one falls below 0.05 on average.")
    for letter, rows in (("A", comparison.only_first), ("B", comparison.only_second)):
        if rows:
            print(f"\n{len(rows)} samples are in {letter} only: {_some(rows)}")
    for pair in comparison.largest(args.top):
        print("\n" + _block(pair))
    if args.out is not None:
        text = comparison.csv_text()
        write_text(args.out, text)
        print(f"\n{sum(1 for _ in comparison.differing())} samples that differ: {args.out}")


def _some(rows: Sequence[Row], most: int = 5) -> str:
    names = ", ".join(row["sample_id"] for row in rows[:most])
    return names + (", ... (all with --out)" if len(rows) > most else "")


def _block(pair: Pair) -> str:
    a, b = pair
    head = f"{b['score'] - a['score']:+.1f}  {a['sample_id']}  ({a['category']}, {a.get('family', '')}, {a['metric']})"
    lines = [("prompt", a["prompt"])] + ([("prompt of B", b["prompt"])] if b["prompt"] != a["prompt"] else [])
    lines += [("references", " | ".join(a["references"])), (f"A {a['score']:.1f}", a["output"]), (f"B {b['score']:.1f}", b["output"])]
    return "\n".join([head, *(f"  {name:11} {_shown(text)}" for name, text in lines)])


def _shown(text: str) -> str:
    """An answer as it can be put on a terminal: control characters (a model may write escape sequences) as their codes."""
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return safe.replace("\n", "\n" + " " * 14)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except RecordError as error:
        sys.exit(f"error: {error}")
