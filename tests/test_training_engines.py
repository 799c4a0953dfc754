"""Engines on real processes: the same training whatever shards the model, however steps are cut, and wherever a run goes on."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from many_runs import cut_back
from running import arguments, log_rows, run_apart, run_here
from safetensors.torch import load_file
from synthetic import draw_shape, write_shapes

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None  # it builds an operator
ENGINES = ("ddp", "fsdp2", *(("zero2", "zero3") if DEEPSPEED else ()))
STEPS, HALF = 20, 10
SIZES, PACKED = (1, 4, 8), {"": (), "-packed": ("--data.packing", "on")}
RUN = ("--run.steps", str(STEPS), "--run.save-every", str(HALF), "--run.no-save-first")

ADAPTER = json.dumps({"method": "teamlora", "experts": 2, "rank": 2, "dropout": 0.0, "routing": "token"})
VARIANTS = {  # what else a recipe may ask for; every engine has to do what ddp does
    "lora": ("--tune.llm", "lora", "--tune.lora.dropout", "0"),
    "checkpointing": ("--run.gradient-checkpointing",),
    "cache": ("--data.feature-cache",),
    "tower": ("--tune.unfreeze-vision-tower",),
    "blind": ("--data.blind",),
    "adapter": ("--model.adapter", ADAPTER, "--tune.llm", "frozen"),
    "adapter-by-sample": ("--model.adapter", ADAPTER.replace("token", "sample"), "--tune.llm", "frozen", "--run.gradient-checkpointing"),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def _launch(folder: Path, ranks: int, runs: list[dict]) -> None:
    path = folder / f"runs-{ranks}.json"
    path.write_text(json.dumps(runs))
    done = run_apart(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "tests/many_runs.py", str(path)], 900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(path.with_suffix(".codes").read_text())) == {0}


def _run(data: Path, out: Path, *more: str, source: Path | None = None) -> dict:
    return {"arguments": arguments("tiny-instruct", data, out, *RUN, *more), "from": source and str(source), "step": HALF}


def _mixed(folder: Path) -> Path:
    """Two samples, one with a picture and one without: of a step of two, one rank gets each."""
    folder.mkdir()
    draw_shape(folder / "0.png", "red", "square", (3, 4))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red square"}]
    alone = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": "seen", "image": "0.png", "conversations": turns}, {"id": "read", "conversations": alone}]
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of this file: `one` on one rank in this process, the others on two (and one) ranks of processes of their own."""
    folder = tmp_path_factory.mktemp("engines")
    data, mixed = write_shapes(folder / "shapes", 60), _mixed(folder / "mixed")
    assert run_here("tiny-instruct", data, folder / "one", *RUN) == 0
    assert run_here("tiny-instruct", mixed, folder / "one-mixed", *RUN, "--run.batch-size", "2") == 0
    two = [
        _run(data, folder / f"{engine}-{size}{packed}", "--run.engine", engine, "--run.micro-batch-size", str(size), *PACKED[packed])
        for engine, size, packed in product(ENGINES, SIZES, PACKED)
    ]
    two += [_run(mixed, folder / f"{engine}-mixed", "--run.engine", engine, "--run.batch-size", "2") for engine in ENGINES]
    two += [_run(data, folder / f"{e}-again", "--run.engine", e, "--run.micro-batch-size", "4", source=folder / f"{e}-4") for e in ENGINES]
    two += [_run(data, folder / f"one-to-{e}", "--run.engine", e, source=folder / "one") for e in ENGINES]
    few = ("--run.steps", "6", "--run.save-every", "6")
    two += [_run(data, folder / f"{e}-{name}", "--run.engine", e, *few, *more) for e, (name, more) in product(ENGINES, VARIANTS.items())]
    shards = ("--run.engine", "fsdp2", "--run.checkpoint", "sharded")
    two += [_run(data, folder / "shards", *shards), _run(data, folder / "shards-again", *shards, source=folder / "shards")]
    _launch(folder, 2, two)
    one = [_run(data, folder / f"{e}-to-one", "--run.engine", e, source=folder / f"{e}-4") for e in ENGINES]
    one += [
        _run(data, folder / f"{engine}-{size}{packed}-alone", "--run.engine", engine, "--run.micro-batch-size", str(size), *PACKED[packed])
        for engine, size, packed in product(ENGINES, SIZES, PACKED)
    ]
    one += [_run(data, folder / "shards-to-one", *shards, source=folder / "shards")]
    _launch(folder, 1, one)
    return folder


