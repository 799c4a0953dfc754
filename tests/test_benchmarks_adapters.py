"""The program that times low-rank experts: what it compares computes the same, shares its base, and trains what it should."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from running import ROOT, program
from transformers import LlamaConfig, LlamaModel


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return program("benchmarks/adapters.py")


SMALL = {"device": "cpu", "width": 128, "inner": 64, "layers": 1, "batch": 2, "tokens": 16, "rank": 2, "experts": (3,), "repeats": 1}


def test_fused_and_unfused_are_one_function(bench: ModuleType) -> None:
    assert bench.same_function(bench.Args(**SMALL), torch.device("cpu")) < 1e-6


def test_every_variant_trains_its_adapters_and_nothing_else(bench: ModuleType) -> None:
    args, device = bench.Args(**SMALL), torch.device("cpu")
    base = LlamaModel(LlamaConfig(hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
    base.requires_grad_(False)
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    built = bench.variants(args, base, 3, device)
    per_rank, routers = 3 * (128 + 64) * 2, 3 * (128 + 128 + 64)  # 2 columns of three layers; a row an expert
    expected = {"LoRA r": per_rank, "LoRA kr": 3 * per_rank, "peft's k LoRAs": 3 * per_rank}
    expected |= {name: 3 * per_rank + routers for name in ("MoELoRA unfused", "MoELoRA unfused, dropout on x", "MoELoRA fused")}
    expected["TeamLoRA fused"] = 3 * per_rank + routers + 3 * 9
    for name, variant in built.items():
        count = sum(parameter.numel() for parameter in variant.trained)
        assert count == expected.get(name, count) and {parameter.dtype for parameter in variant.trained} == {torch.float32}
        before = [parameter.clone() for parameter in variant.trained]
        variant.train_step()
        assert all(not torch.equal(a, b) for a, b in zip(before, variant.trained, strict=True)), name
        variant.prefill()
        variant.decode()
    for name, value in base.state_dict().items():
        assert torch.equal(value, kept[name])


def test_rows_off_a_gpu_say_so_and_have_no_target(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(bench.Args(**SMALL, out=tmp_path / "adapters.json"))
    rows = json.loads((tmp_path / "adapters.json").read_text())
    ratios = [row for row in rows if row["unit"] == "ratio"]
    assert len(ratios) == 3 * len(bench.COMPARED) and all(row["name"].startswith("cpu: ") and row["target"] is None for row in ratios)
    assert {row["value"] for row in rows if row["unit"] == "operations"} and (tmp_path / "adapters.png").stat().st_size > 1000
