"""What a run ran on and with: kept in `run.json` for the reader, not compared."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_collab.files import write_json
from llava_collab.training.fingerprint import commit

PACKAGES = ("llava-collab", "torch", "transformers", "tokenizers", "numpy", "pillow", "rouge-score", "sacrebleu", "rapidocr", "onnxruntime")


def environment(**more: Any) -> dict[str, Any]:
    """Command, date, versions and hardware, with `more` beside them."""
    program = os.path.relpath(sys.argv[0]) if os.path.isabs(sys.argv[0]) else sys.argv[0]  # records travel; folders of one machine don't
    return {
        "command": shlex.join([os.path.basename(sys.executable), program, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "accelerator": _accelerator()},
        **more,
    }


def write_results(path: Path, rows: Iterable[dict[str, Any]], **about: Any) -> None:
    """The result file of a benchmark program: its rows (name, value, unit, better, target), with `about`, hardware, command, commit."""
    import torch

    device = _accelerator() or "no GPU"
    busy = f"{os.cpu_count()} cores (load {os.getloadavg()[1]:.1f}), {torch.get_num_threads()} threads"
    about |= {"hardware": f"{platform.machine()}, {device}, {busy}, torch {torch.__version__}"}
    about |= {"command": environment()["command"], "commit": commit()}
    write_json(path, [row | about for row in rows])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
