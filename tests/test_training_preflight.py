"""What ranks compare before the first step: hashes that see a change, differences that name ranks and cure, disk, and two real ranks."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from running import RECIPES, ROOT, arguments, run_apart, run_here
from synthetic import write_shapes

from llava_collab.cli import main
from llava_collab.training import fingerprint, preflight
from llava_collab.training.fingerprint import BLOCK, BLOCKS, commit, data_hash, source_hash, versions
from llava_collab.training.preflight import Finding, PreflightError, compare, crowded, room
from llava_collab.training.recipe import Recipe
from llava_collab.training.recipe_file import load_recipe

Usage = namedtuple("Usage", "total used free")


def recipe(out: Path, **run: Any) -> Recipe:
    base = load_recipe(RECIPES / "tiny-instruct.yaml")
    return replace(base, run=replace(base.run, out=str(out), **run))


def test_the_hash_of_a_file_sees_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"a" * (3 * BLOCK + 7))
    first = data_hash(str(path))
    assert first.startswith(f"{3 * BLOCK + 7:,} bytes, ") and data_hash(str(path)) == first
    with path.open("r+b") as stream:
        stream.seek(2 * BLOCK)
        stream.write(b"b")
    assert data_hash(str(path)) != first
    with pytest.raises(FileNotFoundError):
        data_hash(str(tmp_path / "none.jsonl"))
    assert data_hash("s3://bucket/a.tar") == data_hash("pipe:cat a") == "not looked at"
    assert data_hash(str(tmp_path)).startswith("1 entries, ")


def test_of_a_large_file_blocks_from_first_to_last_are_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    size = BLOCKS * BLOCK * 2 + 12345
    with path.open("wb") as stream:
        stream.truncate(size)  # sparse: takes no disk
    seen = {data_hash(str(path))}
    for place in (0, size - 1, 31 * (size - BLOCK) // (BLOCKS - 1)):
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        seen.add(data_hash(str(path)))
    assert len(seen) == 4


def test_the_hash_of_the_library_sees_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_hash()
    shutil.copytree(ROOT / "llava_collab", tmp_path / "llava_collab", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint.llava_collab, "__file__", str(tmp_path / "llava_collab" / "__init__.py"))
    assert source_hash() == before and commit() is None
    (tmp_path / "llava_collab" / "types.py").write_text("")
    assert source_hash() != before


def test_versions_name_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed" and versions()["torch"][0].isdigit()


def test_a_difference_names_ranks_hosts_values_and_cure() -> None:
    same = {"version: torch": "2.13.0", "data: a.json": "1 bytes"}
    found = [Finding("node1", same), Finding("node1", same), Finding("node2", same | {"version: torch": "2.11.0"}), Finding("node1", same)]
    assert compare(found[:2]) == []
    assert compare(found) == [
        "version: torch: 2.13.0 on ranks 0-1, 3 (node1); 2.11.0 on rank 2 (node2). Install the same versions on all nodes."
    ]
    assert compare([Finding("a", {"code: commit": "1"}), Finding("b", {})]) == []  # no git on b: nothing is known


def test_too_little_disk_is_told_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, tuned = 246_456, 246_456 - 32_480  # of tiny, its vision tower frozen
    need = 3 * (4 * weights + 8 * tuned) + 4 * weights
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        problem, line = room(recipe(tmp_path / "run"))
        assert (problem is None) is fits and "a checkpoint takes 0.00 GiB" in line
        if problem:
            assert problem.startswith("not enough disk: ") and "lower run.keep_last" in problem
    (tmp_path / "run").mkdir()
    (tmp_path / "run/old").write_bytes(bytes(need // 5))  # an earlier start's checkpoints make way
    assert room(recipe(tmp_path / "run"))[0] is None


def test_a_model_that_is_not_there_yet_is_no_problem(tmp_path: Path) -> None:
    later = recipe(tmp_path)
    problem, line = room(replace(later, model=replace(later.model, init_from=str(tmp_path / "none"))))
    assert problem is None and "is not known yet" in line


def test_too_few_cpus_for_the_loaders_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert crowded(0) == crowded(1) == []
    (note,) = crowded(2)
    assert "ranks 2, loader processes of each 2, CPUs 4 instead of 6; lower run.num_workers" in note


def test_one_rank_reports_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "shapes")
    base = recipe(tmp_path / "run")
    good = replace(base, data=replace(base.data, files=(replace(base.data.files[0], path=str(data)),)))
    preflight.preflight(good, Accelerator(cpu=True))
    told = capsys.readouterr().out
    assert "preflight: 1 rank on " in told and "torch " in told and "are free for" in told
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(PreflightError, match=r"data.files: no file data/tiny/train.jsonl to read \(No such file or directory\)"):
        preflight.preflight(base, Accelerator(cpu=True))


def test_the_verb_checks_alone_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "shapes")
    command = ["preflight", *arguments("tiny-instruct", data, tmp_path / "run")]
    for more, code, word in (([], 0, "preflight: 1 rank on"), (["--data.files.0.path", "none"], 1, "no file none")):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as left:
            main([*command, *more])
        told = capsys.readouterr()
        assert left.value.code == code and word in told.out + told.err
    assert not (tmp_path / "run").exists()


def test_the_program_says_what_is_wrong_before_it_builds_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    data = write_shapes(tmp_path / "shapes")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1))
    assert run_here("tiny-instruct", data, tmp_path / "run", "--run.steps", "2") == 1
    told = capsys.readouterr()
    assert "not enough disk" in told.err and "[TRAINABLE]" not in told.out


TWO_RANKS = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from llava_collab.training import preflight as checks
from llava_collab.training.opening import start
from llava_collab.training.recipe_file import load_recipe

rank, out = int(os.environ["RANK"]), sys.argv[1]
base = load_recipe("train/recipes/tiny-instruct.yaml")
base = replace(base, run=replace(base.run, out=out), data=replace(base.data, files=(replace(base.data.files[0], path=__file__),)))
accelerator = start(base)

def attempt(recipe=base):
    try:
        checks.preflight(recipe, accelerator)
        return None
    except checks.PreflightError as error:
        return str(error)

def patched(owner, name, value):
    before = getattr(owner, name)
    if rank == 1:
        setattr(owner, name, value(before))
    try:
        return attempt()
    finally:
        setattr(owner, name, before)

def wrong(all_reduce):
    def summed(vector, *args, **kwargs):
        all_reduce(vector, *args, **kwargs)
        vector[-1] += 1
    return summed

results = {
    "fine": attempt(),
    "recipe": attempt(replace(base, optim=replace(base.optim, lr=0.5)) if rank else base),
    "version": patched(checks, "versions", lambda real: lambda: real() | {"torch": "1.0"}),
    "data": patched(checks, "data_hash", lambda real: lambda path: "other"),
    "shared": patched(Path, "exists", lambda real: lambda path: not path.name.startswith(".preflight") and real(path)),
    "sum": patched(torch.distributed, "all_reduce", wrong),
}
Path(out + f".{rank}").write_text(json.dumps(results))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_ranks_agree_or_all_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart([*torchrun, str(tmp_path / "ranks.py"), str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"run.{rank}").read_text()) for rank in (0, 1))
    assert first == second and first["fine"] is None
    assert "all-reduce of 16 MiB in" in done.stdout and done.stdout.count("preflight: 2 ranks on") == 1
    wanted = {
        "recipe": "recipe: optim.lr: 0.001 on rank 0",
        "version": "1.0 on rank 1",
        "data": "other on rank 1",
        "shared": "run folder: is shared: yes on rank 0",
        "sum": "a sum over all ranks is wrong on rank 1",
    }
    assert all(told in first[name] for name, told in wanted.items()), first
    assert list((tmp_path / "run").iterdir()) == []


WAITING = """
import os, time
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
from llava_collab.training import preflight
preflight.PATIENCE = 0.1
with preflight.meeting("all ranks to join"):
    time.sleep(0.5)
    raise RuntimeError("Gloo connectFullMesh failed")
"""


@pytest.mark.slow
def test_a_rank_that_waits_says_what_to_look_at(tmp_path: Path) -> None:
    done = run_apart(["-c", WAITING])
    assert done.stderr.count("GLOO_SOCKET_IFNAME (CPU) and NCCL_SOCKET_IFNAME (GPU)") == 2 and "meet at 127.0.0.1:0" in done.stderr
    with pytest.raises(RuntimeError) as caught, preflight.meeting("all ranks"):
        raise RuntimeError("of another kind")
    assert not hasattr(caught.value, "__notes__")
