"""The real program on shards and on broken files: the same steps from wherever the data come, one list of bad samples on all ranks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import ROOT, arguments, log_rows, losses, run_apart, run_here
from synthetic import write_shapes

from llava_collab.data.places import ShardError
from llava_collab.data.shard_writer import write_shards
from llava_collab.models.build import ModelSpec, build
from llava_collab.training.batches import Batches, open_batches
from llava_collab.training.data_files import read_all, window
from llava_collab.training.recipe import DataFile, DataRecipe, OptimRecipe, Recipe, RecipeError, RunRecipe, TuneRecipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHORT = ("--run.steps", "6", "--run.save-every", "3", "--run.no-save-first")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), 60)


@pytest.fixture(scope="module")
def index(data: Path) -> Path:
    return write_shards(data, data.parent / "shards", per_shard=10)


def open_at(path: str, out: Path, rank: int = 0, ranks: int = 1, **data: Any) -> Batches:
    """A run's batches as one rank of several sees them (no process group: only for data without bad samples)."""
    model, processor = build(ModelSpec(template="chatml"))
    run = RunRecipe(out=str(out), steps=9, batch_size=8, micro_batch_size=4, num_workers=data.pop("num_workers", 0))
    recipe = Recipe(ModelSpec(), DataRecipe((DataFile(path),), max_length=256, **data), TuneRecipe(), OptimRecipe(), run)
    accelerator: Any = SimpleNamespace(
        process_index=rank, num_processes=1, is_main_process=rank == 0, wait_for_everyone=lambda: None, print=print
    )
    student: Any = SimpleNamespace(model=model, processor=processor)
    batches = open_batches(recipe, student, accelerator)
    accelerator.num_processes = ranks
    return batches


def steps(batches: Batches, count: int) -> list[list[dict[str, Any]]]:
    return [batches.next_step() for _ in range(count)]


def same(left: list[list[dict[str, Any]]], right: list[list[dict[str, Any]]]) -> bool:
    """Whether two runs saw the same ids, tokens and pixels in the same order."""
    for a, b in zip(left, right, strict=True):
        for one, other in zip(a, b, strict=True):
            if one.keys() != other.keys() or one["sample_ids"] != other["sample_ids"]:
                return False
            if not all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], torch.Tensor)):
                return False
    return True


def test_batches_from_shards_are_those_of_the_file(data: Path, index: Path, tmp_path: Path) -> None:
    plain = steps(open_at(str(data), tmp_path), 20)  # into the third epoch
    assert any("pixel_values" in batch for batch in plain[0])
    assert same(steps(open_at(str(index), tmp_path), 20), plain)
    windowed = steps(open_at(str(index), tmp_path, shard_window=2), 20)
    assert not same(windowed, plain)
    for address in (f"file://{index}", f"pipe:cat {index.parent}/{{shard}}"):
        options = {"shard_window": 2, "shard_cache": str(tmp_path / "cache"), "num_workers": 2}
        assert same(steps(open_at(address, tmp_path, **options), 20), windowed)


def test_shards_in_a_recipe_are_checked(data: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))
    remote, local, plain = DataFile(f"file://{index}"), DataFile(str(index)), DataFile(str(data))
    with pytest.raises(RecipeError, match="image_root is given, but .* names shards"):
        read_all(DataRecipe((DataFile(str(index), image_root="x"),)))
    with pytest.raises(RecipeError, match="data.shard_window is 4, but no file of data.files names shards"):
        read_all(DataRecipe((plain,), shard_window=4))
    with pytest.raises(RecipeError, match="is a folder; name the JSON or JSONL file, or the index.json"):
        read_all(DataRecipe((DataFile(str(index.parent)),)))
    small = DataRecipe((remote,), shard_cache_gib=1e-4)
    with pytest.raises(RecipeError, match="data.shard_cache_gib: 0.0001 GiB can't hold twice the 16 shards"):
        window(small, read_all(small))
    alone, mixed = DataRecipe((local,)), DataRecipe((remote, plain, remote))
    assert window(alone, read_all(alone)) is None
    found = window(mixed, read_all(mixed))
    assert found is not None and found.size == 16 and set(found.shards) == {-1, *range(12)}
    assert (tmp_path / "cache" / "shards").is_dir()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_while_a_run_reads_it_is_told(data: Path, tmp_path: Path, workers: int) -> None:
    index = write_shards(data, tmp_path / "shards", per_shard=10)
    batches = open_at(str(index), tmp_path, num_workers=workers)
    tar = tmp_path / "shards" / "shard-000003.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(ShardError, match=r"^sample shape-3\d: .*/shard-000003.tar: 3\d.png: the shard was changed .*data shard.*anew\.$"):
        steps(batches, 9)