def _difference(left: Path, right: Path) -> float:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (left, right))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _close(run: Path, reference: Path, tolerance: float = 1e-5) -> None:
    rows, wanted = log_rows(run), log_rows(reference)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        same = ("supervised_tokens", "samples", "images")
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
    assert _difference(run, reference) <= 0.02 * sum(max(row["lr"].values()) for row in wanted)
    assert wanted[-1]["loss"] < wanted[0]["loss"] - 0.5, "a run that learns nothing proves nothing"


@pytest.mark.parametrize(("engine", "size", "packed", "ranks"), list(product(ENGINES, SIZES, PACKED, ("", "-alone"))))
def test_a_training_is_the_same_however_it_is_cut(runs: Path, engine: str, size: int, packed: str, ranks: str) -> None:
    _close(runs / f"{engine}-{size}{packed}{ranks}", runs / "one")


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_rows_have_less_padding(runs: Path, engine: str) -> None:
    rows, wanted = log_rows(runs / f"{engine}-4-packed"), log_rows(runs / f"{engine}-4")
    assert sum(row["padding_share"] for row in rows) < sum(row["padding_share"] for row in wanted)


@pytest.mark.parametrize(("engine", "name"), list(product(ENGINES[1:], VARIANTS)))
def test_what_else_a_recipe_asks_for(runs: Path, engine: str, name: str) -> None:
    losses, wanted = ([row["loss"] for row in log_rows(runs / f"{e}-{name}")] for e in (engine, "ddp"))
    assert len(wanted) == 6 and losses == pytest.approx(wanted, abs=1e-5)
    assert _difference(runs / f"{engine}-{name}", runs / f"ddp-{name}") < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_pictures_keeps_step(runs: Path, engine: str) -> None:
    _close(runs / f"{engine}-mixed", runs / "one-mixed")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_same_run(runs: Path, engine: str) -> None:
    assert [row["loss"] for row in log_rows(runs / f"{engine}-again")] == [row["loss"] for row in log_rows(runs / f"{engine}-4")]
    assert _difference(runs / f"{engine}-again", runs / f"{engine}-4") == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["one-to-{}", "{}-to-one"])
def test_a_run_goes_on_with_other_ranks_and_engines(runs: Path, engine: str, name: str) -> None:
    _close(runs / name.format(engine), runs / "one", tolerance=1e-6)


def test_shards_are_taken_up_by_as_many_ranks_as_there_are(runs: Path) -> None:
    assert {path.suffix for path in (runs / "shards/checkpoints/step-20/shards").iterdir()} == {".distcp", ""}
    for name in ("shards", "shards-again", "shards-to-one"):
        _close(runs / name, runs / "one", tolerance=1e-6 if name != "shards" else 1e-5)
    assert _difference(runs / "shards", runs / "shards-again") == 0


def test_shards_need_an_engine_that_reads_them(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_back(runs / "shards", tmp_path / "run", HALF)
    assert run_here("tiny-instruct", runs / "shapes/shapes.jsonl", tmp_path / "run", *RUN) == 1
    assert "holds shards, which only run.engine fsdp2 takes up again" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_of_shards_is_saved_as_any_other(runs: Path, engine: str) -> None:
    config, wanted = (json.loads((runs / name / "model/config.json").read_text()) for name in (f"{engine}-4", "one"))
    assert config == wanted
    files = {path.name for path in (runs / f"{engine}-4/checkpoints/step-20").iterdir()}
    assert {path.name for path in (runs / "one/checkpoints/step-20").iterdir()} <= files


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_learn_the_same(runs: Path, tmp_path: Path) -> None:
    assert run_here("tiny-instruct", runs / "shapes/shapes.jsonl", tmp_path / "run", *RUN, "--run.compile") == 0
    _close(tmp_path / "run", runs / "one")


def test_fewer_and_more_ranks_without_any_launcher(runs: Path, tmp_path: Path) -> None:
    cut_back(runs / "fsdp2-4", tmp_path / "run", HALF)
    assert run_here("tiny-instruct", runs / "shapes/shapes.jsonl", tmp_path / "run", *RUN) == 0
    _close(tmp_path / "run", runs / "one", tolerance=1e-6)
    assert torch.distributed.is_initialized() is False
