"""What changed between two runs: the tests against enumeration, counts and samples against runs made by hand, and the program."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import ROOT, program

from llava_collab.evaluation import report
from llava_collab.evaluation.compare import Comparison
from llava_collab.evaluation.records import RecordError, open_run, write_rows
from llava_collab.evaluation.statistics import MACRO, mcnemar, sign_flip

# --- tests of significance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (9, 1, 22 / 1024), (5, 5, 1.0), (10, 2, 158 / 4096)]
)
def test_mcnemar_is_the_exact_binomial(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(p)
    assert 0 < mcnemar(3400, 3600) < 0.02  # thousands of changes: no overflow


@pytest.mark.parametrize(
    "terms", [[3.0, 1.0, -0.5, 2.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.2, -0.3], [5.0, -1.0, 2.5, 2.5, -4.0, 1.0, 1.5]]
)
def test_sign_flips_agree_with_all_of_them(terms: list[float]) -> None:
    values = np.array(terms)
    signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-9)
    assert sign_flip(values) == pytest.approx(exact, abs=0.02)
    assert sign_flip(-values) == sign_flip(values) and sign_flip(values * 7) == sign_flip(values)


def test_sign_flips_find_what_is_there_and_hold_their_level() -> None:
    rng = np.random.default_rng(0)
    assert sign_flip(np.zeros(4)) == 1.0
    assert sign_flip(rng.normal(0.5, 1, 200)) < 0.001
    below = np.mean([sign_flip(rng.normal(0, 1, 20), permutations=400) < 0.05 for _ in range(300)])
    assert 0.02 < below < 0.09


def test_many_flips_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(0.1, 1, 50)
    whole = sign_flip(values)
    monkeypatch.setattr("llava_collab.evaluation.statistics._CHUNK", 700)
    assert sign_flip(values) == whole


# --- two runs ---------------------------------------------------------------------------------------------------------------------


def _row(
    number: int, score: float | None, category: str = "Visual QA", family: str = "name", output: str = "", **more: Any
) -> dict[str, Any]:
    status = {"status": "error", "error": "no image"} if score is None else {"status": "ok", "error": None}
    about = {"sample_id": f"{category[-1]}{number}", "category": category, "family": family, "prompt": f"<image>\nWhat is {number}?"}
    measured = {"references": ["red", "a red"], "output": output or f"answer {score}", "score": score, "metric": "m", "scores": {}}
    return about | measured | status | more


def _folder(path: Path, name: str, rows: list[dict[str, Any]], **identity: Any) -> Path:
    open_run(path, {"model": name, "items": {"all": len(rows)}} | identity, {})
    write_rows(path, rows)
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Visual QA: 2 of 10 better, 1 worse; stories: graded, two families; samples and errors in one run only."""
    a = [_row(i, 100.0 * (i < 4)) for i in range(10)]
    b = [_row(i, 100.0 * (1 <= i < 6), output="same words" if i == 9 else "") for i in range(10)]
    a += [_row(i, 50.0, "Visual Storytelling", ("story", "ending")[i % 2]) for i in range(6)]
    b += [_row(i, 50.0 + 2.5 * i, "Visual Storytelling", ("story", "ending")[i % 2]) for i in range(6)]
    a += [_row(20, None), _row(21, 100.0), _row(22, None), _row(30, 0.0)]
    b += [_row(20, 0.0), _row(21, None), _row(22, None), _row(40, 100.0), _row(41, 100.0)]
    return _folder(tmp_path / "a", "static", a, seed=0), _folder(tmp_path / "b", "hyper", b, seed=1)


def test_differences_by_category_and_family(two: tuple[Path, Path]) -> None:
    comparison = Comparison(*report.read_runs(two))
    seen = comparison.categories
    assert list(seen) == ["Visual QA", "Visual Storytelling", MACRO]
    qa, story, macro = seen.values()
    assert (qa.better, qa.worse, qa.same, qa.difference.n, qa.test) == (2, 1, 7, 10, "exact McNemar")
    assert (qa.first, qa.second, qa.difference.mean, qa.p) == (40, 50, pytest.approx(10), 1.0)
    assert (story.better, story.worse, story.same, story.test) == (5, 0, 1, "sign flips")
    assert story.difference.mean == pytest.approx(6.25) and story.p == pytest.approx(2 / 32, abs=0.02)
    assert macro.difference.mean == pytest.approx((10 + 6.25) / 2) and (macro.better, macro.same) == (7, 8)
    assert report.paired(comparison.first, comparison.second)[MACRO] == macro.difference  # the same figures as in eval/table.py
    assert {name: change.difference.mean for name, change in comparison.families("Visual Storytelling").items()} == {
        "ending": 7.5,
        "story": 5.0,
    }
    assert comparison.families("Visual QA") == {}


