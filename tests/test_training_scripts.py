"""The launchers: help, the command they would run, what they refuse, and how they end, with a stand-in for torchrun that plays a role."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT, arguments, losses, run_here
from slurm import agents, free_ports, processes, wait_for
from synthetic import write_shapes

LAUNCHERS = ("pretrain.sh", "finetune.sh", "finetune_lora.sh", "train.sh", "train.slurm")
RECIPE = "train/recipes/tiny-instruct.yaml"
TORCHRUN = "-m torch.distributed.run --nproc-per-node {} --max-restarts 3 --signals-to-handle SIGINT "

PLAYER = """#!/usr/bin/env bash
# Stands in for python -m torch.distributed.run: ROLE says what becomes of the ranks. NODE 0 plays LEAD on its first turn, if that is set.
echo "$*" >>"$STAGE/calls-${NODE:-0}"
turn=$(wc -l <"$STAGE/calls-${NODE:-0}")
[ -n "${LEAD:-}" ] && [ "${NODE:-0}" = 0 ] && [ "$turn" = 1 ] && ROLE=$LEAD
code() { echo "$1" >"$LLAVA_COLLAB_LAUNCH/code-0"; exit 0; }
case "$ROLE" in
  finish) code 0 ;;
  deadline) code 75 ;;
  error) touch "$LLAVA_COLLAB_LAUNCH/failed"; sleep 60 ;;
  die) exit 1 ;;
  killed) setsid sleep 60 & kill -KILL $$ ;;
  work) setsid sleep 60 & touch "$STAGE/working-${NODE:-0}"; until [ -e "$LLAVA_COLLAB_LAUNCH/stop" ]; do sleep 0.05; done; code 75 ;;
  hang) setsid sleep 60 & touch "$STAGE/working-${NODE:-0}"; while :; do sleep 0.05; done ;;
esac
"""
SSH = """#!/usr/bin/env bash
# Stands in for ssh: options, the host, then a command that reads its input
while [[ "$1" == -* ]]; do shift 2; done
shift
exec env --default-signal=HUP,INT,TERM -i PATH=/usr/bin:/bin STAGE="$STAGE" TMPDIR="$TMPDIR" "$@"
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that put the stand-ins in place; at the end nothing that was started is left."""
    folder = tmp_path / "stage"
    folder.mkdir()
    for name, text in (("python", PLAYER), ("ssh", SSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    yield {"PATH": path, "STAGE": str(folder), "PYTHON": str(folder / "python"), "GPUS": "1", "CARRY": "ROLE LEAD", "TMPDIR": str(tmp_path)}
    left = processes(STAGE=str(folder))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and not list(tmp_path.glob("llava-collab.*"))


def _start(*command: str, **variables: str) -> subprocess.Popen[str]:
    call = [str(ROOT / "scripts" / command[0]), *command[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    return subprocess.Popen(call, env=os.environ | variables, text=True, cwd=ROOT, preexec_fn=_background, **pipes)


def _background() -> None:
    """A shell can't trap what it inherits as ignored: hang-ups under nohup (not meant here), SIGQUIT in a script's background (meant)."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    started = _start(*command, **variables)
    out, told = started.communicate(timeout=60)
    return subprocess.CompletedProcess(command, started.returncode, out, told)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_teaches(name: str) -> None:
    told = subprocess.run(["bash", str(ROOT / "scripts" / name), "--help"], capture_output=True, text=True, timeout=60)
    words = ("MODEL", "DATA", "IMAGES", "OUT", "ENGINE", "GPUS", "RESTARTS", "--dry-run", "--preflight", "Exit codes")
    recipe = [] if name in ("train.sh", "train.slurm") else ["stage"]
    assert told.returncode == 0 and not [word for word in (*words, *recipe) if word.lower() not in told.stdout.lower()], told.stdout


@pytest.mark.parametrize(("name", "recipe"), [("pretrain", "align"), ("finetune", "instruct"), ("finetune_lora", "instruct-lora")])
def test_llavas_names_and_variables(name: str, recipe: str) -> None:
    one = shlex.split(_run(f"{name}.sh", "--dry-run", GPUS="1", PYTHON="python3").stdout)
    assert one[:-2] == shlex.split(f"python3 {TORCHRUN.format(1)} --standalone")
    assert one[-2:] == [str(ROOT / "train" / "train.py"), str(ROOT / f"train/recipes/vicuna-7b-{recipe}.yaml")] and os.path.exists(one[-1])
    variables = {"GPUS": "8", "DATA": "a b.json", "IMAGES": "i", "OUT": "o", "MODEL": "m", "PRETRAINED": "p", "ENGINE": "zero3"}
    many = shlex.split(_run(f"{name}.sh", "--dry-run", "--optim.lr", "1e-4", **variables, RECIPE="r.yaml").stdout)
    options = "--model.language-model m --model.init-from p --data.files.0.path 'a b.json' --data.files.0.image-root i --run.out o"
    wanted = f"python {TORCHRUN.format(8)} --standalone {ROOT}/train/train.py r.yaml {options} --run.engine zero3 --optim.lr 1e-4"
    assert many == shlex.split(wanted)


