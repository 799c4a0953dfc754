"""What is installed, what works, and why something does not: the first thing to run when an import fails.

An import error is followed to its root: "Could not import module X" of a wrapper says little, the last link of the chain says it all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable

from .torchvision_guard import mend_torchvision

CORE = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "PIL", "yaml", "tyro", "tqdm")
OPTIONAL = {  # module -> what it is for, and how to get it
    "gguf": "convert SmolLM2 (pip install 'llava_collab[assets]')",
    "onnx": "convert DINOv2 (pip install 'llava_collab[assets]')",
    "zstandard": "read GCompris pictures (pip install 'llava_collab[assets]')",
    "rouge_score": "ROUGE-L (pip install 'llava_collab[eval]')",
    "sacrebleu": "BLEU (pip install 'llava_collab[eval]')",
    "matplotlib": "plots (pip install 'llava_collab[eval]')",
    "sklearn": "small text models and routers on text (pip install 'llava_collab[collab]')",
    "ijson": "read the annotation files of CMT-public (pip install 'llava_collab[public]')",
    "tensorboard": "a second log (pip install 'llava_collab[train]')",
    "bitsandbytes": "4-bit LoRA on CUDA (pip install 'llava_collab[gpu]')",
    "deepspeed": "ZeRO (pip install 'llava_collab[dist]')",
    "flash_attn": "faster attention on CUDA (pip install --no-build-isolation flash-attn); SDPA is used without it",
    "torchvision": "needed by timm and open_clip (pip install -c constraints-cpu.txt 'llava_collab[towers]')",
    "timm": "more vision towers (pip install -c constraints-cpu.txt 'llava_collab[towers]')",
    "open_clip": "more vision towers (pip install -c constraints-cpu.txt 'llava_collab[towers]')",
}
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "rouge_score": "rouge-score",
    "flash_attn": "flash-attn",
    "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn",
}


def root_cause(error: BaseException) -> BaseException:
    """The first exception of the chain that led to `error`."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def try_import(module: str) -> str | None:
    """None if `module` imports, else its root cause in one line."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a broken wheel raises is what is to be reported
        cause = root_cause(error)
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return None


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _modules(modules: Iterable[str], required: bool) -> tuple[list[str], bool]:
    lines, well = [], True
    for module in modules:
        installed = importlib.util.find_spec(module) is not None
        failure = try_import(module) if installed else None
        if installed and failure is None:
            lines.append(f"  ok       {module} {_version(module)}")
        elif installed:
            well = False
            lines.append(f"  BROKEN   {module} {_version(module)}: {failure}")
        else:
            well = well and not required
            lines.append(f"  {'MISSING' if required else 'absent '}  {module}" + (f": {OPTIONAL[module]}" if module in OPTIONAL else ""))
    return lines, well


def _devices() -> list[str]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"  cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {capability}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"  cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return lines if len(lines) > 1 else [*lines, "  no CUDA device"]


def report() -> tuple[str, bool]:
    """The whole report, and whether everything installed works and nothing required is missing."""
    core, core_well = _modules(CORE, required=True)
    optional, optional_well = _modules(OPTIONAL, required=False)
    floors = (
        "llava_collab",
        "llava_collab.data.dataset",
        "llava_collab.models",
        "llava_collab.training.batches",
        "llava_collab.evaluation",
    )
    own = {name: try_import(name) for name in floors}
    lines = [f"python {platform.python_version()} ({sys.executable}), {platform.platform()}"]
    lines += ["core:", *core, "optional:", *optional]
    if mend_torchvision():
        lines.append(
            "  note     torchvision was built for CUDA and torch was not; llava_collab makes it importable, without its C++ operators"
        )
    lines.append("llava_collab:")
    for name, failure in own.items():
        lines.append(f"  ok       {name}" if failure is None else f"  BROKEN   {name}: {failure}")
    if try_import("torch") is None:
        lines += ["devices:", *_devices()]
    from .assets import cache_root, status

    rows = status()
    ready = sum(row.state == "unpacked" for row in rows)
    lines += [f"assets: {ready} of {len(rows)} packages in {cache_root()} (llava-collab assets)"]
    return "\n".join(lines), core_well and optional_well and not any(own.values())
