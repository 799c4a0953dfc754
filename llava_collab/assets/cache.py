"""The cache folder and the two habits that keep it sound: one writer at a time, and results that appear whole or not at all.

Layout under `cache_root()`: `downloads/` (files as fetched, verified), `packages/<name>-<version>/` (unpacked), `bases/<name>/` (models
converted by `llava_collab.models.bases`), `locks/`, and `tmp/` (work in progress, safe to delete when nothing runs).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_collab import files


class AssetError(RuntimeError):
    """An asset can not be had; the message names it and the cure."""


def cache_root() -> Path:
    """The cache folder: LLAVA_COLLAB_CACHE, else ~/.cache/llava_collab. Not created here."""
    return Path(os.environ.get("LLAVA_COLLAB_CACHE") or Path.home() / ".cache" / "llava_collab").expanduser().absolute()


@contextmanager
def locked(root: Path, key: str) -> Iterator[None]:
    """Hold the lock `key` of the cache `root`; a second process waits. The kernel frees it when its holder dies."""
    with files.locked(root / "locks" / f"{key}.lock", wait=True):
        yield


@contextmanager
def build_folder(root: Path, final: Path, key: str) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `final` at the end of the block, or is deleted if the block raises.

    Call it with the lock `key` held: leftovers of a process that was killed are then known to be dead and are cleared first.
    """
    work = root / "tmp" / key
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        final.parent.mkdir(parents=True, exist_ok=True)
        files.publish(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
