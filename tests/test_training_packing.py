"""Packing in a run: counted right, decided by what is measured, the same training, exact resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from running import RECIPES, ROOT, arguments, log_rows, losses, run_apart, run_here
from safetensors.torch import load_file
from synthetic import write_shapes
from transformers import LlamaConfig, MambaConfig

from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.training.packing import decide
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.recipe_file import differences, load_recipe, save_recipe
from llava_collab.training.step import Counts, count

ON = ("--data.packing", "on")
EIGHT = ("--run.micro-batch-size", "8", "--run.no-save-first")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def recipe(packing: str) -> Recipe:
    plain = load_recipe(RECIPES / "tiny-instruct.yaml")
    return replace(plain, data=replace(plain.data, packing=packing))


def decided(packing: str, lengths: list[int], ranks: int = 1, config: object = None) -> tuple[int | None, list[str]]:
    told: list[str] = []
    sampler = GroupedBatchSampler(lengths, [True] * len(lengths), batch_size=8)
    config = config or LlamaConfig(attn_implementation="sdpa")
    return decide(recipe(packing), sampler, ranks, config, told.append), told


def test_counts_of_packed_rows() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "segment_ids": torch.tensor([[1, 1, 2, 2], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 6, -100, 7], [-100, 8, -100, -100]]),
    }
    assert count([batch], Accelerator(cpu=True)) == Counts(supervised=3, tokens=6, positions=8, samples=3, images=0, squares=32, stop=0)


def test_auto_packs_exactly_where_more_than_a_tenth_is_padding() -> None:
    even, ragged = [20] * 15 + [18], [40] * 4 + [10] * 12
    assert decided("off", ragged) == (None, [])
    assert decided("auto", even)[0] is None and decided("auto", ragged)[0] == 256
    assert decided("auto", even)[1] == [
        "packing: off (auto): of 2 steps of the first epoch 0.6% of all positions are padding after grouping by length, no more than 10%"
    ]
    assert decided("on", even)[0] == 256 and "packing: on: of 2 steps" in decided("on", even)[1][0]
    edge = [40, 40, 40, 40, 40, 40, 40, 8]  # micro-batches of 4, of 128 and 160 tokens: 10 % of 320 positions
    assert decided("auto", edge)[0] is None and decided("auto", [*edge[:-1], 7])[0] == 256
    for ranks in (2, 8):  # a rank of its own sample has nothing to group: no padding
        assert (decided("auto", ragged, ranks)[0] is None) == (ranks == 8)


def test_packing_that_can_not_be_is_refused() -> None:
    for packing in ("auto", "on"):
        with pytest.raises(
            RecipeError, match=rf"data\.packing: {packing} is not possible here: a mamba decoder .* Set data\.packing to off"
        ):
            decided(packing, [5] * 8, config=MambaConfig())
    assert decided("off", [5] * 8, config=MambaConfig()) == (None, [])


def test_on_and_off_are_words_in_a_recipe_file(tmp_path: Path) -> None:
    text = (RECIPES / "tiny-instruct.yaml").read_text(encoding="utf-8")
    for word in ("on", "off", "auto", "'on'"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("  max_length: 256\n", f"  max_length: 256\n  packing: {word}\n"), encoding="utf-8")
        read = load_recipe(path)
        assert read.data.packing == word.strip("'")
        save_recipe(read, path)
        assert load_recipe(path) == read
    path.write_text(text.replace("  max_length: 256\n", "  max_length: 256\n  packing: onn\n"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"data\.packing must be one of auto, on, off, not 'onn'.* Did you mean 'on'"):
        load_recipe(path)
    assert differences(recipe("on"), recipe("off")) == [], "a run may change it and go on: what a step computes stays the same"


@pytest.mark.parametrize("size", ["8", pytest.param("4", marks=pytest.mark.slow), pytest.param("1", marks=pytest.mark.slow)])
def test_twenty_steps_packed_are_twenty_steps_unpacked(data: Path, tmp_path: Path, size: str) -> None:
    runs = {}
    for way, options in (("plain", ()), ("packed", ON)):
        torch.manual_seed(0)
        options = (*options, "--run.micro-batch-size", size, "--run.no-save-first", "--run.save-every", "20")
        assert run_here("tiny-instruct", data, tmp_path / way, *options) == 0
        runs[way] = log_rows(tmp_path / way), load_file(tmp_path / way / "model" / "model.safetensors")
    (plain_rows, plain), (packed_rows, packed) = runs["plain"], runs["packed"]
    assert len(plain_rows) == 20
    for before, after in zip(plain_rows, packed_rows, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        for key in ("samples", "images", "supervised_tokens", "supervised_fraction"):
            assert after[key] == before[key]
    padding = [sum(row["padding_share"] for row in rows) / 20 for rows in (plain_rows, packed_rows)]
    assert padding[1] < padding[0] / 3 if size == "8" else padding[1] <= padding[0]
    moved = sum(row["lr"]["llm"] for row in plain_rows)
    for name in plain:
        assert (packed[name] - plain[name]).abs().max() < 0.02 * moved, name


def test_a_packed_run_resumes_bit_for_bit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = (*EIGHT, "--run.steps", "6", "--run.save-every", "3", "--data.packing", "auto", "--run.num-workers", "1")
    assert run_here("tiny-instruct", data, tmp_path / "one", *short) == 0
    said = capsys.readouterr().out
    assert "packing: on (auto): of 4 steps of the first epoch" in said
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-6")
    (tmp_path / "two" / "finished.json").unlink()
    assert run_here("tiny-instruct", data, tmp_path / "two", *short) == 0
    assert "resuming from" in capsys.readouterr().out
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    first, second = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_packing_with_cached_features_checkpointing_and_adapters(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))
    both = (*EIGHT, "--run.steps", "4", "--data.feature-cache", "--tune.llm", "lora", "--tune.lora.r", "4", "--tune.lora.dropout", "0")
    assert run_here("tiny-instruct", data, tmp_path / "plain", *both) == 0
    assert run_here("tiny-instruct", data, tmp_path / "packed", *both, *ON, "--run.gradient-checkpointing") == 0
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_pack_as_one(data: Path, tmp_path: Path) -> None:
    short = (*EIGHT, "--run.batch-size", "16", "--run.steps", "6", *ON)
    assert run_here("tiny-instruct", data, tmp_path / "one", *short) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train" / "train.py")]
    done = run_apart([*torchrun, *arguments("tiny-instruct", data, tmp_path / "two", *short)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("packing: on: of 2 steps") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [row["samples"] for row in log_rows(tmp_path / "two")] == [16] * 6
