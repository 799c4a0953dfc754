"""Several processes on one evaluation: who this one is, how it waits for the others, and that no stranger writes to their folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from llava_collab.evaluation.records import RecordError
from llava_collab.files import locked

T = TypeVar("T")
_LOCK = ".writing-{}.lock"


def _nobody() -> None:
    """A process alone waits for nobody."""


@dataclass(frozen=True)
class Ranks:
    """Process `index` of `count`; `wait` returns when all have called it."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = _nobody

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """Every `count`-th thing: dealt like cards, so that long and short batches are spread evenly."""
        return list(things[self.index :: self.count])


@contextmanager
def joined(cpu: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun or `accelerate launch` started, this process among them; one rank where nobody launched anything.

    A GPU each where there are some and not `cpu`. Raises RuntimeError where fewer joined than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        yield Ranks()
        return
    import torch
    from accelerate import PartialState

    # The default limit of ten minutes on a wait is shorter than the end of a long evaluation; a rank that dies is seen by the launcher.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(days=7))
    if state.num_processes != launched:
        raise RuntimeError(f"launched as {launched} processes, but {state.num_processes} joined; use torchrun or accelerate launch")
    yield Ranks(state.process_index, state.num_processes, state.wait_for_everyone)
    state.destroy_process_group()


@contextmanager
def writing(folder: Path, index: int) -> Iterator[None]:
    """Hold this folder as writer number `index`. Raises RecordError where another process does."""
    lock = folder / _LOCK.format(index)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError as error:
            raise _busy(folder) from error
        yield
        lock.unlink(missing_ok=True)


def refuse_writers(folder: Path) -> None:
    """Raises RecordError while any process still writes to `folder`: workers can outlive a launcher that was killed."""
    for lock in folder.glob(_LOCK.format("*")):
        try:
            with locked(lock):
                pass
        except BlockingIOError as error:
            raise _busy(folder) from error


def _busy(folder: Path) -> RecordError:
    return RecordError(f"{folder}: another process is writing here; wait for it or end it, then run again (or choose another --out)")
