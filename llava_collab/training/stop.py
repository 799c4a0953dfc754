"""Stopping well: a signal, a launcher's request or a deadline is noticed between two steps, so that the run can save and leave.

A launcher (scripts/launch/on_node.sh) and the ranks that it started on its node talk through a folder, named in LLAVA_COLLAB_LAUNCH:

    stop               the launcher's: save and leave. A file, since the way of a signal is not to be trusted: torchrun kills ranks 30 s
                       after it forwards one, and SLURM sends SIGTERM to every process of a job, loader workers and torchrun included.
    code-<local rank>  a rank's: the exit code that it means. It leaves with 0 then, because torchrun starts ranks again after any other.
    failed             a rank's: it met an error that it would meet again. The launcher ends all the ranks of its node.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from llava_collab.files import write_text

DEADLINE_CODE = 75
"""Exit code of a run that was stopped, but not by a signal of its own, and is not finished (EX_TEMPFAIL: run the same command again)."""
LAUNCH = "LLAVA_COLLAB_LAUNCH"
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopper:
    """Watches signals, the launcher's request and a deadline. A second SIGINT stops at once, as if nobody had watched.

    The others may come again: SLURM and torchrun both send SIGTERM.
    """

    def __init__(self, deadline_minutes: float | None) -> None:
        self._deadline = None if deadline_minutes is None else time.monotonic() + 60 * deadline_minutes
        folder = os.environ.get(LAUNCH)
        self._request = None if folder is None else Path(folder) / "stop"
        self.signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in WATCHED}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        if self.signal is None:
            self.signal = number

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """True once this process should stop."""
        overdue = self._deadline is not None and time.monotonic() >= self._deadline
        return self.signal is not None or overdue or (self._request is not None and self._request.exists())

    @property
    def exit_code(self) -> int:
        """128 + signal number (143 for SIGTERM, 138 for SIGUSR1, 130 for SIGINT), or DEADLINE_CODE."""
        return DEADLINE_CODE if self.signal is None else 128 + self.signal


def run_launched(main: Callable[[], int]) -> int:
    """The exit code of `main()`, or, under a launcher of ours, 0 after the launcher was told the code."""
    folder = os.environ.get(LAUNCH)
    if folder is None:
        return main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun was started deaf to it, and its ranks inherit that
    try:
        code = main()
    except SystemExit as left:  # a command line that can't be understood
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    if 0 < code < DEADLINE_CODE:
        write_text(Path(folder) / "failed", "")
        time.sleep(10)  # to be ended with the other ranks, before torchrun starts them all again
        return code
    write_text(Path(folder) / f"code-{os.environ.get('LOCAL_RANK', '0')}", f"{code}\n")
    return 0


def outlive_signals(worker: int) -> None:
    """For `worker_init_fn` of a DataLoader: what asks a whole process group to stop must not end its loader before it has saved.

    SIGTERM counts only from the process that the worker works for, which so ends workers that hang.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
