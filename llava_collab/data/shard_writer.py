"""Any LLaVA JSON or JSONL file with its pictures -> a set of WebDataset shards (`shards` says what is in it).

The same input gives the same bytes, whatever the number of processes. A writer that was killed goes on where it was; one that finds
everything done writes nothing. A sample whose picture is missing or can't be decoded is left out and named in `skipped.jsonl`, as in a
training run, and too many of them stop the job.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_collab.data.conversation import SampleError
from llava_collab.data.images import load_image, resolve_image
from llava_collab.data.places import INDEX
from llava_collab.data.samples import iter_records, parse_record
from llava_collab.data.shards import FORMAT
from llava_collab.data.skips import Skip, SkipList
from llava_collab.files import locked, read_json, sha256, write_bytes, write_chunks, write_json

JOURNAL = ".journal.json"
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class _Part:
    """What goes into one shard: records with their keys, the first one's place in the data file, and what an earlier start wrote of it."""

    tar: Path
    root: Path
    first: int
    records: list[tuple[str, Any]]
    known: dict[str, Any] | None


def write_shards(
    file: Path,
    out: Path,
    *,
    image_root: Path | None = None,
    per_shard: int = 2_000,
    workers: int = 1,
    max_bad_fraction: float = 0.01,
) -> Path:
    """Write the samples of `file` to `out`, `per_shard` records of the file a shard; returns the path of index.json.

    Raises FileNotFoundError, SampleError (bad_record) where the file is no JSON, TooManyBadSamples past the limit (nothing is lost: mend
    the files and run it again), ValueError where `out` holds other shards or another process is writing there, OSError where it can't be
    written.
    """
    if per_shard < 1 or workers < 1:
        raise ValueError(f"per_shard and workers must be positive, not {per_shard} and {workers}")
    total = sum(1 for _ in tqdm(iter_records(file), f"counting {file.name}", unit=" records", leave=False))
    try:
        with locked(out / ".lock"):
            return _write_all(file, out, image_root or file.parent, per_shard, workers, SkipList(total, max_bad_fraction, out / SKIPPED))
    except BlockingIOError:
        raise ValueError(f"another process is writing shards to {out}; wait for it, or give another folder") from None


def _write_all(file: Path, out: Path, root: Path, per_shard: int, workers: int, skips: SkipList) -> Path:
    known: dict[str, Any] = read_json(out / JOURNAL) if (out / JOURNAL).is_file() else {}
    if strange := sorted(path.name for path in out.glob("shard-*.tar") if path.stem not in known):
        raise ValueError(f"{out} holds shards that were not written here ({strange[0]} ...); give an empty folder")
    done: dict[str, Any] = {}
    with tqdm(desc=f"shards of {file.name}", total=skips.samples, unit=" samples") as bar:
        for part, entry in _run(_parts(file, out, root, per_shard, known), workers):
            name = part.tar.stem
            if entry != known.get(name):
                known[name] = entry
                write_json(out / JOURNAL, known)
            done[name] = entry
            bar.update(len(part.records))
            skips.add(Skip(**skip) for skip in entry["left_out"])
    index = _index(done, skips)
    if not (out / INDEX).is_file() or read_json(out / INDEX) != index:
        write_json(out / INDEX, index)
    _tidy(out, known.keys() - done.keys())
    if done != known:
        write_json(out / JOURNAL, done)
    return out / INDEX


def _index(done: dict[str, Any], skips: SkipList) -> dict[str, Any]:
    shards = [{"name": name} | {key: entry[key] for key in ("samples", "pictures", "tar", "jsonl")} for name, entry in done.items()]
    totals = {key: sum(entry[key] for entry in done.values()) for key in ("samples", "pictures")}
    left_out = {reason: len(ids) for reason, ids in skips.by_reason().items()}
    return {"format": FORMAT, **totals, "left_out": left_out, "shards": shards}


def _tidy(out: Path, stale: Iterable[str]) -> None:
    """Remove shards of a longer file or of smaller shards, and what a killed writer had begun."""
    for path in [out / f"{name}.{kind}" for name in stale for kind in ("tar", "jsonl")] + list(out.glob(".shard-*.tmp")):
        path.unlink(missing_ok=True)


def _parts(file: Path, out: Path, root: Path, per_shard: int, known: dict[str, Any]) -> Iterator[_Part]:
    records: list[tuple[str, Any]] = []
    number, first = 0, 0
    for record in _keyed(iter_records(file)):
        records.append(record)
        if len(records) == per_shard:
            yield _Part(out / f"shard-{number:06d}.tar", root, first, records, known.get(f"shard-{number:06d}"))
            number, first, records = number + 1, first + per_shard, []
    if records:
        yield _Part(out / f"shard-{number:06d}.tar", root, first, records, known.get(f"shard-{number:06d}"))


