"""Evaluation that meets trouble: samples, memory and programs that fail; several processes; processes that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import Slow, questions, talkative
from PIL import Image
from running import ROOT, run_apart

from llava_collab.collab.asking import ask
from llava_collab.data.conversation import SampleError
from llava_collab.evaluation.evaluator import Summary, evaluate
from llava_collab.evaluation.identity import run_identity
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.ranks import Ranks, writing
from llava_collab.evaluation.records import PART, RECORDS, RecordError, Row, read_rows, settle
from llava_collab.files import write_json
from llava_collab.types import Answer, Model, Request

LIMITS = {"Visual QA": 8, "Spatial Inference": 4}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Failing(Slow):
    """Answers with what it was asked together with; `fails(batch)` says what it raises instead."""

    def __init__(self, fails: Callable[[Sequence[str]], Exception | None]) -> None:
        super().__init__(0)
        self.fails, self.asked = fails, list[list[str]]()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked.append([r.id for r in requests])
        if error := self.fails(self.asked[-1]):
            raise error
        return super().generate(requests)


REQUESTS = [Request(f"r{i}", ()) for i in range(6)]


def run(model: Model, out: Path, ranks: Ranks | None = None, batch_size: int = 4) -> Summary:
    scorer = Scorer({"Visual QA": "vqa", "Spatial Inference": "accuracy"})
    return evaluate(model, questions(), out, scorer=scorer, max_new_tokens=LIMITS, batch_size=batch_size, ranks=ranks)


def timeless(folder: Path) -> list[Row]:
    rows = read_rows(folder)
    for row in rows:
        del row["seconds"], row["usage"]["seconds"]
    return rows


# --- failures ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SampleError("r3", "bad_record", "no such turn"), FileNotFoundError("r3.png")])
def test_a_sample_at_fault_costs_itself(error: Exception) -> None:
    model = Failing(lambda ids: error if "r3" in ids else None)
    answers = ask(model, REQUESTS)
    assert [a.text for a in answers] == ["r0", "r1", "r2", "", "r4", "r5"]
    assert [a.error for a in answers if a.error] == [f"{type(error).__name__}: {error}"]
    assert model.asked == [[r.id for r in REQUESTS], *([r.id] for r in REQUESTS)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_a_batch_too_large_is_asked_in_halves(error: Exception) -> None:
    model = Failing(lambda ids: error if len(ids) > 2 else None)
    assert [a.text for a in ask(model, REQUESTS)] == ["r0 r1", "r0 r1", "r2", "r3 r4", "r3 r4", "r5"]
    never = ask(Failing(lambda ids: error if "r3" in ids else None), REQUESTS)
    assert [r.id for r, a in zip(REQUESTS, never, strict=True) if a.error] == ["r3"] and "out of memory" in str(never[3].error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("turns"), ValueError("no image token"), TypeError()])
def test_a_programming_error_stops_the_run_and_keeps_what_was_answered(error: Exception, tmp_path: Path) -> None:
    model = Failing(lambda ids: error if len(model.asked) == 3 else None)
    with pytest.raises(type(error)):
        run(model, tmp_path)
    assert len(read_rows(tmp_path)) == 8


def test_failed_samples_are_rows_and_counted(tmp_path: Path) -> None:
    bad = {"s3", "s40"}
    summary = run(Failing(lambda ids: OSError("no picture") if bad & set(ids) else None), tmp_path)
    assert str(summary) == "n=88/90, 2 errors" and summary.error_rate == pytest.approx(2 / 90)
    rows = {row["sample_id"]: row for row in read_rows(tmp_path) if row["status"] == "error"}
    assert rows.keys() == bad and rows["s3"]["error"] == "OSError: no picture" and rows["s3"]["score"] is None


@pytest.mark.slow
def test_the_program_tells_headline_and_status(tmp_path: Path) -> None:
    """The majority baseline has no answer for a category that training never showed."""
    for split, categories in (("train", ["Visual QA"]), ("test", ["Visual QA"] * 3 + ["Spatial Inference"])):
        turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
        rows = [{"id": f"{split}-{i}", "conversations": turns, "category": category} for i, category in enumerate(categories)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["eval/run.py", "--model", "majority", "--suite", "eval/suites/cmt-open.yaml", "--data-root", str(tmp_path), "--out"]
    strict = run_apart([*command, str(tmp_path / "out")])
    assert strict.returncode == 1 and "majority: n=3/4, 1 errors" in strict.stdout and "more than 1.0%" in strict.stderr
    lenient = run_apart([*command, str(tmp_path / "out"), "--max-error-rate", "0.25"])
    assert (lenient.returncode, "majority: n=3/4, 1 errors" in lenient.stdout) == (0, True), lenient.stderr


# --- several processes ------------------------------------------------------------------------------------------------------------


def together(count: int, out: Path, model: Callable[[], Model] = lambda: Slow(0)) -> None:
    """`count` ranks as threads of this process."""
    barrier = threading.Barrier(count)

    def rank(index: int) -> None:
        try:
            run(model(), out, Ranks(index, count, lambda: barrier.wait(30) and None))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ranks_leave_the_records_of_one_process(tmp_path: Path) -> None:
    run(Slow(0), tmp_path / "one")
    together(3, tmp_path / "three")
    assert timeless(tmp_path / "three") == timeless(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "three").iterdir()) == [*(f".writing-{i}.lock" for i in range(3)), RECORDS, "run.json"]

    calls, answered = iter(range(1, 100)), list[str]()

    def breaks(ids: Sequence[str]) -> Exception | None:
        if next(calls) > 7:
            return RuntimeError("broken")
        answered.extend(ids)
        return None

    together(2, tmp_path / "broken", lambda: Failing(breaks))
    parts = [read for index in range(2) if (read := (tmp_path / "broken" / PART.format(index))).is_file()]
    kept = [json.loads(line)["sample_id"] for part in parts for line in part.read_text().splitlines()]
    assert sorted(kept) == sorted(answered) and kept
    resumed = Failing(lambda ids: None)
    run(resumed, tmp_path / "broken")
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "one") and sum(map(len, resumed.asked)) == 90 - len(kept)


def test_a_batch_cut_in_two_is_asked_again_as_a_whole(tmp_path: Path) -> None:
    run(Slow(0), tmp_path / "one")
    run(Slow(0), tmp_path / "cut")
    lines = (tmp_path / "cut" / RECORDS).read_text().splitlines(keepends=True)
    (tmp_path / "cut" / RECORDS).write_text("".join(lines[:10]) + lines[10][:50], encoding="utf-8")
    model = Failing(lambda ids: None)
    run(model, tmp_path / "cut")
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "one") and model.asked[0][0] == json.loads(lines[8])["sample_id"]


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    for held in (Ranks(), Ranks(3, 4)):  # a start of its own; a worker that outlived its launcher
        with writing(tmp_path, held), pytest.raises(RecordError, match="another process is writing here"):
            run(Slow(0), tmp_path)
    assert str(run(Slow(0), tmp_path)) == "n=90/90, 0 errors"


def test_a_start_that_was_hashing_pictures_while_another_began_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, over, summaries = threading.Event(), threading.Event(), list[str]()

    def waits(ids: Sequence[str]) -> Exception | None:
        if len(early.asked) <= 5:  # the first batch, and its four samples alone: error rows, which a settling start takes out
            return OSError("no picture")
        entered.set()
        over.wait(60)
        return None

    early = Failing(waits)
    started = threading.Thread(target=lambda: summaries.append(str(run(early, tmp_path))))

    def hashes_long(*arguments: Any) -> dict[str, Any]:
        if threading.current_thread() is not started:
            started.start()
            assert entered.wait(60)
        return run_identity(*arguments)

    monkeypatch.setattr("llava_collab.evaluation.evaluator.run_identity", hashes_long)
    late = Failing(lambda ids: None)
    try:
        with pytest.raises(RecordError, match="another process is writing here"):
            run(late, tmp_path)
    finally:
        over.set()
        started.join(60)
    assert not late.asked and summaries == ["n=86/90, 4 errors"]


def test_a_folder_is_held_while_it_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = []

    def beside(folder: Path, ids: Sequence[Sequence[str]], *, final: bool) -> None:
        with pytest.raises(RecordError, match="another process is writing here"), writing(folder):
            pass
        settled.append(final)
        settle(folder, ids, final=final)

    monkeypatch.setattr("llava_collab.evaluation.evaluator.settle", beside)
    run(Slow(0), tmp_path)
    assert settled == [False, True]


# --- processes that are killed ----------------------------------------------------------------------------------------------------


def start(out: Path, *launcher: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "evaluating.py"), str(out), "0.05"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def written(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("records*.jsonl"))


def kill_at_random(process: subprocess.Popen[str], out: Path, victim: Callable[[], int]) -> None:
    """SIGKILL once it has written more than was there, and up to a third of a second later."""
    there, deadline = written(out), time.monotonic() + 120
    while written(out) <= there and process.poll() is None:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))  # noqa: S311
    os.kill(victim(), signal.SIGKILL)
    process.wait(120)


@pytest.mark.slow
def test_killed_three_times_ends_with_the_same_records(tmp_path: Path) -> None:
    run(Slow(0), tmp_path / "whole")
    counts = []
    for _ in range(3):
        process = start(tmp_path / "killed")
        kill_at_random(process, tmp_path / "killed", lambda: process.pid)  # noqa: B023
        counts.append(written(tmp_path / "killed"))
        assert process.returncode == -signal.SIGKILL
    assert 0 < counts[0] < counts[1] < counts[2] < 90, "the kills did not fall into the run"
    told, _ = start(tmp_path / "killed").communicate(timeout=120)
    assert "n=90/90, 0 errors" in told
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_loses_nothing_and_another_number_goes_on(tmp_path: Path) -> None:
    run(Slow(0), tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(out, *TORCHRUN)
    kill_at_random(process, out, lambda: int((out / "pid-1").read_text()))
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0, told
    before = written(out)
    assert 0 < before < 90 and not read_rows(out)  # all in the parts of the ranks
    process = start(out)  # one process takes over from two, and dies too
    kill_at_random(process, out, lambda: process.pid)
    assert written(out) >= before - 3 * 2  # a batch may have been cut in each rank
    process = start(out, *TORCHRUN)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and timeless(out) == timeless(tmp_path / "whole"), told


@pytest.mark.slow
def test_two_processes_of_the_program_answer_as_one(tmp_path: Path) -> None:
    for part in talkative():
        part.save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = []
    for i in range(18):
        names = [f"{i}-{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            Image.new("RGB", (20 + i, 30), (10 * i, 90, 40 * k)).save(tmp_path / name)
        turns = [{"from": "human", "value": "<image>\n" * len(names) + "why " * i}, {"from": "gpt", "value": "yes"}]
        rows.append({"id": f"q{i}", "image": names, "conversations": turns, "category": "Visual QA"})
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    suite = {"name": "tiny", "root": str(tmp_path), "files": {"train": "train.jsonl", "test": "test.jsonl"}}
    write_json(tmp_path / "suite.yaml", suite | {"categories": {"Visual QA": {"metric": "vqa", "max_new_tokens": 6}}})
    command = ["eval/run.py", "--model", str(tmp_path / "model"), "--suite", str(tmp_path / "suite.yaml"), "--batch-size", "4", "--out"]
    one = run_apart([*command, str(tmp_path / "one")])
    two = run_apart([*TORCHRUN, *command, str(tmp_path / "two")])
    assert one.returncode == two.returncode == 0, two.stderr
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one") and len({r["output"] for r in timeless(tmp_path / "one")}) > 5
    assert one.stdout.splitlines()[0] == two.stdout.splitlines()[0] == f"{tmp_path / 'model'}: n=18/18, 0 errors"
    headers = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert headers[0]["identity"] == headers[1]["identity"] and headers[1]["environment"]["processes"] == 2
