"""Make a page to look at answers in: pictures, prompts, answers, references and scores of one or more evaluation folders.

    python eval/report.py runs/static/eval runs/hyper/eval --out runs/report
    xdg-open runs/report/index.html

The folder can be copied and opened anywhere, from disk, without a network. What you filter stands in the page's address, so that a
view can be sent to somebody. Records hold no pictures: they are looked up in the suite's data set, which has to be on this machine
(--data-root); where it is not, the page has placeholders. Killed? Run the same command again: thumbnails are kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from llava_collab.data.conversation import SampleError
from llava_collab.evaluation.html import INDEX, Written, write_report
from llava_collab.evaluation.lookup import read_measured
from llava_collab.evaluation.records import RecordError
from llava_collab.evaluation.report import read_runs
from llava_collab.evaluation.suite import SuiteError


@dataclass(frozen=True)
class Args:
    """Write a self-contained HTML report of evaluation folders (what eval/run.py wrote under --out)."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Evaluation folders of one suite and split; the first is the baseline of paired differences."""

    out: Path
    """Folder for index.html and images/."""

    suite: Path | None = None
    """Suite file that names the data (default: that of the runs' headers, from eval/suites)."""

    data_root: Path | None = None
    """Folder of the data, in place of the suite's own."""

    title: str | None = None
    """Title of the page (default: the labels of the runs)."""

    thumbnail_side: int = 256
    """Longer side of a thumbnail, in pixels. About 10 KB a picture at 256."""


def main(args: Args) -> Written:
    """Write and print what was written. Raises RecordError, SuiteError or SampleError with the cure."""
    if not args.runs:
        raise RecordError("name at least one evaluation folder (what eval/run.py wrote under --out)")
    if not 16 <= args.thumbnail_side <= 2048:
        raise RecordError(f"--thumbnail-side {args.thumbnail_side}: has to be from 16 to 2048 pixels")
    runs = read_runs(args.runs)
    notes: list[str] = []
    try:
        samples = read_measured(runs, Path(__file__).parent / "suites", args.suite, args.data_root)
    except FileNotFoundError as error:  # the answers can be read without their pictures
        samples, notes = [], ["The data set was not found when this page was made (eval/report.py --data-root names its folder)."]
        print(f"warning: no pictures: {error}", file=sys.stderr)
    title = args.title or ", ".join(run.label for run in runs)
    written = write_report(runs, samples, args.out, title=title, notes=notes, side=args.thumbnail_side)
    print(f"{args.out / INDEX}: {written}")
    return written


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (RecordError, SuiteError, SampleError) as error:
        sys.exit(f"error: {error}")
