"""The public benchmarks: what would run, and lmms-eval's results files read back beside the paper's numbers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from running import ROOT, program

from llava_collab.evaluation.suite import SuiteError


@pytest.fixture(scope="module")
def public() -> ModuleType:
    return program("eval/public.py")


def write_results(public: ModuleType, out: Path, name: str, score: float, date: str = "20260101_120000", **changes: Any) -> Path:
    """A results file in the form of lmms-eval 0.7 (`<date>_results.json` in a folder named after the model)."""
    benchmark = next(b for b in public.load_benchmarks()[1] if b.name == name)
    task, written = benchmark.own_task, benchmark.task_file("/lmms_eval/tasks/x.yaml")
    options = written.get("lmms_eval_specific_kwargs")
    if options:  # lmms-eval lays the defaults beside `default`
        options = options | options["default"]
    result = {
        "results": {
            task: {
                "alias": task,
                f"{benchmark.metric},none": score,
                f"{benchmark.metric}_stderr,none": 0.01,
                f"{benchmark.metric}_stderr_clustered,none": "N/A",
                "submission,none": None,
            }
        },
        "configs": {task: {"task": task, "test_split": "test", "lmms_eval_specific_kwargs": options, "metadata": [{"version": 0.0}]}},
        "versions": {task: "Yaml"},
        "n-shot": {task: 0},
        "n-samples": {task: {"original": 1000, "effective": 1000}},
        "config": {"model": "llava_collab", "model_args": "pretrained=m,dtype=bfloat16", "batch_size": "16", "limit": None},
        "date": date,
    }
    result["config"] |= changes.pop("config", {})
    for key, value in changes.items():
        result[key.replace("_", "-")][task] |= value
    path = out / name / "runs__x__model" / f"{date}_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def line(table: str, name: str) -> list[str]:
    return next([cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines() if row.startswith(f"| {name} |"))


def test_scores_stand_beside_the_papers(public: ModuleType, tmp_path: Path) -> None:
    write_results(public, tmp_path, "gqa", 0.9, date="20251231_235959")
    write_results(public, tmp_path, "gqa", 0.6174)  # the newest counts
    write_results(public, tmp_path, "mme", 1499.25)
    write_results(public, tmp_path, "vqav2", 0.77)
    table = public.table([tmp_path])
    assert line(table, "gqa") == ["61.7", "62.0", "62.5", "61.9", "62.7"]
    assert line(table, "mme") == ["1499.2", "1510.7", "1486.0", "1492.0", "1481.2"]
    assert line(table, "vqav2") == ["77.0*", "78.5", "79.0", "78.8", "79.1"] and "- vqav2: validation split" in table
    assert line(table, "pope")[0] == line(table, "textvqa")[1] == "–"
    assert "- gqa:" not in table and "- pope:" not in table
    other = tmp_path / "other"
    write_results(public, other, "gqa", 0.5)
    assert line(public.table([tmp_path, other]), "gqa")[:2] == ["61.7", "50.0"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_samples": {"effective": 8}}, "only 8 of 1000 items"),
        ({"configs": {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": " Answer:"}}}}, "asked with"),
        ({"configs": {"lmms_eval_specific_kwargs": None}}, "asked with"),
    ],
)
def test_what_was_measured_otherwise_is_marked(public: ModuleType, tmp_path: Path, changes: dict, reason: str) -> None:
    write_results(public, tmp_path, "gqa", 0.6, **changes)
    table = public.table([tmp_path])
    assert line(table, "gqa")[0] == "60.0*" and reason in table.partition("not comparable")[2]


def test_a_file_without_the_score_is_named(public: ModuleType, tmp_path: Path) -> None:
    path = write_results(public, tmp_path, "gqa", 0.6)
    path.write_text(json.dumps({"results": {}}), encoding="utf-8")
    with pytest.raises(SuiteError, match=r"20260101_120000_results.json: has no 'exact_match'"):
        public.table([tmp_path])


@pytest.mark.parametrize("score", [None, "N/A", float("nan")])
def test_a_score_that_no_judge_gave_is_named(public: ModuleType, tmp_path: Path, score: Any) -> None:
    write_results(public, tmp_path, "mmvet", score)
    with pytest.raises(SuiteError, match=r"20260101_120000_results.json: 'gpt_eval_score' is (None|'N/A'|nan), no number.*OPENAI_API_KEY"):
        public.table([tmp_path])


def test_results_of_another_run_do_not_count(public: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def left(**more: Any) -> bool:
        assert public.Run(**{"model": "m", "out": tmp_path, "benchmarks": ("gqa",), "dry_run": True} | more).run() == 0
        return "lmms_eval" in capsys.readouterr().out

    write_results(public, tmp_path, "gqa", 0.5, config={"limit": 8.0})  # lmms-eval reads a number with a point
    assert left() and left(limit=4) and not left(limit=8)
    path = write_results(public, tmp_path, "gqa", 0.6, date="20260102_120000")
    assert not left() and not left(limit=8)
    for other in ({"model": "n"}, {"dtype": "float32"}):
        with pytest.raises(SuiteError, match="is of pretrained=m,dtype=bfloat16, this run is of") as error:
            left(**other)
        assert str(path) in str(error.value)


def test_the_suite_holds_the_papers_table(public: ModuleType, tmp_path: Path) -> None:
    columns, benchmarks = public.load_benchmarks()
    ours = columns.index("HyperLLaVA-7B")
    printed = [79.1, 62.7, 51.9, 70.4, None, 58.5, 86.3, 1481.2, 65.9, 60.6, 61.4, 64.0, 31.0]
    assert [b.paper[ours] for b in benchmarks] == printed and len({b.own_task for b in benchmarks}) == 13
    raw = yaml.safe_load(public.SUITE.read_text(encoding="utf-8"))
    raw["benchmarks"]["gqa"]["paper"] = [1]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(SuiteError, match="gqa: `paper` has 1 numbers for 4 columns"):
        public.load_benchmarks(tmp_path / "x.yaml")


def test_a_dry_run_prints_what_is_left(public: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(public, tmp_path, "gqa", 0.6, config={"model_args": "pretrained=runs/x/model,dtype=bfloat16"})
    run = public.Run("runs/x/model", tmp_path, gpus=8, benchmarks=("gqa", "textvqa+ocr"), dry_run=True)
    assert run.run() == 0
    done, left = capsys.readouterr().out.splitlines()
    command = shlex.split(left)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m", "lmms_eval"]
    assert done.startswith("# gqa: has results") and command[:8] == launch
    assert command[command.index("--tasks") + 1] == "llava_1_5_textvqa_ocr" and "pretrained=runs/x/model,dtype=bfloat16" in command
    assert not (tmp_path / "tasks").exists()
    with pytest.raises(SuiteError, match="no benchmark"):
        public.Run("m", tmp_path, benchmarks=("imagenet",)).run()


def test_the_cluster_script_is_sound(tmp_path: Path) -> None:
    scripts = ["scripts/eval_all.sh", "scripts/lmms_eval_check.sh"]
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GPUS": "1"}
    dry = subprocess.run(
        ["bash", scripts[0], "m", str(tmp_path), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    commands = [shlex.split(command) for command in dry.stdout.splitlines()]
    assert "eval/run.py" in commands[0] and all(command[1:3] == ["-m", "lmms_eval"] for command in commands[1:])
    assert len(commands) == 14 and not list(tmp_path.iterdir())
    assert subprocess.run(["bash", scripts[0]], cwd=ROOT, capture_output=True, check=False).returncode == 2
