"""A fault campaign: real trainings meet a fault at a random step, are started again, and have to end where an undisturbed run ends.

    python benchmarks/faults.py                    50 runs, writes benchmarks/results/faults.json (half an hour on two busy cores)
    python benchmarks/faults.py --runs 14          each kind once

After each fault the newest checkpoint is read and checked; then the same command is given again, as a user or a batch system would, until
the run is finished. Lost are the steps that stood in the log and had to be done again: no more than lie between two saves. The model at
the end equals that of a run without faults, bit for bit. Runs that are done are kept in `--work`, so a stopped campaign goes on.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from llava_collab.evaluation.environment import write_results
from llava_collab.files import read_json, write_json
from llava_collab.training import checkpoint
from llava_collab.training.checkpoint import damage

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY, SAMPLES = 12, 3, 48
RECIPE = "train/recipes/tiny-instruct.yaml"
PLANTED = "FAULT"  # environment variable: {"kind", "step", "rank"}


@dataclass(frozen=True)
class Kind:
    """A fault: what is done to a process, and how the run is started for it."""

    do: str
    """What the process does to itself at the step (a method of `Fault`), or to the run folder after its death."""
    ranks: int = 2
    options: tuple[str, ...] = ()
    restarts: int = 0
    """Restarts that torchrun may make by itself."""
    goes_on: bool = False
    """The run has to bear the fault without ending."""
    more_lost: int = 0
    """Steps that may be lost beside those since the last save."""
    same: bool = True
    """The model at the end has to be that of the undisturbed run."""


KINDS = {
    "a rank killed, torchrun restarts": Kind("kill", restarts=1, goes_on=True),
    "a rank killed": Kind("kill"),
    "the only process killed": Kind("kill", ranks=1),
    "launcher and rank killed": Kind("kill_launcher"),
    "killed while saving": Kind("kill_saving"),
    "SIGTERM to the launcher": Kind("terminate"),
    "SIGINT to the launcher": Kind("interrupt"),
    "deadline": Kind("nothing", options=("--run.deadline-minutes", "0.005")),
    "a loss that is no number": Kind("not_finite"),
    "disk full": Kind("fill_disk"),
    "a reading process killed": Kind("kill_reader", options=("--run.num-workers", "1")),
    "a reader that hangs for a while": Kind("hang_reader", options=("--run.stall-minutes", "0.03"), goes_on=True),
    "a rank that stands still": Kind("stop", options=("--run.timeout-minutes", "0.2")),
    "an exception on one rank": Kind("fail"),
    "a checkpoint damaged afterwards": Kind("kill_then_damage", ranks=1, more_lost=EVERY),
    "pictures that vanish": Kind("delete_pictures", goes_on=True, same=False),
}


class Fault:
    """Does its kind's harm to this process, once, when the optimiser has made so many steps."""

    def __init__(self, planted: dict[str, Any]) -> None:
        self.kind, self.step, self.rank = KINDS[planted["kind"]], planted["step"], planted["rank"]
        self.data = Path(planted["data"])
        self.steps = 0
        here = int(os.environ.get("RANK", "0")) == self.rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if here:
            update = torch.optim.AdamW.step

            def step(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
                result = update(optimizer, *args, **kwargs)
                self.steps += 1
                if self.steps == self.step:
                    getattr(self, self.kind.do)()
                return result

            setattr(torch.optim.AdamW, "step", step)  # noqa: B010

    def nothing(self) -> None:
        """The options of the kind do it."""

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    kill_then_damage = kill

    def kill_launcher(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        self.kill()

    def kill_saving(self) -> None:
        checkpoint.sync_files = lambda folder: self.kill()

    def terminate(self) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def interrupt(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)

    def not_finite(self) -> None:
        torch.nn.functional.cross_entropy = lambda *args, **kwargs: args[0].sum() * math.nan

    def fill_disk(self) -> None:
        """From here no file may grow past 10 kB: a write fails as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    def kill_reader(self) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    def hang_reader(self) -> None:
        from llava_collab.data import dataset

        load = dataset.load_image

        def slow(*args: Any) -> Image.Image:
            dataset.load_image = load
            time.sleep(6)
            return load(*args)

        dataset.load_image = slow

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def fail(self) -> None:
        raise RuntimeError("planted")

    def delete_pictures(self) -> None:
        for picture in sorted(self.data.glob("*.png"))[:2]:
            picture.unlink()


@dataclass(frozen=True)
class Args:
    """Trainings that meet faults and have to end as if they had not."""

    runs: int = 50
    """Trainings; the kinds take turns."""
    seed: int = 0
    """Of steps, ranks and engines."""
    work: Path = ROOT / "runs" / "faults"
    """Folder of the runs."""
    out: Path = ROOT / "benchmarks" / "results" / "faults.json"
    """Result file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; exit code 1 if a run lost more than it may or did not end as it should."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    for engine, ranks in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)):
        reference(args.work, engine, ranks)
    draw = random.Random(args.seed)
    rows = []
    for number in tqdm(range(args.runs), unit="run"):
        name = list(KINDS)[number % len(KINDS)]
        kind = KINDS[name]
        planted = {"kind": name, "step": draw.randrange(2, STEPS), "rank": draw.randrange(kind.ranks)}
        engine = draw.choice(("ddp", "fsdp2")) if kind.ranks > 1 else "ddp"
        kept = args.work / f"run-{number:03d}.json"
        if not kept.is_file() or read_json(kept)["planted"] != planted:
            write_json(kept, {"planted": planted} | campaign(args.work, number, kind, planted, engine))
        rows.append(read_json(kept))
        if rows[-1]["wrong"]:
            tqdm.write(f"run {number}, {name}: {rows[-1]['wrong']}")
    write_results(args.out, results(rows))
    print(table(rows))
    return int(any(row["wrong"] for row in rows))


def reference(work: Path, engine: str, ranks: int) -> Path:
    """The undisturbed run."""
    out = work / f"reference-{engine}-{ranks}"
    if not (out / "finished.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        done = launch(pictures(work / "data"), out, ranks, ("--run.engine", engine))
        if done.returncode:
            raise SystemExit(f"the undisturbed run failed:\n{done.stdout[-3000:]}")
    return out


def campaign(work: Path, number: int, kind: Kind, planted: dict[str, Any], engine: str) -> dict[str, Any]:
    """One training with one fault, started again until it is finished; what it lost, and what was wrong ("" for nothing)."""
    out, data = work / f"run-{number:03d}", pictures(work / f"data-{number:03d}")
    shutil.rmtree(out, ignore_errors=True)
    began, starts, reached, lost, wrong = time.monotonic(), 0, 0, 0, ""
    fault: dict[str, Any] | None = planted | {"data": str(data)}
    while not (out / "finished.json").is_file() and starts < 8:
        done = launch(data, out, kind.ranks, ("--run.engine", engine, *kind.options), kind.restarts if fault else 0, fault)
        starts += 1
        for begun in going_on(done.stdout):  # more than one where torchrun restarts
            lost, reached = max(lost, reached - begun), max(reached, planted["step"] if fault and kind.do.startswith("kill") else 0)
        reached = max(reached, last_step(out))
        if fault is not None and kind.do == "kill_then_damage":
            harm(out / "checkpoints")
        elif fault is not None and (problem := unreadable(out / "checkpoints")):
            wrong = f"the newest checkpoint is damaged: {problem}"
        if fault is not None and kind.do == "stop":
            subprocess.run(["pkill", "-KILL", "-f", str(out)], check=False)
        fault = None if kind.do != "nothing" else fault
    allowed = EVERY + kind.more_lost
    if not (out / "finished.json").is_file():
        wrong = f"not finished after {starts} starts: {done.stdout[-300:]}"
    elif kind.goes_on and starts > 1:
        wrong = "it should have gone on by itself"
    elif lost > allowed:
        wrong = f"{lost} steps lost, {allowed} allowed"
    elif kind.same and not same(out, work / f"reference-{engine}-{kind.ranks}"):
        wrong = "the model is not that of the undisturbed run"
    elif kind.do == "hang_reader" and f"rank {planted['rank']} on" not in done.stdout:
        wrong = "the watchdog did not name the rank"
    if not wrong:
        shutil.rmtree(out)
        shutil.rmtree(data)
    seconds = round(time.monotonic() - began, 1)
    return {"engine": engine, "starts": starts, "lost": lost, "wrong": wrong, "seconds": seconds}


def launch(
    data: Path, out: Path, ranks: int, options: Sequence[str], restarts: int = 0, fault: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Train as a user does; a planted fault travels in the environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if fault is not None:
        environment[PLANTED] = json.dumps(fault)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command += [str(Path(__file__).resolve()), RECIPE, "--data.files.0.path", str(data / "samples.jsonl"), "--run.out", str(out)]
    command += [
        "--run.steps",
        str(STEPS),
        "--run.save-every",
        str(EVERY),
        "--run.no-save-first",
        "--data.max-bad-fraction",
        "0.1",
        *options,
    ]
    for _ in range(30):  # a rank that outlived its launcher holds the run folder for a moment
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False
        )
        if "another process is training in" not in done.stdout:
            return done
        time.sleep(1)
    return done


def pictures(folder: Path) -> Path:
    """A small data set of coloured squares, the same every time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for number in range(SAMPLES):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"it is {colour}, number {number}"}]
        rows.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def last_step(out: Path) -> int:
    """The last step that the log of a run has."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines() if (out / "log.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def going_on(text: str) -> list[int]:
    """The steps that stood when a start, or torchrun's restart, began, by what it said."""
    return [
        int(line.rsplit("from step ", 1)[1].split()[0]) - 1 for line in text.splitlines() if " samples, " in line and "from step " in line
    ]


def unreadable(folder: Path) -> str:
    """What is wrong with the newest checkpoint ("" for nothing, also where there is none)."""
    if not (folder / "latest").is_file():
        return ""
    return damage(folder / (folder / "latest").read_text(encoding="utf-8").strip()) or ""


def harm(folder: Path) -> None:
    """Flip a byte of the newest checkpoint's weights."""
    if not (folder / "latest").is_file():
        return
    weights = folder / (folder / "latest").read_text(encoding="utf-8").strip() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def same(left: Path, right: Path) -> bool:
    """Whether two runs ended in the same model, bit for bit."""
    a, b = (load_file(run / "model" / "model.safetensors") for run in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_kind(rows: Sequence[dict[str, Any]], value: Callable[[list[dict[str, Any]]], Any]) -> dict[str, Any]:
    """`value` of the runs of each kind."""
    return {name: value(own) for name in KINDS if (own := [row for row in rows if row["planted"]["kind"] == name])}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What docs/training.md shows."""
    lines = ["| fault | runs | starts, at most | steps lost, at most | wrong |", "| --- | ---: | ---: | ---: | ---: |"]
    figures = by_kind(
        rows, lambda own: (len(own), max(r["starts"] for r in own), max(r["lost"] for r in own), sum(bool(r["wrong"]) for r in own))
    )
    lines += [f"| {name} | {' | '.join(map(str, own))} |" for name, own in figures.items()]
    return "\n".join(lines)


def results(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the result file."""
    found = [
        {"name": f"{name}: steps lost", "value": lost, "unit": "steps", "better": "lower", "target": EVERY + KINDS[name].more_lost}
        for name, lost in by_kind(rows, lambda own: max(row["lost"] for row in own)).items()
    ]
    wrong = sum(bool(row["wrong"]) for row in rows)
    return [
        *found,
        {"name": f"runs of {len(rows)} that did not end as they should", "value": wrong, "unit": "runs", "better": "lower", "target": 0},
    ]


def child() -> int:
    """What `launch` starts: the training program, with the fault planted."""
    import importlib.util

    if PLANTED in os.environ:
        Fault(json.loads(os.environ[PLANTED]))
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train" / "train.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    return program.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(child() if RECIPE in sys.argv else main())
