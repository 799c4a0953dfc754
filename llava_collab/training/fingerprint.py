"""Short hashes of what a run stands on: versions, the library's own files, the recipe, the data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from torch.cuda import nccl

import llava_collab
from llava_collab.training.recipe import Recipe
from llava_collab.training.recipe_file import to_dict

PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy", "pillow", "deepspeed")
BLOCK, BLOCKS = 2**20, 64


def versions() -> dict[str, str]:
    """Of what decides how a step is computed."""
    found = {"python": platform.python_version(), "llava-collab": llava_collab.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def commit() -> str | None:
    """The commit of the checkout that this library lies in; None where there is none, or no git."""
    command = ["git", "-C", str(Path(llava_collab.__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def source_hash() -> str:
    """Of every Python file of the library: edits that are not committed count too."""
    root = Path(llava_collab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def recipe_hash(recipe: Recipe) -> str:
    """Of a recipe with all its keys."""
    return short(json.dumps(to_dict(recipe), sort_keys=True).encode())


def data_hash(path: str) -> str:
    """Size and hash of a file of the recipe; of a folder those of the names and sizes in it; of a URL nothing.

    Hashed are 64 blocks of 1 MiB, spread evenly: all of a file up to 64 MiB, at most that much of a larger one, whose size counts too.
    Pictures that a file names are not looked at. Raises OSError where there is nothing to read.
    """
    if "://" in path or path.startswith("pipe:"):
        return "not looked at"
    place = Path(path)
    if place.is_dir():
        listing = sorted(f"{entry.name} {entry.stat().st_size}" for entry in os.scandir(place))
        return f"{len(listing):,} entries, {short(json.dumps(listing).encode())}"
    size = place.stat().st_size
    digest = hashlib.sha256()
    with place.open("rb") as stream:
        for block in range(min(BLOCKS, -(-size // BLOCK))):
            stream.seek(block * BLOCK if size <= BLOCKS * BLOCK else block * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return f"{size:,} bytes, {digest.hexdigest()[:12]}"


def short(content: bytes) -> str:
    """The first twelve hex digits of a sha256."""
    return hashlib.sha256(content).hexdigest()[:12]
