"""Says which rank holds a run up, and where: in a collective all ranks wait alike, and only the one that does not wait is to blame.

Each rank's thread looks at what its main thread is doing; past the limit it writes `<run>/stalls/rank-N.json` with the Python stack.
Rank 0 reads all of them and names the ranks that are at work while the others wait. Nothing is stopped: the process group's own
time-out does that.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_collab.files import read_json, write_json

WAITING = "waiting for the other ranks"


class Watchdog:
    """Watches one rank. `phase` names what its main thread does; a phase that lasts longer than `limit` seconds is told once."""

    def __init__(self, run: Path, rank: int, limit: float, say: Callable[[str], None]) -> None:
        self.folder, self.rank, self.limit, self.say = run / "stalls", rank, limit, say
        self.step = 0
        self._phase, self._since = "starting", time.monotonic()
        self._told: set[tuple[int, int]] = set()
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._mine.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def _mine(self) -> Path:
        return self.folder / f"rank-{self.rank}.json"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what the main thread does."""
        outer = self._phase
        self._phase, self._since = name, time.monotonic()
        try:
            yield
        finally:
            self._phase, self._since = outer, time.monotonic()

    def close(self) -> None:
        """End the thread; what it wrote stays, as a record."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self.limit / 4)):
            seconds = time.monotonic() - self._since
            if seconds < self.limit:
                continue
            try:
                write_json(self._mine, self._state(seconds))
                if self.rank == 0:
                    self._judge()
            except OSError as error:  # a full or lost disk is told by the save
                self.say(f"watchdog: {error}")

    def _state(self, seconds: float) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main)
        stack = traceback.format_stack(frame) if frame is not None else []
        place = {"rank": self.rank, "host": socket.gethostname(), "step": self.step, "phase": self._phase}
        return place | {"seconds": round(seconds, 1), "time": time.time(), "stack": stack}

    def _judge(self) -> None:
        now = time.time()
        states = [read_json(path) for path in sorted(self.folder.glob("rank-*.json"))]
        states = [state for state in states if now - state["time"] < 2 * self.limit]  # older ones are of a stall that is over
        working = [state for state in states if state["phase"] != WAITING] or states
        for state in working:
            if (state["rank"], state["step"]) not in self._told:
                self._told.add((state["rank"], state["step"]))
                waiting = len(states) - len(working)
                self.say(
                    f"STALLED at step {state['step']}: rank {state['rank']} on {state['host']} has been {state['phase']} for "
                    f"{state['seconds']:.0f} s{f'; {waiting} others wait for it' if waiting else ''}. Its stack is in "
                    f"{self.folder}/rank-{state['rank']}.json"
                )


def lost_contact(error: BaseException) -> str | None:
    """What to tell where `error` is a collective that other ranks did not join; None for any other error."""
    text = str(error)
    if not isinstance(error, torch.distributed.DistError) and not any(word in text.lower() for word in ("gloo", "nccl")):
        return None
    return (
        f"rank {os.environ.get('RANK', '0')} lost the other ranks ({text.strip().splitlines()[0][:300]}). One of them failed or hung: look "
        "for the first error above and in <run>/stalls. If all were alive, raise run.timeout_minutes. If they never met, name the network: "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO says more. The same command goes on from the last checkpoint."
    )
