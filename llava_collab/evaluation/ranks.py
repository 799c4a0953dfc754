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
def writing(folder: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Hold `folder` from before its files are looked at until nothing more is written; every rank calls this, and returns when all hold it.

    The first rank's lock is the folder's: only its holder asks whether workers are left of a launcher that was killed, and only after
    that do the other ranks take theirs. Lock files stay: a process may have opened one that another removes, and would then hold nothing.
    Raises RecordError where another process holds the folder.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        if ranks.first:
            own = stack.enter_context(_held(folder / _LOCK.format(0)))
            for lock in set(folder.glob(_LOCK.format("*"))) - {own}:
                with _held(lock):
                    pass
        ranks.wait()
        if not ranks.first:
            stack.enter_context(_held(folder / _LOCK.format(ranks.index)))
        ranks.wait()
        yield


@contextmanager
def _held(lock: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError as error:
            raise RecordError(
                f"{lock.parent}: another process is writing here; wait for it or end it, then run again (or choose another --out)"
            ) from error
        yield lock
