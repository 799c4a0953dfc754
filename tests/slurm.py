"""A real SLURM with two nodes on this machine, for as long as a test needs it; its keys, files and sockets lie in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from running import ROOT

DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
KillWait=10
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: how long a job that was put back into the queue waits before it may start again (two minutes by default)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def unavailable() -> str | None:
    """Why no SLURM can run here, after trying to install one; None if one can."""
    if os.getuid() != 0:
        return "SLURM's daemons need root"
    if all(map(shutil.which, DAEMONS)):
        return None
    done = subprocess.run(["bash", str(ROOT / "scripts/install_slurm.sh")], capture_output=True, text=True, timeout=300)
    return None if done.returncode == 0 else f"no SLURM, and it can't be installed: {(done.stderr or done.stdout).strip()[-300:]}"


def wait_for(what: str, ready: Callable[[], object], seconds: float) -> None:
    """Return when `ready()` is true; AssertionError naming `what` after so many seconds."""
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def processes(**variables: str) -> list[int]:
    """Processes started with these environment variables."""
    wanted = [f"{name}={value}".encode() for name, value in variables.items()]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            if not set(wanted) - set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def agents(**variables: str) -> list[int]:
    """The torchrun processes among `processes`."""
    return [pid for pid in processes(**variables) if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    folder: Path

    def call(self, *command: str, **variables: str) -> str:
        """What one of SLURM's commands says, called from the repository's root."""
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")} | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """`sbatch` the training script on both nodes, a rank on each; returns the job's number."""
        python = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "GPUS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        options = ("--parsable", "--nodes=2", f"--output={output}", *options)
        port = str(free_ports(1)[0])
        command = ("sbatch", *options, "scripts/train.slurm", *arguments)
        return self.call(*command, **(python | {"PORT": port, "SLURM_WAIT": "5"} | variables))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """The job, once it is in one of these states."""
        wait_for(f"job {number} is {' or '.join(states)}", lambda: self.job(number)["JobState"] in states, seconds)
        return self.job(number)


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Start a cluster; at the end nothing of it is left. Raises RuntimeError with what the daemons said where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.chmod(0o755)
    text = CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    munge = [f"--{name}={folder}/munge.{kind}" for name, kind in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    commands = [
        ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    slurm = Slurm(folder)
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
                if command[0] == "munged":
                    wait_for("munge's socket", (folder / "munge.socket").exists, 10)
        try:
            wait_for("two idle nodes", lambda: _answer(slurm, "sinfo", "--noheader", "--format=%t %D") == "idle 2", 30)
        except AssertionError as error:
            raise RuntimeError(f"{error}\n{(folder / 'daemons.log').read_text(errors='replace')[-2000:]}") from error
        yield slurm
    finally:
        for number in (_answer(slurm, "squeue", "--noheader", "--format=%i") or "").split():
            _answer(slurm, "scancel", "--signal=KILL", "--full", number)
            _answer(slurm, "scancel", number)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in processes(SLURM_CONF=environment["SLURM_CONF"]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _answer(slurm: Slurm, *command: str) -> str | None:
    """What a command says, or None where it fails (a daemon that is not up yet, or no more)."""
    try:
        return slurm.call(*command)
    except (AssertionError, subprocess.TimeoutExpired):
        return None
