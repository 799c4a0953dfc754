"""Can the print in CMT-open's pictures be read? An OCR engine tries every stated text, at the resolution that models see.

    pip install -e '.[ocr]'
    python eval/legibility.py --data-root data/cmt-open --split test --out docs/results/cmt-open

Counts a text as read where it is, case and spaces aside, a run of whole words or lines that the engine found in the picture. Writes
legibility.json and a table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from llava_collab.data.samples import read_samples
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.reading import read_lines
from llava_collab.files import write_json, write_text

BANDS = ((0, 13), (14, 15), (16, 19), (20, 29), (30, 59), (60, 1000))
LEAST = 0.9


@dataclass(frozen=True)
class Args:
    """Read the print of a split by OCR, and count by size."""

    out: Path
    """Folder for legibility.json and legibility.md."""
    data_root: Path = Path("data/cmt-open")
    """A build of CMT-open, second edition."""
    split: str = "test"
    """Its split."""


def main(args: Args) -> float:
    """Print and write the table; returns the share that was read. Raises FileNotFoundError, SampleError and ModuleNotFoundError."""
    asked: Counter[tuple[str, tuple[int, int]]] = Counter()
    read: Counter[tuple[str, tuple[int, int]]] = Counter()
    unread = []
    printed = {
        image: (sample.family, truth["text"])
        for sample in read_samples(args.data_root / f"{args.split}.jsonl")
        for image, truth in zip(sample.images, sample.meta["truth"], strict=True)
        if isinstance(truth.get("text"), list)
    }
    for image, (family, texts) in tqdm(printed.items(), unit="picture"):
        found = _runs([line.text for line in read_lines(image)])
        for text, size in texts:
            key = (family, next(band for band in BANDS if band[0] <= size <= band[1]))
            asked[key] += 1
            if _plain(text) in found:
                read[key] += 1
            else:
                unread.append([image.name, text, size])
    rows = [("print", "texts", "read")]
    for band in BANDS:
        rows.append((f"{band[0]} to {band[1]} px", *_counts(asked, read, lambda key, band=band: key[1] == band)))
    for family in sorted({family for family, _ in asked}):
        rows.append((f"`{family}`", *_counts(asked, read, lambda key, family=family: key[0] == family)))
    share = read.total() / max(1, asked.total())
    rows.append(("all", str(asked.total()), f"{share:.1%}"))
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---", "---:", "---:"), *rows[1:]]) + "\n"
    print(table)
    write_text(args.out / "legibility.md", table)
    write_json(args.out / "legibility.json", {"split": args.split, "share": share, "unread": unread, "environment": environment()})
    return share


def _runs(lines: Sequence[str]) -> set[str]:
    """Every run of neighbouring words in a line, and of neighbouring lines: a name may take two, but 40 is not read in 140."""
    spans = [*(line.split() for line in lines), list(lines)]
    return {_plain("".join(span[i:j])) for span in spans for i in range(len(span)) for j in range(i + 1, len(span) + 1)}


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _counts(asked: Counter, read: Counter, wanted) -> tuple[str, str]:  # noqa: ANN001
    total = sum(count for key, count in asked.items() if wanted(key))
    return str(total), f"{sum(count for key, count in read.items() if wanted(key)) / total:.1%}" if total else "–"


if __name__ == "__main__":
    try:
        found = main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    if found < LEAST:
        sys.exit(f"error: only {found:.1%} of the print was read, less than {LEAST:.0%}")