@pytest.mark.slow
def test_a_stop_in_an_epoch_goes_on_with_other_ranks_and_workers(data: Path, index: Path, tmp_path: Path) -> None:
    """Remote shards, 60 samples, steps of 8: stopped at step 11 of the second epoch's middle, then two ranks with two workers each."""
    address = Path(f"pipe:cat {index.parent}/{{shard}}")
    common = ("--data.shard-cache", str(tmp_path / "cache"), "--data.shard-window", "2", "--run.steps", "20", "--run.save-every", "11")
    assert run_here("tiny-instruct", address, tmp_path / "straight", *common) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-20")
    (tmp_path / "resumed" / "finished.json").unlink()
    command = [*TORCHRUN, str(ROOT / "train" / "train.py"), *arguments("tiny-instruct", address, tmp_path / "resumed", *common)]
    done = run_apart([*command, "--run.num-workers", "2"])
    assert done.returncode == 0 and "from step 12" in done.stdout, done.stderr[-2000:]
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    counts = [{key: [row[key] for row in log_rows(tmp_path / run)] for key in ("samples", "images")} for run in ("resumed", "straight")]
    assert counts[0] == counts[1]


def break_some(data: Path, share: float, seed: int = 0) -> dict[str, str]:
    """Break a share of the samples' pictures in four ways; returns the reason by sample."""
    rows = [row for row in map(json.loads, data.read_text().splitlines()) if "image" in row]
    chosen = random.Random(seed).sample(rows, int(share * len(data.read_text().splitlines())))
    for number, row in enumerate(chosen):
        path = data.parent / row["image"]
        content = path.read_bytes()
        if number % 4 == 0:
            path.unlink()
        else:  # cut off, no picture at all, and a broken stream behind a sound header: all three show when it is decoded
            path.write_bytes([content[:60], b"<html>not found</html>", content[:50] + bytes(len(content) - 50)][number % 4 - 1])
    return {row["id"]: "missing_image" if number % 4 == 0 else "truncated_image" for number, row in enumerate(chosen)}


def listed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


LONG = ("--run.batch-size", "100", "--run.micro-batch-size", "50", "--run.steps", "22", "--run.save-every", "8")


@pytest.mark.slow
def test_one_in_a_hundred_broken_files_are_listed_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """2,000 samples, 20 of them broken: 22 steps are one epoch and a bit. A start that was stopped remembers what it found."""
    data = write_shapes(tmp_path / "data", 2000)
    broken = break_some(data, 0.01)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here("tiny-align", data, one, *LONG) == 0
    rows = listed(one)
    assert {row["id"]: row["reason"] for row in rows} == broken and len(rows) == 20
    assert {row["step"] == 0 for row in rows if row["reason"] == "missing_image"} == {True}
    assert len({row["step"] for row in rows}) > 5 and all(str(data.parent) in row["file"] for row in rows)
    assert [row["skipped"] for row in log_rows(one)] == [sum(r["step"] <= step for r in rows) for step in range(1, 23)]

    command = [*TORCHRUN, str(ROOT / "train" / "train.py"), *arguments("tiny-align", data, two, *LONG, "--run.num-workers", "2")]
    done = run_apart(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 of 2000 samples are bad, all listed in" in done.stdout and "15  truncated_image" in done.stdout
    assert listed(two) == rows
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)

    shutil.rmtree(two / "checkpoints" / "step-22")  # as if it had stopped after step 16
    (two / "finished.json").unlink()
    known = json.loads((two / "checkpoints" / "step-16" / "state.json").read_text())["batches"]["skipped"]
    assert known == [row for row in rows if row["step"] <= 16]
    assert run_here("tiny-align", data, two, *LONG) == 0
    assert listed(two) == rows and losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
def test_five_in_a_hundred_stop_all_ranks_at_the_same_step_with_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "data", 2000)
    break_some(data, 0.05)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here("tiny-align", data, one, *LONG) == 1  # 25 are missing: seen before the first step
    assert "error: 25 of 2000 samples are bad, all listed in" in capsys.readouterr().err and len(listed(one)) == 25
    raised = (*LONG, "--data.max-bad-fraction", "0.03")  # the sixty-first shows in the middle of the epoch
    assert run_here("tiny-align", data, one, *raised) == 1
    told = capsys.readouterr().err
    rows = listed(one)
    stopped = len(log_rows(one)) + 1
    assert len(rows) > 60 and stopped > 3 and {row["step"] for row in rows} <= set(range(stopped + 1))
    assert f"error: {len(rows)} of 2000 samples are bad" in told and "truncated_image" in told and "more than 60 are not allowed" in told
    done = run_apart([*TORCHRUN, str(ROOT / "train" / "train.py"), *arguments("tiny-align", data, two, *raised, "--run.num-workers", "1")])
    assert done.returncode == 1 and done.stderr.count(f"error: {len(rows)} of 2000 samples are bad") == 2, done.stderr[-3000:]
    assert listed(two) == rows and len(log_rows(two)) == stopped - 1


OTHER_DATA = """
import os, sys
from llava_collab.training import batches
from running import program
read_all = batches.read_all
if os.environ["RANK"] == "1":  # a node whose disk lacks a picture, or has another file under the same name
    batches.read_all = lambda data: read_all(data)[1:]
sys.exit(program().main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_that_see_other_files_are_refused(tmp_path: Path) -> None:
    here = write_shapes(tmp_path / "here", 40)
    (tmp_path / "start.py").write_text(OTHER_DATA, encoding="utf-8")
    done = run_apart([*TORCHRUN, str(tmp_path / "start.py"), *arguments("tiny-align", here, tmp_path / "run", *SHORT)])
    assert done.returncode == 1 and done.stderr.count("error: ranks [1] have other samples than rank 0") == 2, done.stderr[-3000:]