def test_the_macro_test_weighs_categories_alike(tmp_path: Path) -> None:
    """A hundred items that rise in one category and one that falls by as much in another: no difference of the macro-average."""
    a = [_row(i, 50.0) for i in range(100)] + [_row(0, 50.0, "Spatial Inference")]
    b = [_row(i, 60.0) for i in range(100)] + [_row(0, 40.0, "Spatial Inference")]
    seen = Comparison(*report.read_runs([_folder(tmp_path / "a", "a", a), _folder(tmp_path / "b", "b", b)])).categories
    assert seen["Visual QA"].p < 0.001 and seen[MACRO].difference.mean == pytest.approx(0) and seen[MACRO].p == 1.0


def test_every_differing_sample_is_in_the_csv_once(two: tuple[Path, Path]) -> None:
    lines = list(csv.DictReader(io.StringIO(Comparison(*report.read_runs(two)).csv_text())))
    changes = {line["sample_id"]: line["change"] for line in lines}
    assert len(changes) == len(lines)
    assert changes == {
        "A0": "worse",
        "A4": "better",
        "A5": "better",
        "A9": "same score",
        **{f"g{i}": "better" for i in range(1, 6)},
        "A20": "error in A",
        "A21": "error in B",  # A22 failed alike in both
        "A30": "only in A",
        "A40": "only in B",
        "A41": "only in B",
    }
    by_id = {line["sample_id"]: line for line in lines}
    assert by_id["A0"]["difference"] == "-100.0" and by_id["A20"]["difference"] == "" and by_id["A21"]["error_b"] == "no image"
    assert json.loads(by_id["A0"]["references"]) == ["red", "a red"] and by_id["g1"]["output_b"] == "answer 52.5"


def test_the_program_shows_settings_samples_and_what_is_in_one_only(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = program("eval/compare.py")
    module.main(module.Args(*two, top=2, out=tmp_path / "out" / "changed.csv"))
    text = capsys.readouterr().out
    assert "- seed: 0 / 1" in text and "- model: 'static' / 'hyper'" in text
    assert "1 samples are in A only: A30" in text and "2 samples are in B only: A40, A41" in text
    assert text.count("(Visual QA, name, m)") == 2 and "-100.0  A0" in text and "B 0.0" in text and "red | a red" in text
    assert len((tmp_path / "out" / "changed.csv").read_text().splitlines()) > 10


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _folder(tmp_path / "a", "a", [_row(0, 0.0, output="\x1b[2Jboo\r\nnext\x07")])
    b = _folder(tmp_path / "b", "b", [_row(0, 100.0, output="ok", prompt="other")])
    module = program("eval/compare.py")
    module.main(module.Args(a, b))
    text = capsys.readouterr().out
    assert r"\x1b[2Jboo\r" in text and not {"\x1b", "\r", "\x07"} & set(text) and "prompt of B" in text


def test_runs_that_cannot_be_compared_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    module = program("eval/compare.py")
    with pytest.raises(RecordError, match="named twice"):
        module.main(module.Args(two[0], two[0]))
    with pytest.raises(RecordError, match="no answered sample in common"):
        module.main(module.Args(two[0], _folder(tmp_path / "c", "c", [_row(99, 1.0)])))
    with pytest.raises(RecordError, match="differently"):
        module.main(module.Args(two[0], _folder(tmp_path / "d", "d", [_row(0, 1.0, metric="other")])))
    with pytest.raises(RecordError, match=r"run\.json"):
        module.main(module.Args(two[0], tmp_path))


def test_released_records_compare(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "docs" / "results" / "release"
    module = program("eval/compare.py")
    module.main(module.Args(folder / "majority", folder / "llava-0", top=1))
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| Macro"))
    assert "| 25.9 | 42.6 | +16.7 [" in line and "<0.001" in line
