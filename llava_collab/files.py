"""Files that are either there whole or not there: atomic writes, checksums, and folders that appear by one rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) atomically: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON; NaN is refused, since other readers of JSON refuse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file; json.JSONDecodeError or OSError where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable (POSIX wants the folder itself synced)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush every file below a folder to the disk; raises OSError where the disk could not take it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():  # a package's links may point anywhere
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def publish(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name (replacing one of that name), durably."""
    sync_files(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_folder(final.parent)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock file, and give its descriptor; the kernel frees it when the last process that has it dies, however.

    Raises BlockingIOError where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle.fileno()
