"""The programs that time the experts: what they compare is the same model, their floors are right, their axes grow what they say."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from running import ROOT, program
from torch.utils.flop_counter import FlopCounterMode

from llava_collab.models import HyperLlavaConfig, HyperLlavaForConditionalGeneration

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return program("benchmarks/hyperllava.py")


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return program("benchmarks/growth.py")


def test_the_formula_is_what_the_counter_counts(bench: ModuleType) -> None:
    sizes = replace(bench.SMALL, blocks=4)
    pair = bench.build(sizes, CPU, torch.float32)
    inputs = bench.sample(sizes, 1, CPU, torch.float32, labels=True)
    asked = {name: value for name, value in inputs.items() if name != "labels"}

    def over(work) -> float:  # noqa: ANN001
        return bench.counted(lambda: work(pair.ours)) / bench.counted(lambda: work(pair.stock))

    with torch.no_grad():
        prefill = over(lambda model: bench.read(model, asked))
    bench.train_all_but_the_tower(pair.ours)
    train = over(lambda model: model.train()(**inputs, use_cache=False).loss.backward())
    assert prefill - 1 == pytest.approx(bench.formula(pair, sizes.tokens, 0, 1) - 1, rel=1e-3)
    assert train - 1 == pytest.approx(bench.formula(pair, sizes.tokens, 0, sizes.tokens, learn=True) - 1, rel=1e-2)
    assert pair.ours.lm_head.weight is pair.stock.lm_head.weight and pair.stock.lm_head.weight.grad is not None


def test_a_7b_decoding_step_reads_half_a_per_cent_more_at_batch_16(bench: ModuleType) -> None:
    """67 MB of generated weights beside 13.48 GB less the embeddings, and the states of 16 prompts."""
    parts = import_module("pair")._parts(bench.SEVEN_B)
    with torch.device("meta"):
        ours = HyperLlavaForConditionalGeneration(HyperLlavaConfig(**parts, visual_expert={}, language_expert={}))
    pair = bench.Pair(ours, None, bench.SEVEN_B)
    weights, states, written = 32 * 202_375_168 + 4096 * 32000, 16 * 32 * 2 * 704 * 4096, 16 * 16 * 2 * 16 * 4096
    norms = 32 * 2 * 4096
    assert bench.decode_bytes(pair, 16, 704) == pytest.approx(1 + written / (weights + states + norms), rel=1e-6)
    assert 1 + written / weights == pytest.approx(1.005, abs=2e-4)
    assert bench.formula(pair, 1, 704, 1, images=0) == pytest.approx(1.0003, abs=5e-5)


@pytest.mark.slow
def test_rows_of_a_cpu_say_so_and_have_no_target(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(
        bench.Args(parts=("train", "prefill", "graphs", "shares"), batch_sizes=(1,), rounds=1, train_batch=1, out=tmp_path / "h.json")
    )
    rows = json.loads((tmp_path / "h.json").read_text())
    assert all(row["name"].startswith("cpu: ") and row["target"] is None for row in rows)
    ratios = [row for row in rows if row["unit"] == "ratio"]
    assert len(ratios) == 3 and all(row["flop_floor"] > 1 for row in ratios) and (tmp_path / "h.png").stat().st_size > 5000
    shares = {row["name"]: row["value"] for row in rows if row["unit"] == "share" and "prefill" in row["name"]}
    assert len(shares) == 3 and sum(shares.values()) == pytest.approx(1, abs=1e-3) and min(shares.values()) > 0


def test_each_axis_grows_what_it_names(growth: ModuleType) -> None:
    """By FLOPs, which have no noise: twice the size, twice the work, or none more."""
    start = growth.Size(batch=2, tokens=32, layers=2, code_width=8, bottleneck=4)
    generation, application = growth.PHASES[:2]
    expected = {
        "tokens": (1, 2),
        "samples in a batch": (2, 2),
        "images": (2, 2),
        "expert layers": (2, 2),
        "bottleneck": (None, 2),  # the encoder does not grow with it
        "code width": (2, 1),
        "samples in a packed row": (2, 1),
    }
    assert set(expected) == set(growth.AXES)
    for axis, factors in expected.items():
        small, large = (growth.work(growth.AXES[axis](start, k), 16, CPU, torch.float32) for k in (1, 2))
        for phase, factor in zip((generation, application), factors, strict=True):
            counts = []
            for way in (small, large):
                with FlopCounterMode(display=False) as counter:
                    way[phase]()
                counts.append(counter.get_total_flops())
            grown = counts[1] / counts[0]
            assert grown == factor if factor else 1 < grown < 2, (axis, phase, counts)
        for run in large.values():
            run()


def test_an_exponent_is_the_slope_of_a_power(growth: ModuleType) -> None:
    assert growth.exponent([1, 2, 4, 8], [3 * n**0.7 for n in (1, 2, 4, 8)]) == pytest.approx(0.7)
