"""What bf16 costs under each engine: the same small training in fp32 and in bf16, by how far its losses are from those of fp32.

    python benchmarks/engine_precision.py          writes benchmarks/results/engine_precision.json

Two ranks on the CPU, the `tiny` recipe. In fp32 all engines have to agree. In bf16 they differ in what stays fp32: `ddp` keeps trained
weights and the residual stream fp32 and multiplies in bf16; `fsdp2` computes whole blocks in bf16, the generators in fp32 from fp32
weights; under `zero2` and `zero3` all weights of the model are bf16, the generators' too (they compute in fp32 from rounded weights), and
only DeepSpeed's master copies are fp32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from tqdm import tqdm

from llava_collab.evaluation.environment import write_results

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class Args:
    """The same training under each engine, in fp32 and bf16."""

    steps: int = 60
    """Optimiser steps."""
    ranks: int = 2
    """Processes."""
    out: Path = ROOT / "benchmarks" / "results" / "engine_precision.json"
    """Result file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print a table."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    engines = [name for name in ENGINES if not name.startswith("zero") or importlib.util.find_spec("deepspeed") is not None]
    with tempfile.TemporaryDirectory() as place:
        data = write_data(Path(place) / "data")
        jobs = [(engine, precision) for precision in ("fp32", "bf16") for engine in engines]
        losses = {job: train(data, Path(place) / "-".join(job), *job, args) for job in tqdm(jobs, unit="run")}
    exact = losses["ddp", "fp32"]
    rows = []
    print("| engine | precision | largest loss difference from ddp in fp32 | mean | last loss |\n| --- | --- | ---: | ---: | ---: |")
    for (engine, precision), found in losses.items():
        gaps = [abs(a - b) for a, b in zip(found, exact, strict=True)]
        print(f"| {engine} | {precision} | {max(gaps):.2g} | {sum(gaps) / len(gaps):.2g} | {found[-1]:.3f} |")
        target = 1e-5 if precision == "fp32" else None
        name = f"{engine}, {precision}: largest loss difference from ddp in fp32"
        rows.append({"name": name, "value": max(gaps), "unit": "nats", "better": "lower", "target": target})
    write_results(args.out, rows)
    return 0


def train(data: Path, out: Path, engine: str, precision: str, args: Args) -> list[float]:
    """The losses of one training. Raises SystemExit with its output where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks), "train/train.py"]
    command += ["train/recipes/tiny-instruct.yaml", "--data.files.0.path", str(data), "--run.out", str(out), "--run.engine", engine]
    command += ["--run.precision", precision, "--run.steps", str(args.steps), "--run.save-every", str(args.steps), "--run.no-save-first"]
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine}, {precision} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path) -> Path:
    """Coloured squares and what to say of them."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(64):
        colour = ("red", "green", "blue", "yellow")[number % 4]
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": f"it is {colour}" + " indeed" * (number % 3)},
        ]
        rows.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "samples.jsonl"


if __name__ == "__main__":
    sys.exit(main())