def _keyed(records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each record with a key of its own that WebDataset, tar and file systems take: its id where that will do.

    A dot ends a key there; other ids, and those that come again, get the record's number behind a ~, which no plain id has.
    """
    seen: set[str] = set()
    for number, record in enumerate(records):
        name = str(record.get("id", "")) if isinstance(record, dict) else ""
        if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name) and name not in seen:
            seen.add(name)
            yield name, record
        else:
            yield f"{re.sub('[^A-Za-z0-9_-]+', '_', name)[:60]}~{number}", record


def _run(parts: Iterator[_Part], workers: int) -> Iterator[tuple[_Part, dict[str, Any]]]:
    """Each part with its entry, in order; only a few parts are in memory at once."""
    if workers == 1:
        for part in parts:
            yield part, _write_part(part)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:  # spawn: the caller may hold threads
        waiting: deque[Any] = deque()
        for part in parts:
            waiting.append((part, pool.submit(_write_part, part)))
            if len(waiting) > 2 * workers:
                part, future = waiting.popleft()
                yield part, future.result()
        for part, future in waiting:
            yield part, future.result()


def _write_part(part: _Part) -> dict[str, Any]:
    """Write a shard and the file of its lines, unless they are there; returns the journal's entry."""
    lines = part.tar.with_suffix(".jsonl")
    source = _source(part)
    if part.known is not None and part.known["source"] == source and _as_known(part.tar, part.known) and _as_known(lines, part.known):
        return part.known
    (part.tar.parent / INDEX).unlink(missing_ok=True)  # it would describe other bytes
    rows: list[dict[str, Any]] = []
    left_out: list[Skip] = []
    try:
        write_chunks(part.tar, _tar(part, rows, left_out))
        write_bytes(lines, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    except OSError as error:
        told = f"can't write {part.tar} ({error.strerror or error}); make room and run the same command again"
        raise OSError(error.errno, told) from error
    files = {kind: {"bytes": path.stat().st_size, "sha256": sha256(path)} for kind, path in (("tar", part.tar), ("jsonl", lines))}
    counts = {"samples": len(rows), "pictures": sum(len(row["pictures"]) for row in rows)}
    return {"source": source, **counts, **files, "left_out": [asdict(skip) for skip in left_out]}


def _as_known(path: Path, known: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == known[path.suffix.removeprefix(".")]["bytes"]


def _source(part: _Part) -> str:
    """Names what a shard is made of: the records, and the pictures' files by size and time."""
    digest = hashlib.sha256(json.dumps([part.first, part.records]).encode())
    for _, record in part.records:
        with suppress(SampleError):
            for path in parse_record(record, part.root, "").images:
                found = resolve_image(path)
                stat = found.stat() if found is not None else None
                digest.update(repr((str(path), str(found), stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()


def _tar(part: _Part, rows: list[dict[str, Any]], left_out: list[Skip]) -> Iterator[bytes]:
    """The tar file in pieces. Fills `rows` with the line of each sample, `left_out` with the bad ones."""
    offset = 0
    for number, (key, record) in enumerate(part.records, start=part.first):
        try:
            sample = parse_record(record, part.root, f"record {number + 1}")
            files = [_read(path, sample.id) for path in sample.images]
        except SampleError as error:
            left_out.append(Skip.of(number, error.sample_id, "", error))
            continue
        names = [f"{key}.{at}{suffix}" for at, (suffix, _) in enumerate(files)]
        text = json.dumps(_naming(record, names)).encode()
        pictures = []
        for name, content in [(f"{key}.json", text), *zip(names, (content for _, content in files), strict=True)]:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            if content is not text:
                pictures.append([offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content)])
            chunk = header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
            offset += len(chunk)
            yield chunk
        rows.append({"key": key, "pictures": pictures, "record": record})
    yield bytes(2 * tarfile.BLOCKSIZE)


def _read(path: Path, sample_id: str) -> tuple[str, bytes]:
    """Suffix and bytes of a picture that can be decoded. Raises SampleError."""
    load_image(path, sample_id)
    found = resolve_image(path)
    assert found is not None, "it has just been opened"
    suffix = found.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]+", suffix) else ".img", found.read_bytes()


def _naming(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The record with its pictures' names in the tar in place of their paths."""
    kind = "image" if "image" in record else "images"
    return record | ({kind: names[0] if isinstance(record[kind], str) else names} if names else {})
