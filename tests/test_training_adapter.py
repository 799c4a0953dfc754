"""Training a model's own low-rank experts: what learns, what checkpoints hold, resuming, the finished model, and what it would cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import arguments, log_rows, losses, run_here
from safetensors.torch import load_file
from synthetic import write_shapes

from llava_collab.adapters import LowRankExperts
from llava_collab.models.build import load
from llava_collab.training.estimate import estimate
from llava_collab.training.opening import store_delta
from llava_collab.training.recipe_file import parse_command

TEAM = {"method": "teamlora", "experts": 2, "rank": 2, "alpha": 4.0}
OWN = ("--model.adapter", json.dumps(TEAM), "--tune.llm", "frozen", "--tune.projector", "frozen", "--optim.lr", "1e-2")
ALONE = ("--model.visual-expert", "null", "--model.language-expert", "null")
STEPS = ("--run.steps", "12", "--run.save-every", "6", "--run.no-save-first")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 40)


def test_only_the_adapter_learns_and_is_kept(data: Path, tmp_path: Path) -> None:
    assert run_here("tiny-instruct", data, tmp_path, *OWN, *ALONE, *STEPS) == 0
    rows = log_rows(tmp_path)
    assert set(rows[-1]["lr"]) == {"adapter"} and rows[-1]["loss"] < rows[0]["loss"] - 0.05
    kept = load_file(tmp_path / "checkpoints/step-12/trainable.safetensors")
    assert kept and all(".adapter." in name for name in kept)
    assert not (tmp_path / "checkpoints/step-12/model.safetensors").exists()
    model, _ = load(tmp_path / "model")
    assert any(isinstance(module, LowRankExperts) for module in model.modules())
    for name, value in kept.items():
        torch.testing.assert_close(model.state_dict()[name].float(), value, rtol=1e-2, atol=1e-3)
    folder = store_delta(tmp_path, tmp_path / "delta")
    small, _ = load(folder)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())
    assert set(load_file(folder / "delta.safetensors")) >= set(kept)


def test_a_run_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    more = ("--model.adapter", json.dumps(TEAM | {"routing": "sample", "balance": 0.1, "dropout": 0.2}), "--run.gradient-checkpointing")
    run = (*OWN, *more, *STEPS)
    assert run_here("tiny-instruct", data, tmp_path / "whole", *run) == 0
    assert run_here("tiny-instruct", data, tmp_path / "parts", *run, "--run.deadline-minutes", "0") == 75
    assert run_here("tiny-instruct", data, tmp_path / "parts", *run) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_learns_beside_the_experts_and_beside_lora(data: Path, tmp_path: Path) -> None:
    both = ("--tune.llm", "lora", "--tune.lora.r", "2", "--tune.lora.target", "q_proj", "gate_proj")
    assert run_here("tiny-instruct", data, tmp_path, *OWN, *both, *STEPS) == 0
    assert set(log_rows(tmp_path)[-1]["lr"]) == {"adapter", "llm", "visual_expert", "language_expert"}
    model, _ = load(tmp_path / "model")
    names = set(model.state_dict())
    assert not any("lora_" in name or "base_layer" in name for name in names) and any(".adapter." in name for name in names)


def test_the_estimate_counts_what_is_built(data: Path, tmp_path: Path) -> None:
    recipe = parse_command(arguments("tiny-instruct", data, tmp_path, *OWN, *STEPS), "")
    found = estimate(recipe)
    model, _ = load(_trained(data, tmp_path))
    count = sum(p.numel() for name, p in model.named_parameters() if ".adapter." in name)
    assert found.parts["adapter"].parameters == found.parts["adapter"].trainable == count
    layer = next(module for module in model.modules() if isinstance(module, LowRankExperts))
    assert found.parts["adapter"].forward_flops > 2 * found.tokens * (layer.down.numel() + layer.up.numel())
    without = estimate(parse_command(arguments("tiny-instruct", data, tmp_path, "--tune.llm", "frozen", *STEPS), ""))
    assert found.parts["llm"].forward_flops == without.parts["llm"].forward_flops


def _trained(data: Path, folder: Path) -> Path:
    assert run_here("tiny-instruct", data, folder / "run", *OWN, *STEPS) == 0
    return folder / "run/model"


def test_four_bit_bases_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_here("tiny-instruct", data, tmp_path, *OWN, "--tune.llm", "lora4bit", *STEPS)
    assert "model.adapter changes them" in capsys.readouterr().err
