"""Signals, the launcher's request and the deadline; what a rank tells the launcher; loader workers that outlive a stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_collab.training import stop
from llava_collab.training.stop import Stopper, outlive_signals, run_launched


@contextmanager
def stopper(minutes: float | None = None) -> Iterator[Stopper]:
    watching = Stopper(minutes)
    try:
        yield watching
    finally:
        watching.release()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_is_noticed(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with stopper() as watching:
        assert not watching.asked
        os.kill(os.getpid(), number)
        assert watching.asked and watching.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_sigint_stops_at_once_but_sigterm_may_come_twice() -> None:
    with stopper() as watching:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert watching.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_deadline_and_a_launchers_request_have_a_code_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopper(minutes=0) as watching:
        assert watching.asked and watching.exit_code == 75
    monkeypatch.setenv(stop.LAUNCH, str(tmp_path))
    with stopper() as watching:
        assert not watching.asked
        (tmp_path / "stop").touch()
        assert watching.asked and watching.exit_code == 75


@pytest.mark.parametrize("code", [0, 75, 143])
def test_under_a_launcher_an_orderly_end_is_0_for_torchrun(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_launched(lambda: code) == code
    monkeypatch.setenv(stop.LAUNCH, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_launched(lambda: code) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"code-3": f"{code}\n"}


def test_an_error_waits_for_the_launcher_to_end_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(stop.LAUNCH, str(tmp_path))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_launched(lambda: 1) == 1
        assert run_launched(lambda: sys.exit("error: no such recipe")) == 1
        assert run_launched(lambda: sys.exit(2)) == 2
        with pytest.raises(ConnectionError):  # a crash: torchrun starts all ranks again
            run_launched(_crash)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(waits) == 3 and {path.name for path in tmp_path.iterdir()} == {"failed"}
    assert capsys.readouterr().err == "error: no such recipe\n"


def _crash() -> int:
    raise ConnectionError


def test_loader_workers_obey_only_their_own_process() -> None:
    worker = multiprocessing.get_context("fork").Process(target=_load, daemon=True)
    worker.start()
    assert worker.pid is not None
    time.sleep(0.5)
    stranger = "import os, signal, sys; [os.kill(int(sys.argv[1]), n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", stranger, str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def _load() -> None:
    outlive_signals(0)
    while True:
        time.sleep(1)
