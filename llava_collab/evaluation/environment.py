"""What a run ran on and with: kept in `run.json` for the reader, not compared."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from importlib import metadata
from typing import Any

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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
