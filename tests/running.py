"""The programs as modules; runs `train/train.py` inside the test process (one import of torch for many runs) or as a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "train" / "recipes"


def program(path: str = "train/train.py") -> ModuleType:
    """A program of the tree as a module."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_program", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def arguments(recipe: str, data: Path, out: Path, *overrides: str) -> list[str]:
    """A command line of the training program."""
    return [str(RECIPES / f"{recipe}.yaml"), "--data.files.0.path", str(data), "--run.out", str(out), *overrides]


def run_here(recipe: str, data: Path, out: Path, *overrides: str) -> int:
    """Train in this process; returns the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return program().main(arguments(recipe, data, out, *overrides))


def run_apart(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a Python command line in a process of its own, from the repository root, on one thread."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def log_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of every logged step."""
    return [row["loss"] for row in log_rows(out)]
