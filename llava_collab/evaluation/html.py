"""A folder to look at answers in: `index.html` with every prompt, picture, answer and score of some runs; no network, no server.

Answers are a model's output and may hold anything. The page's script writes them as text nodes only; the data stand in it as JSON in
which no character can end the script block; and a content security policy allows the page's own script and style, by hash, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from llava_collab.data.conversation import IMAGE_MARK, SampleError
from llava_collab.data.images import resolve_image, shrunk
from llava_collab.data.samples import Sample
from llava_collab.evaluation.lookup import is_of
from llava_collab.evaluation.records import RecordError, Row, differing
from llava_collab.evaluation.report import Run, difference_table, score_table
from llava_collab.files import sha256, write_bytes, write_text

INDEX = "index.html"
Picture = tuple[str, int, int]
"""Path below the report's folder, width and height in pixels."""


@dataclass(frozen=True)
class Written:
    """What a report shows. `missing` counts pictures that were asked about and can't be shown."""

    items: int
    pictures: int
    missing: int

    def __str__(self) -> str:
        return f"{self.items} items, {self.pictures} pictures" + (f", {self.missing} pictures missing" if self.missing else "")


def write_report(
    runs: Sequence[Run], samples: Sequence[Sample], out: Path, *, title: str, notes: Sequence[str] = (), side: int = 256
) -> Written:
    """Write `out/index.html` and `out/images/`: thumbnails of at most `side` x `side` pixels, each kept once, by its content.

    `samples` are where pictures are found again (by id; a sample that asks something else than the record did is not used). Thumbnails
    that are there already are kept, so that a report that was stopped goes on. Raises RecordError for runs that can't share a table.
    """
    thumbnails = _Thumbnails(out, side)
    known = {sample.id: sample for sample in samples}
    items = _items(runs)
    listed = [_item(rows, known, thumbnails) for rows in tqdm(items.values(), desc="report", unit="item")]
    data = {
        "title": title,
        "runs": [_about(run) for run in runs],
        "scores": _scores(runs),
        "differences": _differences(runs),
        "settings": _settings(runs),
        "notes": [*notes, *([f"{thumbnails.missing} pictures are missing."] if thumbnails.missing else [])],
        "items": listed,
    }
    write_text(out / INDEX, render(data))
    return Written(len(listed), thumbnails.shown, thumbnails.missing)


def render(data: Mapping[str, Any]) -> str:
    """The page with its data."""
    page = resources.files(__package__ or "").joinpath("report.html").read_text(encoding="utf-8")
    allowed = {kind: _hash(page, kind) for kind in ("script", "style")}
    policy = "; ".join(
        ["default-src 'none'", "img-src 'self' file: data:", *(f"{kind}-src {value}" for kind, value in allowed.items()), "base-uri 'none'"]
    )
    return page.replace("{{policy}}", policy).replace("{{data}}", embedded(data))


def embedded(value: Any) -> str:
    """`value` as JSON that can stand inside <script>: ASCII, so that U+2028 and lone surrogates are escapes, and without < > &."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _hash(page: str, kind: str) -> str:
    """The CSP source of the one inline <script> or <style> of the page: the hash of the very text between its tags."""
    (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class _Thumbnails:
    """Small copies of pictures in `out/images`, by the SHA-256 of the picture's file; counts what is shown and what is missing."""

    def __init__(self, out: Path, side: int) -> None:
        self.out, self.side = out, side
        self.shown = self.missing = 0
        self._made: dict[Path, Picture | None] = {}

    def __call__(self, sample: Sample | None, expected: int) -> list[Picture | None]:
        """The sample's pictures; None for each of those `expected` that can't be shown."""
        found: list[Picture | None] = [None] * expected if sample is None else [self._one(path) for path in sample.images]
        self.shown += sum(picture is not None for picture in found)
        self.missing += sum(picture is None for picture in found)
        return found

    def _one(self, path: Path) -> Picture | None:
        if path not in self._made:
            try:
                self._made[path] = self._make(path)
            except (SampleError, OSError):  # counted above, and a placeholder on the page
                self._made[path] = None
        return self._made[path]

    def _make(self, path: Path) -> Picture:
        name = f"images/{sha256(resolve_image(path) or path)[:20]}-{self.side}.webp"
        try:
            with Image.open(self.out / name) as image:
                return name, *image.size
        except OSError:
            content, size = shrunk(path, self.side, "WEBP")
            write_bytes(self.out / name, content, durable=False)
            return name, *size


def _items(runs: Sequence[Run]) -> dict[str, list[Row | None]]:
    """Rows of each sample, one a run (None: not asked), in the order in which samples first come."""
    items: dict[str, list[Row | None]] = defaultdict(lambda: [None] * len(runs))
    for number, run in enumerate(runs):
        for row in run.rows:
            items[row["sample_id"]][number] = row
    return items


def _item(rows: Sequence[Row | None], known: Mapping[str, Sample], thumbnails: _Thumbnails) -> dict[str, Any]:
    """One item as the page's script reads it. What all runs share stands once; an answer names only what it has otherwise."""
    first = max((row for row in rows if row is not None), key=lambda row: row["prompt"].count(IMAGE_MARK))  # a blind run has none
    expected = first["prompt"].count(IMAGE_MARK)
    sample = known.get(first["sample_id"])
    pictures = thumbnails(sample if sample is not None and is_of(first, sample) else None, expected)
    shared = {"prompt": first["prompt"], "references": first["references"], "metric": first["metric"]}

    def answer(row: Row) -> dict[str, Any]:
        own = {name: row[name] for name in ("output", "score", "status", "error", "scores")}
        own |= {name: row[name] for name, value in shared.items() if row[name] != value}
        if donor := row.get("images_from"):
            own |= {"from": donor, "pictures": thumbnails(known.get(donor), expected)}
        return own

    answers = [None if row is None else answer(row) for row in rows]
    about = {"id": first["sample_id"], "category": first["category"], "family": first.get("family", "")}
    return about | shared | {"pictures": pictures, "answers": answers}


def _about(run: Run) -> dict[str, str]:
    controls = {"blind": "asked without pictures", "permute_images": "asked with another sample's picture"}
    return {
        "label": run.label,
        "headline": run.headline,
        "control": next((text for name, text in controls.items() if run.identity.get(name)), ""),
    }


def _scores(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns, and one cell [mean, low, high] (None: not scored) a run and column."""
    table = score_table(runs)
    cells = {
        (line["model"], line["category"]): [line["value"], line["low"], line["high"]] for line in table.plain if line["figure"] == "score"
    }
    columns = list(dict.fromkeys(name for name in table.header if any((run.label, name) in cells for run in runs)))
    return {"columns": columns, "lines": [[cells.get((run.label, name)) for name in columns] for run in runs]}


def _differences(runs: Sequence[Run]) -> dict[str, Any] | None:
    if len(runs) < 2:
        return None
    try:
        table = difference_table(runs[0], runs[1:])
    except RecordError as error:  # runs of other data can still be looked at side by side
        return {"title": f"No paired differences: {error}", "header": [], "lines": []}
    return {"title": table.title, "header": table.header, "lines": table.lines}


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """Header fields that differ from the first run's in any other: the name, and each run's value as JSON."""
    others = [differing(runs[0].identity, run.identity) for run in runs]
    fields = {name: pair[0] for changed in others for name, pair in changed.items()}
    return [
        [name, *(json.dumps(changed[name][1] if name in changed else base) for changed in others)] for name, base in sorted(fields.items())
    ]