def test_a_dry_run_shows_every_host_and_every_node() -> None:
    hosts = _run("train.sh", RECIPE, "--dry-run", "--preflight", HOSTS="a me@b", GPUS="4", PORT="7").stdout
    assert "ssh me@b bash -s" in hosts and "ADDRESSES=a\\ b NODE=1" in hosts
    assert hosts.count("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:7 --rdzv-id run-") == 2
    assert "is_host=false --local-addr b -m llava_collab.cli preflight train/recipes/tiny-instruct.yaml" in hosts
    slurm = subprocess.run(
        ["bash", "scripts/train.slurm", RECIPE, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert "#SBATCH --requeue" in slurm and "srun --nodes=1" in slurm and "torch.distributed.run" in slurm


@pytest.mark.parametrize(
    ("arguments", "variables", "word"), [((), {}, "name a recipe first"), ((RECIPE,), {"GPUS": "all"}, "GPUS must be a")]
)
def test_what_can_not_be_meant_is_refused(arguments: tuple[str, ...], variables: dict[str, str], word: str) -> None:
    refused = _run("train.sh", *arguments, "--dry-run", **variables)
    assert refused.returncode == 2 and word in refused.stderr


@pytest.mark.parametrize(
    ("role", "alone", "of_many"), [("finish", 0, 0), ("deadline", 75, 75), ("error", 1, 200), ("die", 70, 201), ("killed", 137, 137)]
)
def test_how_a_node_ends(role: str, alone: int, of_many: int, stage: dict[str, str]) -> None:
    assert _run("train.sh", RECIPE, ROLE=role, **stage).returncode == alone
    assert _run("launch/on_node.sh", "program", ROLE=role, ADDRESSES="a b", NODE="1", **stage).returncode == of_many


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)])
def test_a_signal_to_a_node_asks_the_ranks_to_save(number: signal.Signals, code: int, stage: dict[str, str]) -> None:
    running = _start("train.sh", RECIPE, ROLE="work", **stage)
    wait_for("the ranks work", (Path(stage["STAGE"]) / "working-0").exists, 20)
    running.send_signal(number)
    _, told = running.communicate(timeout=20)
    assert running.returncode == code and "the ranks finish their step and save" in told


def test_a_second_ctrl_c_ends_what_does_not_listen(stage: dict[str, str]) -> None:
    running = _start("train.sh", RECIPE, ROLE="hang", **stage)
    wait_for("the ranks hang", (Path(stage["STAGE"]) / "working-0").exists, 20)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(0.7)
    _, told = running.communicate(timeout=20)
    assert running.returncode == 137 and "ending all ranks" in told


def test_hosts_finish_and_get_what_is_carried(stage: dict[str, str]) -> None:
    done = _run("train.sh", RECIPE, HOSTS="a b", ROLE="finish", NCCL_DEBUG="it's $HOME", **stage)
    assert done.returncode == 0, done.stderr
    calls = [(Path(stage["STAGE"]) / f"calls-{node}").read_text() for node in (0, 1)]
    assert "--local-addr a" in calls[0] and "--local-addr b" in calls[1] and all(RECIPE in call for call in calls)


def test_ctrl_c_stops_all_hosts_and_twice_ends_them(stage: dict[str, str]) -> None:
    for role, times, code in (("work", 1, 130), ("hang", 2, 137)):
        running = _start("train.sh", RECIPE, HOSTS="a b", ROLE=role, **stage)
        for node in (0, 1):
            wait_for("the hosts work", (Path(stage["STAGE"]) / f"working-{node}").exists, 20)
        for _ in range(times):
            running.send_signal(signal.SIGINT)
            time.sleep(0.7)
        running.communicate(timeout=20)
        assert running.returncode == code
        for node in (0, 1):
            (Path(stage["STAGE"]) / f"working-{node}").unlink()


