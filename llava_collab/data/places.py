"""Where a set of shards lies: a folder, a URL of any file system that fsspec knows, or a command that prints a file.

data/shards/index.json                     a folder of this machine
s3://bucket/shards/index.json              gs://, https://, hf://, memory:// ... alike; file:// copies like a remote one
pipe:ssh store cat /data/shards/{shard}    run by `sh`, with the name of the file that is wanted in place of {shard}
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

INDEX = "index.json"
PIPE = "pipe:"
NAME = "{shard}"
PAUSES = (1.0, 5.0)  # seconds before the second and the third attempt

T = TypeVar("T")


class ShardError(RuntimeError):
    """Shards that are missing, cut off, or not those of their index; the message names the file and the cure."""


def names_shards(address: str | Path) -> bool:
    """Whether this is the address of a set of shards (a URL, a pipe, or a file called index.json), not of a JSON file of conversations."""
    return "://" in str(address) or str(address).startswith(PIPE) or Path(address).name == INDEX


@dataclass(frozen=True)
class Place:
    """The folder, URL or command that a set's files come from."""

    base: str
    """The folder's address, or the command with its {shard}."""

    @classmethod
    def of(cls, address: str | Path) -> Place:
        """The place that a recipe names. Raises ShardError where it names none."""
        text = str(address)
        if text.startswith(PIPE):
            if NAME not in text:
                raise ShardError(f"{text}: write {NAME} where the command takes the name of a file, e.g. pipe:ssh store cat /data/{NAME}.")
            return cls(text)
        if not text.endswith(f"/{INDEX}") and text != INDEX:
            raise ShardError(f"{text}: name the {INDEX} of the shards (llava-collab data shard writes it); JSON and JSONL files are local.")
        return cls(text.removesuffix(INDEX).rstrip("/") or ("/" if text.startswith("/") else "."))

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one of this machine."""
        return None if self.base.startswith(PIPE) or "://" in self.base else Path(self.base)

    def address(self, name: str) -> str:
        """Where the file `name` is, for people and for fsspec."""
        return self.base.replace(NAME, name) if self.base.startswith(PIPE) else f"{self.base}/{name}"

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The bytes of a file, to be read from front to end.

        Raises OSError, or whatever else the file system raises; ModuleNotFoundError where its package is not installed.
        """
        if self.base.startswith(PIPE):
            with _output(self.base.removeprefix(PIPE).replace(NAME, shlex.quote(name))) as stream:
                yield stream
            return
        import fsspec  # a requirement of torch and huggingface_hub, so it is always there

        try:
            opened = fsspec.open(self.address(name), "rb")
        except ImportError as error:
            raise ModuleNotFoundError(f"{self.address(name)}: {error}; pip install 'llava_collab[data]' has s3, gs and https") from error
        with opened as stream:  # pyright: ignore[reportGeneralTypeIssues]
            yield cast(BinaryIO, stream)


@contextmanager
def _output(command: str) -> Iterator[BinaryIO]:
    """What a shell command prints. Raises OSError with its last words where it fails."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=said) as process:
        assert process.stdout is not None
        try:
            yield cast(BinaryIO, process.stdout)
            code = process.wait()
        finally:
            process.kill()  # nothing, where it has ended
        if code:
            said.seek(0)
            words = " / ".join(said.read().decode(errors="replace").strip().splitlines()[-3:])
            raise OSError(f"`{command}` ended with exit code {code}: {words or 'it said nothing'}")


def patiently(address: str, read: Callable[[], T]) -> T:
    """What `read` gives, at the third attempt at the latest. Raises ShardError that names the address and the cure."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise ShardError(f"{address} is not there ({error}); copy the whole set of shards to one place.") from error
        except (ShardError, ModuleNotFoundError) as error:
            raise ShardError(f"{address}: {error}") from error
        except Exception as error:  # noqa: BLE001 - every file system has errors of its own, and most of them pass
            if pause is None:
                again = "Check that it can be reached, and run the same command again."
                raise ShardError(f"{address}: {type(error).__name__}: {error}. {again}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
