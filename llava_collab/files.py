"""Files that are either there whole or not there: atomic writes, checksums, and folders that appear by one rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """`write_chunks` of content that is in memory anyway."""
    write_chunks(path, (content,), durable=durable)


def write_chunks(path: Path, chunks: Iterable[bytes], *, durable: bool = True) -> None:
    """Replace `path` atomically: a reader, another writer, or a crash (of `chunks` too), sees the old file or the new one.

    durable: it outlives a power cut too; without, a reader has to check what it finds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.writelines(chunks)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON; NaN is refused, since other readers of JSON refuse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file; json.JSONDecodeError or OSError where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def keyed(value: Any, where: str, keys: set[str] | None = None, error: type[Exception] = ValueError) -> dict[str, Any]:
    """`value`, read from a file that people write, as a mapping with no other keys than `keys`; else `error` that names `where`."""
    if not isinstance(value, dict):
        raise error(f"{where}: expected keys and values, found {value!r}")
    if keys and (unknown := set(value) - keys):
        raise error(f"{where}: unknown key {sorted(unknown)}; there are {sorted(keys)}")
    return value


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
def locked(path: Path, *, wait: bool = False) -> Iterator[int]:
    """Hold a lock file, and give its descriptor; the kernel frees it when the last process that has it dies, however.

    Raises BlockingIOError where another process holds it and this one is not to `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle.fileno()


def model_sha256(folder: Path) -> str:
    """One hash of what decides a model's answers, by name and bytes: weights, configurations, tokenizer, processor, chat template.

    Raises ValueError for a folder without `config.json` or weights.
    """
    files = sorted(file for pattern in _MODEL_FILES for file in folder.glob(pattern))
    if not (folder / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{folder}: not a model folder (no config.json, or no *.safetensors beside it)")
    lines = [f"{file.name} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
