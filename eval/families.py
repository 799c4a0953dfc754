"""Per family of a suite: is it a fair question? Chance, blind guessers, oracle, and any further run, from their record folders.

    python eval/families.py --blind runs/blind --oracle runs/oracle --others runs/majority runs/ocr runs/hyper --out runs/families

A family is valid if the oracle reaches 95 and the blind guesser stays within chance + 5, apart from sampling noise: the lower end of
its 95 % interval decides. Families that are not valid are marked, and the exit status is 1. Folders are what eval/run.py wrote (`--model
blind`, `--model oracle`, ...), all of the same samples. Without --oracle (texts have none, and nothing to be blind to) families are
tabulated and not judged.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from llava_collab.evaluation import report
from llava_collab.evaluation.records import RecordError
from llava_collab.evaluation.statistics import bootstrap
from llava_collab.evaluation.suite import SuiteError, load_suite
from llava_collab.files import write_text

MARGIN, LEAST = 5.0, 95.0


@dataclass(frozen=True)
class Args:
    """Tabulate baselines and models by question family, and judge the families."""

    blind: Path
    """Records of the blind guesser."""
    out: Path
    """Folder for families.md and families.csv."""
    oracle: Path | None = None
    """Records of the oracle."""
    others: tuple[Path, ...] = ()
    """Further runs to show beside them."""
    suite: Path = Path("eval/suites/cmt-open.yaml")
    """The suite that they ran."""
    data_root: Path | None = None
    """Folder of the data, in place of the suite's own."""


def main(args: Args) -> list[str]:
    """Print and write the table; returns the families that are not valid. Raises RecordError and SuiteError."""
    runs = report.read_runs([args.blind, *([args.oracle] if args.oracle else []), *args.others])
    if bad := [run.label for run in runs if run.errors or len(run.rows) < run.asked or run.identity["items"] != runs[0].identity["items"]]:
        raise RecordError(f"{', '.join(bad)}: errors, missing answers or other items; a family's mean would leave out what failed")
    split = str(runs[0].identity["split"])
    chance = {
        s.id: 100 / len(s.meta["choices"]) if s.meta.get("choices") else 0.0 for s in load_suite(args.suite).read(split, args.data_root)
    }
    scores: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(lambda: [{} for _ in runs])
    for number, run in enumerate(runs):
        for row in run.ok:
            scores[row["category"], row["family"]][number][row["sample_id"]] = row["score"]
    lines, invalid = [], []
    order = {name: i for i, name in enumerate(report.CATEGORIES)}
    for (category, family), found in sorted(scores.items(), key=lambda item: (order.get(item[0][0], 99), item[0])):
        if unknown := found[0].keys() - chance.keys():
            raise RecordError(
                f"{args.blind}: {sorted(unknown)[0]!r} is not in split {split} of {args.suite}; name its folder with --data-root"
            )
        guess = float(np.mean([chance[sample_id] for sample_id in found[0]]))
        intervals = [bootstrap({family: np.array(list(by_id.values()))})[family] if by_id else None for by_id in found]
        cells = [f"{one.mean:.1f} ± {one.half_width:.1f}" if one else "–" for one in intervals]
        lines.append([category, family, str(len(found[0])), f"{guess:.1f}", *cells])
        if args.oracle:
            blind, oracle = intervals[:2]
            # Sampling noise may lift a fair family above the line: the interval's lower end decides.
            valid = blind is not None and oracle is not None and blind.low <= guess + MARGIN and oracle.mean >= LEAST
            invalid += [] if valid else [family]
            lines[-1].append("yes" if valid else "**no**")
    header = ["category", "family", "items", "chance", *(run.label for run in runs), *(["valid"] if args.oracle else [])]
    rows = [header, ["---", "---", *["---:"] * (len(header) - 2)], *lines]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    print(text)
    write_text(args.out / "families.md", text)
    write_text(args.out / "families.csv", "\n".join(",".join(row) for row in [header, *lines]) + "\n")
    return invalid


if __name__ == "__main__":
    try:
        bad = main(tyro.cli(Args, description=__doc__))
    except (RecordError, SuiteError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if bad:
        sys.exit(f"error: not valid: {', '.join(bad)}")
