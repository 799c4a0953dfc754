"""Local copies of remote shards, bounded in size and shared by all ranks, workers and runs of a machine.

A copy is made once, by whoever wants it first, checked by its sha256 and named by it. The least recently used go first; one that
somebody is reading never goes. Everything rests on `flock`: the kernel drops the locks of a process that dies, however.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llava_collab.data.places import Place, ShardError, patiently
from llava_collab.files import locked

CHUNK = 1 << 20
PATIENCE = 600.0  # seconds to wait for room that others hold


@dataclass(frozen=True)
class StoredFile:
    """A file of a set of shards, as the index describes it."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for what can't be a name of a file in the set, or of a copy (an index may come from anywhere)."""
        if not re.fullmatch(r"\w[\w.-]*", self.name) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.name!r} with sha256 {self.sha256!r} is no file of a set of shards")


class ShardCache:
    """Copies in `folder` (on a local disk: `flock` and speed are not what network disks are good at), at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    @contextmanager
    def open(self, place: Place, file: StoredFile) -> Iterator[BinaryIO]:
        """The local copy, which nobody drops while it is open. Raises ShardError where it can't be made."""
        copy = self.folder / f"{file.sha256}{Path(file.name).suffix}"
        with ExitStack() as held:
            while (stream := _in_use(copy, file.bytes)) is None:
                self._fetch(place, file, copy)
            yield held.enter_context(stream)

    def _fetch(self, place: Place, file: StoredFile, copy: Path) -> None:
        with locked(self.folder / "locks" / copy.name, wait=True):
            if not (copy.exists() and copy.stat().st_size == file.bytes):  # else another process was first
                patiently(place.address(file.name), lambda: self._copy(place, file, copy))

    def _copy(self, place: Place, file: StoredFile, copy: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with self._room(file.bytes, copy) as (temporary, target), place.open(file.name) as source:
            while size <= file.bytes and (chunk := source.read(CHUNK)):
                size += len(chunk)
                digest.update(chunk)
                self._write(target, chunk)
            if size < file.bytes:
                raise OSError(f"cut off after {size} of {file.bytes} bytes")
            if digest.hexdigest() != file.sha256:
                raise ShardError("this is not the file that index.json describes; put index and shards of one writing there.")
            self._write(target, b"")
            os.replace(temporary, copy)

    def _write(self, target: BinaryIO, chunk: bytes) -> None:
        try:
            target.write(chunk) if chunk else target.flush()
        except OSError as error:
            cure = "free some space, or name another data.shard_cache"
            raise ShardError(f"can't write to {self.folder} ({error.strerror}); {cure}.") from error

    @contextmanager
    def _room(self, size: int, copy: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """An open file of `size` bytes (so that others count it already) for which enough copies were dropped; gone at the end."""
        temporary = self.folder / f"{copy.name}.{uuid.uuid4().hex}.tmp"
        with ExitStack() as held:
            deadline = time.monotonic() + PATIENCE
            while True:
                with locked(self.folder / "locks" / "room", wait=True):
                    if size <= self.limit and self._drop(size):
                        target = held.enter_context(temporary.open("xb"))
                        fcntl.flock(target, fcntl.LOCK_EX)
                        target.truncate(size)
                        break
                if size > self.limit or time.monotonic() > deadline:
                    raise ShardError(f"no room for its {size} bytes in {self.folder}; raise data.shard_cache_gib.")
                time.sleep(0.1)
            try:
                yield temporary, target
            finally:
                temporary.unlink(missing_ok=True)

    def _drop(self, size: int) -> bool:
        """Whether `size` bytes more fit, after dropping what was not used for longest; the lock `room` is held."""
        found = list(_files(self.folder))
        total = size + sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda entry: (entry[0].suffix != ".tmp", entry[1].st_mtime_ns)):
            if (total > self.limit or path.suffix == ".tmp") and _removed(path):  # a .tmp that nobody holds: its writer was killed
                total -= status.st_size
        return total <= self.limit


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # a copy that has just got its name, or given up
            continue
        if stat.S_ISREG(status.st_mode):
            yield path, status


def _in_use(copy: Path, size: int) -> BinaryIO | None:
    """The copy opened and held, or None where it is not there (or was dropped in between, or is not whole after a power cut)."""
    try:
        stream = copy.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(stream, fcntl.LOCK_SH)
    status = os.fstat(stream.fileno())
    if status.st_nlink and status.st_size == size:
        os.utime(stream.fileno())
        return stream
    stream.close()
    return None


def _removed(path: Path) -> bool:
    """Remove a file, unless somebody holds it (or it is gone)."""
    try:
        with path.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
