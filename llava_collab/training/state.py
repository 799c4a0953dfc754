"""What a resume needs beside the weights: optimiser moments and random states, as safetensors and JSON (never pickle)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_collab.files import read_json, write_json
from llava_collab.training.components import Named

OPTIMIZER = "optimizer.safetensors"
Moments = dict[str, dict[str, Tensor]]


def save_moments(moments: Moments, folder: Path) -> None:
    """Write `optimizer.safetensors`: every tensor of the optimiser's state, named `<parameter>/<moment>`."""
    save_file({f"{name}/{moment}": value for name, own in moments.items() for moment, value in own.items()}, folder / OPTIMIZER)


def load_moments(folder: Path, trainable: Named) -> Moments:
    """What `save_moments` wrote. Raises ValueError where it is of parameters that are not trained here."""
    moments: Moments = {}
    for key, value in load_file(folder / OPTIMIZER).items():
        name, moment = key.rsplit("/", 1)
        moments.setdefault(name, {})[moment] = value
    if unknown := sorted(moments.keys() - trainable.keys()):
        raise ValueError(f"{folder}: optimiser state of parameters that this recipe does not train: {unknown[:5]}.")
    return moments


def save_random(folder: Path, rank: int) -> None:
    """Write this rank's states of Python's, numpy's, torch's and CUDA's generators: `random-<rank>.json` and `.safetensors`."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {"python": [version, list(words), gauss], "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached]}
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    write_json(folder / f"random-{rank}.json", plain)
    save_file(tensors, folder / f"random-{rank}.safetensors")


def load_random(folder: Path, rank: int) -> bool:
    """Restore what `save_random` wrote; False where this rank had not saved any (the run had fewer ranks then)."""
    if not (folder / f"random-{rank}.json").exists():
        return False
    plain: dict[str, Any] = read_json(folder / f"random-{rank}.json")
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    tensors = load_file(folder / f"random-{rank}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    return True
