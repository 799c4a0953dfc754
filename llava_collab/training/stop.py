"""Stopping well: a signal or a deadline is noticed between two steps, so that the run can save and leave."""

from __future__ import annotations

import signal
import time
from types import FrameType

DEADLINE_CODE = 75
"""Exit code when the deadline stopped a run that is not finished (EX_TEMPFAIL: run the same command again)."""


class Stopper:
    """Watches SIGTERM, SIGINT and a deadline. A second signal stops at once, as if nobody had watched."""

    def __init__(self, deadline_minutes: float | None) -> None:
        self._deadline = None if deadline_minutes is None else time.monotonic() + 60 * deadline_minutes
        self.signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.release()

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """True once this process should stop."""
        return self.signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def exit_code(self) -> int:
        """128 + signal number (143 for SIGTERM, 130 for SIGINT), or DEADLINE_CODE."""
        return DEADLINE_CODE if self.signal is None else 128 + self.signal
