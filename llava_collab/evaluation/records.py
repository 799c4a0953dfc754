"""Record files: one JSON row a sample in `records.jsonl`, and what produced them in `run.json` beside it.

Rows are appended as answers come, so that a killed run loses nothing but the batch it was asking. Where several processes evaluate
together, each appends to a part of its own; `settle` folds the parts into `records.jsonl`.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_collab.files import write_bytes, write_json, write_text

RECORDS = "records.jsonl"
PART = "records.part-{}.jsonl"
RUN = "run.json"
LOSSES = "losses.json"
Row = dict[str, Any]


class RecordError(ValueError):
    """A record folder that can't be read or belongs to another run; the message names the file and the cure."""


def read_rows(folder: Path) -> list[Row]:
    """All whole rows of `folder/records.jsonl` (or its `.xz`, as `pack` keeps it); a half-written last line is left out.

    Raises RecordError for a broken or repeated row.
    """
    path = folder / RECORDS
    rows = read_lines(path)
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if row["sample_id"] in seen:
            raise RecordError(
                f"{path}:{number}: sample {row['sample_id']!r} is there twice; two runs wrote to this folder, delete it and run again"
            )
        seen.add(row["sample_id"])
    return rows


def read_lines(path: Path) -> list[Row]:
    """All whole rows of a JSONL file of samples (or of its `.xz`); a sample may have several. Raises RecordError for a broken row."""
    packed = path.with_name(f"{path.name}.xz")
    if not path.is_file() and not packed.is_file():
        raise RecordError(f"{path}: no such file; run eval/run.py with --out {path.parent} first")
    return _parse(path, path.read_bytes() if path.is_file() else lzma.decompress(packed.read_bytes()))


def _parse(path: Path, content: bytes) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
            rows[-1]["sample_id"]
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"{path}:{number}: not a record ({error}); remove this line and run again") from error
    return rows


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Replace `folder/records.jsonl` as a whole, atomically."""
    write_text(folder / RECORDS, "".join(dump(row) for row in rows))


def settle(folder: Path, batches: Sequence[Sequence[str]], *, final: bool) -> None:
    """Make `folder/records.jsonl` of what lies there and in the parts of all ranks: the rows of `batches` (ids) in their order.

    final: every row, errors included. Otherwise what a resumed run goes on from: answered rows, and of a batch that was cut in two by a
    kill none at all, so that it is asked again as a whole and padded as in an unbroken run. Killed in here, nothing is lost.
    Raises RecordError for a broken row.
    """
    parts = sorted(folder.glob(PART.format("*")))
    path = folder / RECORDS
    rows: dict[str, Row] = {}
    for row in [row for file in (path, *parts) if file.is_file() for row in _parse(file, file.read_bytes())]:
        if row["sample_id"] not in rows or rows[row["sample_id"]]["status"] == "error":
            rows[row["sample_id"]] = row
    kept = [rows[sample_id] for batch in batches if final or rows.keys() >= set(batch) for sample_id in batch if sample_id in rows]
    kept = [row for row in kept if final or row["status"] == "ok"]
    if not path.is_file() or "".join(map(dump, kept)).encode() != path.read_bytes():
        write_rows(folder, kept)
    for part in parts:
        part.unlink()


def pack(folder: Path, to: Path) -> None:
    """Copy what tables are computed from, in the form that is kept in the tree: records compressed, header and losses as they are."""
    to.mkdir(parents=True, exist_ok=True)
    write_bytes(to / f"{RECORDS}.xz", lzma.compress((folder / RECORDS).read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    for name in (RUN, LOSSES):
        if (folder / name).is_file():
            shutil.copy(folder / name, to / name)


def dump(row: Mapping[str, Any]) -> str:
    """One row as its line."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_run(folder: Path, header: str = RUN) -> dict[str, Any]:
    """The header `run.json` (or one of another name); raises RecordError where it is missing or broken."""
    path = folder / header
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: can't be read ({error}); an evaluation folder holds {RUN} and {RECORDS}") from error
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise RecordError(f"{path}: has no `identity`; it was not written by eval/run.py")
    return run


def open_run(
    folder: Path, identity: Mapping[str, Any], environment: Mapping[str, Any], *, header: str = RUN, records: str = RECORDS
) -> None:
    """Create `run.json` (the `header` of the file `records`), or check that the one there is of the same run.

    `identity` decides the numbers (model, data, prompt template, metrics, limits) and must be equal to go on; `environment` (versions,
    hardware, command) is kept for the reader. Raises RecordError that names every field that differs.
    """
    if not (folder / header).is_file():
        if (folder / records).exists():
            raise RecordError(f"{folder}: has {records} but no {header}, so nobody knows what they are of; choose another --out")
        write_json(folder / header, {"identity": dict(identity), "environment": dict(environment)})
        return
    changes = differing(read_run(folder, header)["identity"], json.loads(json.dumps(dict(identity))))
    if changes:
        lines = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in changes.items())
        raise RecordError(
            f"{folder / header}: is of another run, and these fields differ:\n{lines}\nChoose another --out, or delete this folder."
        )


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields (dotted where nested) whose values differ, with both values; a missing field counts as None."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes |= {f"{name}.{inner}": pair for inner, pair in differing(before, after).items()}
        elif before != after:
            changes[name] = (before, after)
    return changes