def test_no_rank_outlives_a_launcher_that_was_killed(stage: dict[str, str]) -> None:
    running = _start("train.sh", RECIPE, HOSTS="a b", ROLE="work", **stage)
    for node in (0, 1):
        wait_for("the hosts work", (Path(stage["STAGE"]) / f"working-{node}").exists, 20)
    running.kill()
    running.communicate(timeout=20)
    wait_for("the hosts stopped", lambda: not processes(STAGE=stage["STAGE"]), 20)


def test_a_lost_host_takes_the_others_along_and_all_start_again(stage: dict[str, str]) -> None:
    again = _run("train.sh", RECIPE, HOSTS="a b", ROLE="finish", LEAD="killed", **stage)
    assert again.returncode == 0 and "a left with code 137" in again.stderr and "starting all hosts again (1 of 3)" in again.stderr
    assert len((Path(stage["STAGE"]) / "calls-0").read_text().splitlines()) == 2
    (Path(stage["STAGE"]) / "calls-0").unlink()
    error = _run("train.sh", RECIPE, HOSTS="a b", ROLE="hang", LEAD="error", **stage)
    assert error.returncode == 1 and "again" not in error.stderr


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_papers_two_stages_follow_one_another(size: str, stage: dict[str, str]) -> None:
    help_text = _run(f"paper_{size}.sh", "--help")
    assert help_text.returncode == 0 and "in two stages" in help_text.stdout and "--dry-run" in help_text.stdout
    calls = Path(stage["STAGE"]) / "calls-0"
    done = _run(f"paper_{size}.sh", "--run.seed", "1", ROLE="finish", **stage)
    first, second = (f"train/train.py train/recipes/vicuna-{size}-{name}.yaml --run.seed 1" for name in ("align", "instruct"))
    assert done.returncode == 0 and [first in line for line in calls.read_text().splitlines()] == [True, False]
    assert second in calls.read_text().splitlines()[1]
    assert _run(f"paper_{size}.sh", ROLE="deadline", **stage).returncode == 75 and len(calls.read_text().splitlines()) == 3
    sbatch = Path(stage["STAGE"]) / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$*" >>"$STAGE/sbatch-calls"; wc -l <"$STAGE/sbatch-calls"\n')
    sbatch.chmod(0o755)
    assert _run(f"paper_{size}.sh", SBATCH="--nodes 4", **stage).returncode == 0
    jobs = (Path(stage["STAGE"]) / "sbatch-calls").read_text().splitlines()
    assert jobs[0] == f"--parsable --nodes 4 scripts/train.slurm train/recipes/vicuna-{size}-align.yaml"
    assert jobs[1] == f"--parsable --nodes 4 --dependency=afterok:1 scripts/train.slurm train/recipes/vicuna-{size}-instruct.yaml"


@pytest.mark.slow
def test_the_papers_dry_run() -> None:
    told = subprocess.run(["bash", "scripts/paper_7b.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    for stage in ("align", "instruct"):
        assert f"scripts/train.sh train/recipes/vicuna-7b-{stage}.yaml" in told.stdout
    assert told.stdout.count("GPUs needs at least: ddp") == 2 and told.stdout.count("hours on 8 GPUs") == 4


@pytest.mark.slow
def test_two_hosts_lose_a_torchrun_and_lose_no_more_than_the_steps_since_the_last_save(stage: dict[str, str], tmp_path: Path) -> None:
    """The real program on two "hosts"; what SLURM's tests show on its nodes, also where no SLURM can run."""
    data = write_shapes(tmp_path / "shapes")
    steps = ("--run.steps", "12", "--run.save-every", "4", "--run.no-save-first")
    assert run_here("tiny-instruct", data, tmp_path / "straight", *steps) == 0
    command = arguments("tiny-instruct", data, tmp_path / "run", *steps)
    real = {"PYTHON": shutil.which("python") or "python", "PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    real |= {"CARRY": "CUDA_VISIBLE_DEVICES", "PYTHONPATH": str(ROOT)}
    running = _start("train.sh", *command, HOSTS="127.0.0.1 127.0.0.1", **(stage | real))
    wait_for("a checkpoint", (tmp_path / "run/checkpoints/latest").exists, 180)
    (agent,) = agents(STAGE=stage["STAGE"], NODE="1")
    os.kill(agent, signal.SIGKILL)
    _, told = running.communicate(timeout=240)
    assert running.returncode == 0 and "starting all hosts again (1 of 3)" in told, told
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_clean() -> None:
    files = [str(path) for path in (*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / "scripts/train.slurm", ROOT / ".ci/run")]
    checked = subprocess.run(["shellcheck", "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
