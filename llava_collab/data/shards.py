"""Sets of WebDataset shards, read by place: any picture of any shard at once, so that order and resume are those of single files.

A set is a folder (or a URL, or what a command gives: `places`) that `shard_writer` fills:

    index.json          the shards, with counts, sizes and sha256; it is written last, so where it is the set is whole
    shard-000000.tar    `KEY.json`, `KEY.0.webp`, `KEY.1.webp` ...: a sample and its own pictures, for any reader of WebDataset
    shard-000000.jsonl  a line a sample: {"key", "pictures": [[offset, bytes, crc32], ...], "record": the line of the data file}

Shards of this machine are read where they lie, others through a `ShardCache`. Every picture is compared with its crc32.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

from tqdm import tqdm

from llava_collab.data.places import INDEX, Place, ShardError, patiently
from llava_collab.data.shard_cache import ShardCache, StoredFile

FORMAT = "llava_collab shards 1"
CURE = "Write the shards again (llava-collab data shard), or copy the whole set anew."


@dataclass(frozen=True)
class Shard:
    """One shard: its tar file, the file of its lines, how many samples."""

    tar: StoredFile
    lines: StoredFile
    samples: int

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Shard:
        """From index.json. Raises KeyError or TypeError for what is no entry."""
        name = entry["name"]
        files = [StoredFile(f"{name}.{kind}", int(entry[kind]["bytes"]), str(entry[kind]["sha256"])) for kind in ("tar", "jsonl")]
        return cls(*files, samples=int(entry["samples"]))


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A picture in a shard; stands where a picture's path stands."""

    shards: ShardSet
    shard: int
    offset: int
    bytes: int
    crc32: int
    file: str
    """Its path in the data file that the shards were made of."""

    def __str__(self) -> str:
        return f"{self.shards.address(self.shard)}: {self.file}"

    def read_bytes(self) -> bytes:
        """The picture's file. Raises ShardError where the shard is not the one that the index describes."""
        with self.shards.open(self.shards.shards[self.shard].tar) as stream:
            stream.seek(self.offset)
            content = stream.read(self.bytes)
        if len(content) < self.bytes:
            raise ShardError(f"{self}: the shard ends before byte {self.offset + self.bytes}, it was cut off. {CURE}")
        if zlib.crc32(content) != self.crc32:
            raise ShardError(f"{self}: the shard was changed after its index was written (bytes {self.offset} on). {CURE}")
        return content


class ShardSet:
    """The shards that one index describes."""

    def __init__(self, place: Place, shards: Sequence[Shard], cache: ShardCache | None) -> None:
        self.place = place
        self.shards = tuple(shards)
        self._cache = cache

    @property
    def remote(self) -> bool:
        """Whether shards are copied before they are read."""
        return self.place.folder is None

    def address(self, number: int) -> str:
        """Where a shard is, for people."""
        return self.place.address(self.shards[number].tar.name)

    def open(self, file: StoredFile) -> AbstractContextManager[BinaryIO]:
        """A shard's file (tar or lines) for random access. Raises ShardError where it is not there."""
        if self.place.folder is None:
            assert self._cache is not None, "open_shards gives a remote set its cache"
            return self._cache.open(self.place, file)
        try:
            return (self.place.folder / file.name).open("rb")
        except OSError as error:
            raise ShardError(f"{self.place.address(file.name)} can't be opened ({error.strerror}). {CURE}") from error

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every sample's line with the number of its shard. Raises ShardError where lines are not those of the index."""
        if self.remote:
            with ThreadPoolExecutor(8) as pool:  # many small files: it is the way there that takes long
                list(tqdm(pool.map(self._fetch_lines, self.shards), "fetching the index", len(self.shards), unit="shard", leave=False))
        for number, shard in enumerate(self.shards):
            with self.open(shard.lines) as stream:
                content = stream.read()
            if hashlib.sha256(content).hexdigest() != shard.lines.sha256:
                raise ShardError(f"{self.place.address(shard.lines.name)} does not fit {self.place.address(INDEX)}. {CURE}")
            for line in content.splitlines():
                yield number, json.loads(line)

    def verify(self) -> None:
        """Read every shard whole. Raises ShardError for the first that is not the one of the index."""
        for shard in tqdm(self.shards, "comparing shards with their index", unit="shard"):
            with self.open(shard.tar) as stream:
                if hashlib.file_digest(cast(BufferedReader, stream), "sha256").hexdigest() != shard.tar.sha256:
                    raise ShardError(f"{self.place.address(shard.tar.name)} was changed after its index was written. {CURE}")

    def _fetch_lines(self, shard: Shard) -> None:
        with self.open(shard.lines):
            pass

    def members(self, number: int, row: dict[str, Any], files: Sequence[str]) -> tuple[ShardMember, ...]:
        """A line's pictures, which its record calls `files`. Raises ShardError where the line is no such line."""
        try:
            places = [(int(offset), int(size), int(crc32)) for offset, size, crc32 in row["pictures"]]
            return tuple(ShardMember(self, number, *place, file) for place, file in zip(places, files, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{self.place.address(self.shards[number].lines.name)}: {row!r:.200} is no line of it. {CURE}") from error


def open_shards(address: str | Path, cache: ShardCache | None = None) -> ShardSet:
    """The set that an index describes; `cache` keeps the copies of remote shards.

    Raises ShardError where there is no such index, or shards of this machine are missing or have another size.
    """
    place = Place.of(address)
    if place.folder is None and cache is None:
        raise ShardError(f"{address} is not a local folder; copy the shards to this machine first.")
    where = place.address(INDEX)
    try:
        index = json.loads(patiently(where, lambda: _content(place)))
        if index["format"] != FORMAT:
            raise ShardError(f"{where} is of the format {index['format']!r}, not {FORMAT!r}. {CURE}")
        shards = [Shard.of(entry) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where} is no index of shards ({type(error).__name__}: {error}). {CURE}") from error
    if place.folder is not None:
        for file in (file for shard in shards for file in (shard.tar, shard.lines)):
            _check_size(place.folder / file.name, file.bytes, where)
    return ShardSet(place, shards, cache)


def _check_size(path: Path, size: int, where: str) -> None:
    if not path.is_file():
        raise ShardError(f"{path} is missing; {where} lists it. {CURE}")
    if path.stat().st_size != size:
        raise ShardError(f"{path} has {path.stat().st_size} bytes, but {size} in {where}: cut off, or of another set. {CURE}")


def _content(place: Place) -> bytes:
    with place.open(INDEX) as stream:
        return stream.read()
