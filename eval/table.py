"""Print the score table of one or more evaluation folders, and write it as Markdown, CSV, LaTeX and a plot.

    python eval/table.py runs/static/eval runs/hyper/eval --out runs/table --compare runs/static/eval runs/hyper/eval

Every figure is computed from the folders' records.jsonl. "detectable" is the true difference that would have been found with 80 % power.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llava_collab.evaluation import report
from llava_collab.evaluation.plot import plot_scores
from llava_collab.evaluation.records import RecordError
from llava_collab.files import write_text


@dataclass(frozen=True)
class Args:
    """Make one table of several evaluation folders (what eval/run.py wrote under --out)."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Evaluation folders, each with records.jsonl and run.json; one line of the table each, in this order."""

    out: Path
    """Folder for table.md, table.csv, table.tex and scores.png."""

    pool_seeds: bool = False
    """Folders of one model name are seeds of one model: one line, mean scores, intervals over items and seeds."""

    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BASELINE MODEL [MODEL ...]")] = ()
    """Also print paired differences of each MODEL from the BASELINE, over the samples that both answered. Folders or labels."""


def main(args: Args) -> None:
    """Compute, print, write. Raises RecordError for folders that can't be read or compared."""
    runs = report.read_runs(args.runs)
    names = {str(folder): run for folder, run in zip(args.runs, runs, strict=True)}
    if args.pool_seeds:
        runs = report.pools(runs)
        names = {}
    names |= {run.label: run for run in runs}
    tables = [report.score_table(runs)] if args.pool_seeds else [report.score_table(runs), report.beside_table(runs)]
    parts = [table.markdown() for table in tables]
    if args.compare:
        baseline, *others = [_find(name, names) for name in args.compare]
        if not others:
            raise RecordError("--compare needs a baseline and at least one other run")
        tables.append(report.difference_table(baseline, others))
        parts.append(tables[-1].markdown())
        for other in others:
            fields = report.settings_that_differ(baseline, other)
            parts.append(f"Header fields of {baseline.label} / {other.label} that differ:\n\n" + "\n".join(f"- {line}" for line in fields))
    parts.insert(0, "\n".join(f"- {run.label}: {run.headline}" for run in runs))
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_text(args.out / "table.md", text)
    write_text(args.out / "table.csv", report.csv_text(tables))
    write_text(args.out / "table.tex", "\n".join(table.latex() for table in tables))
    plot_scores(runs, args.out / "scores.png")


def _find(name: str, names: dict[str, report.Run]) -> report.Run:
    if name not in names:
        raise RecordError(f"--compare {name}: no such run; there are {', '.join(names)}")
    return names[name]


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except RecordError as error:
        sys.exit(f"error: {error}")
