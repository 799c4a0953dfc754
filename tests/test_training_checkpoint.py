"""Checkpoints: whole or absent, damaged ones passed over, a full disk costs nothing that was saved; states come back bit for bit."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn

from llava_collab.training import checkpoint as checkpoint_module
from llava_collab.training.checkpoint import CheckpointError, Checkpoints, damage, verify
from llava_collab.training.state import load_moments, load_random, save_moments, save_random


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a.weight": nn.Parameter(torch.randn(4, 3)), "b.bias": nn.Parameter(torch.randn(3))}


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Checkpoints(tmp_path / "run", keep_last=2, accelerator=Accelerator(cpu=True))


def _save(store: Checkpoints, step: int, parameters: dict[str, nn.Parameter]) -> Path:
    tensors = {name: p.detach() for name, p in parameters.items()}
    return store.save(step, lambda folder: save_file(tensors, folder / "model.safetensors"), parameters)


def test_save_keeps_the_last_ones_and_points_at_the_newest(store: Checkpoints, parameters: dict[str, nn.Parameter]) -> None:
    assert store.newest() is None
    for step in (5, 10, 15):
        _save(store, step, parameters)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-10", "step-15"]
    assert (store.folder / "latest").read_text() == "step-15\n" and store.newest() == store.folder / "step-15"


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "no manifest"])
def test_a_damaged_checkpoint_falls_back(store: Checkpoints, parameters: dict[str, nn.Parameter], harm: str) -> None:
    _save(store, 5, parameters)
    weights = _save(store, 10, parameters) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "truncate":
        weights.write_bytes(data[:-8])
    elif harm == "delete":
        weights.unlink()
    else:
        (weights.parent / "manifest.json").unlink()
    said: list[str] = []
    assert store.newest(said.append) == store.folder / "step-5"
    assert len(said) == 1 and "step-10 is damaged" in said[0]
    (store.folder / "step-5" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        store.newest(said.append)


def test_a_full_disk_keeps_what_was_saved(store: Checkpoints, parameters: dict[str, nn.Parameter]) -> None:
    kept = _save(store, 5, parameters)

    def full(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"could not write step-10 .*No space left.*GiB free.*untouched: step-5\. Make room"):
        store.save(10, full, parameters)
    assert damage(kept) is None and store.newest() == kept
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-5"]


def test_a_disk_that_fills_while_flushing_is_noticed(
    store: Checkpoints, parameters: dict[str, nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "sync_files", full)
    with pytest.raises(CheckpointError, match="untouched: none yet"):
        _save(store, 5, parameters)
    assert store.newest() is None


def test_saved_is_only_said_of_what_reads_back(store: Checkpoints, parameters: dict[str, nn.Parameter], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not in the saved files as they are in memory: b\.bias"):
        store.save(5, lambda folder: save_file({"a.weight": parameters["a.weight"].detach()}, folder / "model.safetensors"), parameters)
    other = {name: p.detach() + 1e-6 for name, p in parameters.items()}
    save_file(other, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight, b\.bias"):
        verify(tmp_path, parameters)


def test_optimizer_state_comes_back_bit_for_bit(parameters: dict[str, nn.Parameter], tmp_path: Path) -> None:
    def step(optimizer: torch.optim.Optimizer, values: dict[str, nn.Parameter], scale: float) -> None:
        for parameter in values.values():
            parameter.grad = scale * parameter.detach().sin()
        optimizer.step()

    first = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for scale in (1.0, -0.3):
        step(first, parameters, scale)
    save_moments({name: dict(first.state[p]) for name, p in parameters.items()}, tmp_path)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    second = torch.optim.AdamW(copies.values(), lr=0.1, fused=True)
    for name, values in load_moments(tmp_path, copies).items():
        second.state[copies[name]] = dict(values)
    for optimizer, values in ((first, parameters), (second, copies)):
        step(optimizer, values, 2.0)
    assert all(torch.equal(parameters[name], copies[name]) for name in parameters)
    with pytest.raises(ValueError, match=r"does not train: \['b\.bias'\]"):
        load_moments(tmp_path, {"a.weight": copies["a.weight"]})


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))

    draw()
    save_random(tmp_path, rank=0)
    expected = draw()
    assert load_random(tmp_path, rank=0) and draw() == expected
    assert not load_random(tmp_path, rank=1)
