"""The real sbatch script on a real SLURM of two nodes, training `tiny`: to the end, out of time, and with a node's torchrun killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import log_rows, losses
from slurm import Slurm, agents, cluster, processes, unavailable, wait_for
from synthetic import write_shapes

pytestmark = pytest.mark.slow
RECIPE = "train/recipes/tiny-instruct.yaml"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := unavailable():
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def command(data: Path, out: Path, steps: int) -> tuple[str, ...]:
    where = ("--data.files.0.path", str(data), "--run.out", str(out))
    return (RECIPE, *where, "--run.steps", str(steps), "--run.save-every", "10", "--run.no-save-first")


def step(out: Path) -> int:
    return len(log_rows(out)) if (out / "log.jsonl").exists() else 0


@pytest.fixture(scope="module")
def straight(slurm: Slurm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty steps on two nodes without a break."""
    folder = tmp_path_factory.mktemp("straight")
    job = slurm.submit(folder / "job.log", *command(data, folder / "run", 30))
    state = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"]
    assert state == "COMPLETED", (folder / "job.log").read_text(errors="replace")
    return folder


def test_two_nodes_train_to_the_end(straight: Path) -> None:
    assert step(straight / "run") == 30 and (straight / "run" / "model").exists()
    assert {path.name for path in (straight / "run/checkpoints/step-30").glob("random-*.json")} == {"random-0.json", "random-1.json"}


def test_when_its_time_is_up_a_job_saves_and_comes_back(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit(log, *command(data, out, 100_000), options=("--time=30", "--signal=B:USR1@60"))
    wait_for("five steps", lambda: step(out) >= 5, 180)
    minutes = int(slurm.job(job)["RunTime"].split(":")[1]) + 2  # one to two from now: the signal comes within the next
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_for("the job was put back", lambda: slurm.job(job)["Restarts"] == "1", 120)
    told = log.read_text(errors="replace")
    stopped = int(re.findall(r"stopped after step (\d+) of", told)[-1])
    assert "saving, then back into the queue" in told and (out / f"checkpoints/step-{stopped}").exists()
    wait_for("it goes on", lambda: step(out) > stopped + 3, 180)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    assert f"resuming from {out}/checkpoints/step-{stopped}" in log.read_text(errors="replace")
    assert [row["step"] for row in log_rows(out)] == list(range(1, step(out) + 1))
    wait_for("the job's processes are gone", lambda: not processes(SLURM_JOB_ID=job, SLURM_CONF=str(slurm.folder / "slurm.conf")), 30)


def test_a_killed_agent_costs_the_steps_since_the_last_save(slurm: Slurm, data: Path, straight: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit(log, *command(data, out, 30))
    wait_for("twelve steps", lambda: step(out) >= 12, 180)
    (agent,) = agents(SLURM_JOB_ID=job, SLURM_NODEID="1", SLURM_CONF=str(slurm.folder / "slurm.conf"))
    os.kill(agent, signal.SIGKILL)
    state = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"]
    told = log.read_text(errors="replace")
    assert state == "COMPLETED", told
    assert "starting all again (1 of 3)" in told and "resuming from" in told
    assert losses(out) == losses(straight / "run")
