"""Checkpoints that are whole or absent: written aside, flushed, hashed, re-opened, then renamed into place.

Layout of a run's checkpoints (every file but the manifest is listed in it with its sha256):

    <run>/checkpoints/step-N/   a loadable model folder (or, with adapters, trainable.safetensors), optimizer.safetensors,
                                random-<rank>.*, state.json, manifest.json
    <run>/checkpoints/latest    the name of the newest
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from llava_collab.files import publish, read_json, sha256, sync_files, write_json, write_text

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is left and what to do."""


class Checkpoints:
    """The checkpoints of one run. All methods that write are called by all ranks."""

    def __init__(self, run: Path, keep_last: int, accelerator: Accelerator) -> None:
        self.folder = run / "checkpoints"
        self.keep_last = keep_last
        self.accelerator = accelerator

    def newest(self, say: Callable[[str], None] = print) -> Path | None:
        """The newest undamaged checkpoint, or None if there never was one. Damaged ones are named and passed over.

        Raises CheckpointError where all are damaged (a silent fresh start would throw the run away).
        """
        steps = self._steps()
        for step in sorted(steps, reverse=True):
            problem = damage(steps[step])
            if problem is None:
                return steps[step]
            say(f"{steps[step]} is damaged ({problem}); falling back to the checkpoint before it.")
        if steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged. Restore one, or delete the folder to start afresh.")
        return None

    def newest_for_all(self, say: Callable[[str], None] = print) -> Path | None:
        """`newest`, as the main process finds it, on all ranks: they have to go on from the same one. Raises CheckpointError on all."""
        found: list[Path | None | CheckpointError] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [self.newest(say)]
            except CheckpointError as error:
                found = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return found[0]

    def save(self, step: int, write: Callable[[Path], None], weights: Mapping[str, torch.Tensor]) -> Path:
        """Make `step-<step>`: every rank calls `write(folder)` (a rank other than the first writes only files of its own), in which ranks
        must not wait for each other, or fail together. `weights`: what has to be found there, on the main process.

        Raises CheckpointError, on all ranks, if the folder can't be written or read back; earlier checkpoints stay as they are.
        """
        temporary, final = self.folder / f".step-{step}.tmp", self.folder / f"step-{step}"
        main = self.accelerator.is_main_process
        self._together(lambda: _fresh(temporary) if main else None, temporary)
        self._together(lambda: write(temporary), temporary)
        self._together(lambda: self._finish(temporary, final, weights) if main else None, temporary)
        return final

    def _finish(self, temporary: Path, final: Path, weights: Mapping[str, torch.Tensor]) -> None:
        sync_files(temporary)
        write_manifest(temporary)
        verify(temporary, weights)
        publish(temporary, final)
        write_text(self.folder / "latest", final.name + "\n")
        steps = self._steps()
        for step in sorted(steps)[: -self.keep_last]:
            shutil.rmtree(steps[step])

    def _together(self, action: Callable[[], None], temporary: Path) -> None:
        """Do something on every rank; if it fails on any, clean up and raise the same error everywhere."""
        error: str | None = None
        try:
            action()
        except (OSError, SafetensorError, ValueError, CheckpointException) as caught:
            error = f"{type(caught).__name__}: {caught}"
        errors = [e for e in (gather_object([error]) if self.accelerator.num_processes > 1 else [error]) if e is not None]
        if not errors:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for _, path in sorted(self._steps().items())] if self.folder.exists() else []
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
        raise CheckpointError(
            f"could not write {temporary.name.strip('.').removesuffix('.tmp')} to {self.folder}: {errors[0]} ({free / 2**30:.1f} GiB "
            f"free). Earlier checkpoints are untouched: {', '.join(kept) or 'none yet'}. Make room and run the same command again."
        )

    def _steps(self) -> dict[int, Path]:
        found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")}
        return {int(match.group(1)): path for path, match in found.items() if match}


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the sha256 of every other file in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): sha256(path) for path in files})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None if nothing is."""
    try:
        manifest = read_json(folder / MANIFEST)
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def verify(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Re-open the weights of a saved folder: every tensor given must be there, bit for bit. Raises ValueError.

    Compared by content, since names on disk are those of stock LLaVA.
    """
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith(("optimizer", "random")):
            with safe_open(path, framework="pt") as file:
                found |= {_content(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if lost := sorted(name for name, weight in weights.items() if _content(weight.detach().cpu()) not in found):
        raise ValueError(f"{folder}: these parameters are not in the saved files as they are in memory: {', '.join(lost[:5])}")


def _content(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, int]:
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
