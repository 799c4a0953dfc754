"""Suites, intervals, tables and the two programs, from JSONL files to a table."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from llava_collab.cme.tasks import TASKS
from llava_collab.evaluation import report
from llava_collab.evaluation.captions import DocumentFrequencies
from llava_collab.evaluation.records import RecordError, open_run, read_rows, write_rows
from llava_collab.evaluation.statistics import MACRO, bootstrap
from llava_collab.evaluation.suite import SuiteError, load_suite

ROOT = Path(__file__).parent.parent
SUITES = sorted(path for path in (ROOT / "eval" / "suites").glob("*.yaml") if path.stem != "llava_1_5")  # that one is lmms-eval's


# --- intervals --------------------------------------------------------------------------------------------------------------------


def test_bootstrap_gives_the_textbook_interval() -> None:
    scores = np.repeat([0.0, 100.0], [80, 120])
    result = bootstrap({"a": scores, "b": np.full(50, 40.0)})
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert result["a"].mean == 60 and result["a"].half_width == pytest.approx(half, rel=0.1)
    assert (result["b"].low, result["b"].high) == (40, 40)
    assert result[MACRO].mean == 50 and result[MACRO].half_width == pytest.approx(half / 2, rel=0.1)  # within categories only
    assert bootstrap({"a": scores})["a"] == result["a"]  # the other categories don't touch its draws
    with pytest.raises(ValueError, match="no scored item"):
        bootstrap({"a": np.array([])})


def test_seeds_are_resampled_with_the_items_and_alike_in_all_categories() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 400)) * 3
    seeds = np.array([[10.0], [13.0], [19.0]])
    item, seed = noise.std() / 20, seeds.std(ddof=1) / np.sqrt(3)
    result = bootstrap({"a": seeds + noise, "b": seeds + 0 * noise, "c": noise[0]}, resamples=8000)
    assert result["a"].error == pytest.approx(np.hypot(item, seed), rel=0.05) and result["a"].n == 400
    assert result["b"].error == pytest.approx(seed, rel=0.05) and result["c"].error == pytest.approx(item, rel=0.05)
    assert bootstrap({"a": seeds + 0 * noise, "b": seeds + 0 * noise}, resamples=8000)[MACRO].error == pytest.approx(seed, rel=0.05)
    assert result["b"].detectable == pytest.approx(2.8 * result["b"].error)


def test_large_groups_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.arange(100.0)
    whole = bootstrap({"a": scores}, resamples=50)["a"]
    monkeypatch.setattr("llava_collab.evaluation.statistics._CHUNK", 700)
    assert bootstrap({"a": scores}, resamples=50)["a"] == whole


# --- tables -----------------------------------------------------------------------------------------------------------------------


def row(number: int, score: float | None, category: str = "Spatial Inference", **more: Any) -> dict[str, Any]:
    usage = {"calls": 1, "images": 1, "prompt_tokens": 10, "generated_tokens": 4, "flops": 2e9, "seconds": 0.5}
    status = {"status": "error", "error": "no image"} if score is None else {"status": "ok", "error": None}
    base = {
        "sample_id": f"{category}-{number}",
        "category": category,
        "metric": "accuracy",
        "references": ["yes"],
        "scores": {},
        "output": "yes",
    }
    return base | {"score": score, "usage": usage, "seconds": 0.5} | status | more


def folder(path: Path, name: str, rows: list[dict[str, Any]], asked: int | None = None) -> Path:
    open_run(path, {"model": name, "items": {"all": asked or len(rows)}}, {})
    write_rows(path, rows)
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    a = [row(i, 100.0 * (i < 2)) for i in range(4)] + [row(i, 50.0, "Visual QA") for i in range(2)] + [row(9, None)]
    b = [row(i, 100.0) for i in range(4)] + [row(i, 50.0, "Visual QA") for i in range(2)]
    return [folder(tmp_path / "a", "static", a), folder(tmp_path / "b", "hyper_x", b, asked=8)]


def test_score_table_is_computed_from_the_rows(two: list[Path]) -> None:
    runs = report.read_runs(two)
    assert [run.headline for run in runs] == ["n=6/7, 1 errors", "n=6/8, 0 errors, 2 not answered yet"]
    assert report.score_table(runs).markdown() == (
        "**Scores (0 to 100, ± half of the 95 % bootstrap interval)**\n\n"
        "| model | Visual QA | Spatial Inference | Macro | n | errors | tokens/item | GFLOPs/item | s/item |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| static | 50.0 ± 0.0 | 50.0 ± 50.0 | 50.0 ± 25.0 | 6/7 | 1 | 4 | 2 | 0.5 |\n"
        "| hyper_x | 50.0 ± 0.0 | 100.0 ± 0.0 | 75.0 ± 0.0 | 6/8 | 0 | 4 | 2 | 0.5 |"
    )
    assert r"hyper\_x & 50.0 $\pm$ 0.0" in report.score_table(runs).latex()
    assert "hyper_x,Macro,score,75.0,75.0,75.0,6\n" in report.csv_text([report.score_table(runs)])


def test_seeds_of_a_model_are_pooled(tmp_path: Path) -> None:
    scores = {"x": ([100.0, 0.0, 50.0], [0.0, 0.0, None]), "y": ([100.0, 100.0, 50.0], [100.0, 0.0, 0.0])}
    folders = [folder(tmp_path / f"{name}{seed}", name, list(map(row, range(3), scores[name][seed]))) for name in "xy" for seed in (0, 1)]
    x, y = report.pools(report.read_runs(folders))
    assert (x.label, x.headline, y.headline) == ("x", "n=2/3, 1 errors", "n=3/3, 0 errors")
    assert x.intervals()[MACRO].mean == 25 and y.intervals()[MACRO].mean == pytest.approx(175 / 3)
    difference = report.paired(x, y)[MACRO]
    assert (difference.n, difference.mean) == (2, 50.0)
    alone = report.read_runs(folders[:1])[0]  # another number of seeds: means are compared
    assert report.paired(alone, y)[MACRO].mean == pytest.approx(np.mean([0.0, 50.0, -25.0]))


def test_no_macro_over_other_categories(two: list[Path], tmp_path: Path) -> None:
    half = folder(tmp_path / "c", "half", [row(i, 100.0) for i in range(3)])
    line = report.score_table(report.read_runs([*two, half])).lines[2]
    assert line[1:4] == ["–", "100.0 ± 0.0", "–"]


def test_paired_difference_uses_common_items_and_their_pairing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 80, 40)
    a = folder(tmp_path / "a", "a", [row(i, float(s)) for i, s in enumerate(base)])
    b = folder(tmp_path / "b", "b", [row(i, float(s) + 5) for i, s in enumerate(base) if i != 3] + [row(99, 0.0)])
    first, second = report.read_runs([a, b])
    difference = report.paired(first, second)["Spatial Inference"]
    assert (difference.n, difference.mean) == (39, pytest.approx(5)) and difference.half_width < 1e-6 < first.intervals()[MACRO].half_width
    assert "+5.0 [+5.0, +5.0]*" in report.difference_table(first, [second]).markdown()
    other = folder(tmp_path / "c", "c", [row(0, 1.0, metric="anls")])
    with pytest.raises(RecordError, match="differently"):
        report.paired(first, report.read_runs([other])[0])


def test_yes_bias_shows_in_balanced_accuracy() -> None:
    said_yes = [row(i, 100.0 * yes, scores={"said_yes": 100.0, "is_yes": 100.0 * yes}) for i, yes in enumerate([1, 1, 1, 0])]
    assert report.yes_no(said_yes) == {"yes_no_accuracy": 75, "balanced_accuracy": 50, "yes_rate": 100}


def test_corpus_bleu_is_sacrebleus() -> None:
    import sacrebleu

    rows = [
        row(0, 1.0, output="a red boat on a lake", references=["A red boat on the lake", "a boat"], metric="cider_d"),
        row(1, 1.0, output="two dogs run in snow", references=["two dogs run in the snow"], metric="cider_d"),
    ]
    references: Any = [["A red boat on the lake", "two dogs run in the snow"], ["a boat", None]]
    expected = sacrebleu.corpus_bleu([r["output"] for r in rows], references, lowercase=True).score
    assert report.beside(rows)["bleu4"] == pytest.approx(expected) and expected > 0


def test_runs_of_one_name_are_told_apart(two: list[Path], tmp_path: Path) -> None:
    again = folder(tmp_path / "d", "static", [row(0, 1.0)])
    assert [run.label for run in report.read_runs([two[0], again])] == [f"static ({two[0]})", f"static ({again})"]
    with pytest.raises(RecordError, match="named twice"):
        report.read_runs([two[0], two[0]])


# --- suites -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_parses_and_knows_its_categories(path: Path) -> None:
    suite = load_suite(path)
    known = set(TASKS) if path.stem == "cme-open" else set(report.CATEGORIES)
    assert suite.name == path.stem and set(suite.categories) == known and {"train", "test"} <= set(suite.splits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}}, "unknown key"),
        ({"files": {}}, "either `files`"),
        ({"files": {}, "sets": ["imagenet"]}, "no real set"),
        ({"files": {"test": "t.jsonl"}}, "lacks 'train'"),
        ({"categories": {"a": {"metric": "vqa"}}}, "lacks 'max_new_tokens'"),
        ({"categories": {"a": {"metric": "bleurt", "max_new_tokens": 1}}}, "no metric 'bleurt'"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"name": "x", "files": {"train": "a", "test": "b"}, "categories": {"a": {"metric": "vqa", "max_new_tokens": 4}}}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(good), encoding="utf-8")
    assert load_suite(path).max_new_tokens == {"a": 4}
    path.write_text(yaml.safe_dump(good | change), encoding="utf-8")
    with pytest.raises((SuiteError, ValueError), match=message):
        load_suite(path)


def test_an_unknown_split_and_a_missing_file_name_the_cure(tmp_path: Path) -> None:
    suite = load_suite(ROOT / "eval" / "suites" / "cmt-open.yaml")
    with pytest.raises(SuiteError, match="there are train, val, test"):
        suite.read("dev", tmp_path)
    with pytest.raises(FileNotFoundError, match="--data-root"):
        suite.read("test", tmp_path)


# --- programs ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A tiny CMT-like folder: train and test of three categories. The majority baseline opens no image, so there is none."""
    root = tmp_path / "data"
    root.mkdir()
    cases = [
        ("Visual QA", "What colour is it?", ["red", "blue"]),
        ("Visual Captioning", "Describe it.", ["a red boat", "a blue cat on a chair"]),
    ]
    cases += [("Spatial Inference", "Is it left?", ["yes", "no"])]
    for split, count in (("train", 9), ("test", 6)):
        lines = []
        for category, prompt, answers in cases:
            for i in range(count):
                turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answers[i % 3 == 0]}]
                name = f"{split}-{category}-{i}"
                lines.append({"id": name, "image": f"{name}.png", "conversations": turns, "category": category, "family": "f"})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "eval" / f"{name}.py"))


def test_majority_through_both_programs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, table = program("run"), program("table")
    common = {"model": "majority", "suite": ROOT / "eval" / "suites" / "cmt-open.yaml", "data_root": data, "batch_size": 4}
    run["main"](run["Args"](out=tmp_path / "plain", items_per_category=5, **common))
    run["main"](run["Args"](out=tmp_path / "blind", blind=True, **common))
    summary = run["main"](run["Args"](out=tmp_path / "permuted", permute_images=True, **common))
    assert (summary.ok, summary.errors) == (18, 0)
    rows = [json.loads(line) for line in (tmp_path / "permuted" / "records.jsonl").read_text().splitlines()]
    assert all(r["images_from"] != r["sample_id"] for r in rows)
    assert next(r["score"] for r in rows if r["category"] == "Visual Captioning" and r["references"] == ["a red boat"]) > 0
    frequencies = DocumentFrequencies.load(tmp_path / "plain" / "caption_frequencies.json")
    identity = json.loads((tmp_path / "plain" / "run.json").read_text())["identity"]
    assert (frequencies.items, frequencies.sha256()) == (9, identity["metrics"]["frequencies_sha256"])
    capsys.readouterr()

    compare = (str(tmp_path / "blind"), "majority+permuted")
    table["main"](table["Args"](runs=tuple(tmp_path / n for n in ("plain", "blind", "permuted")), out=tmp_path / "t", compare=compare))
    text = capsys.readouterr().out
    assert "- majority: n=15/15, 0 errors" in text and "Paired differences from majority+blind" in text
    assert "+0.0 [+0.0, +0.0]" in text and "- permute_images: False / True" in text  # guessing does not look
    assert (tmp_path / "t" / "table.md").read_text() == text.rstrip("\n") + "\n"
    assert all((tmp_path / "t" / name).stat().st_size > 100 for name in ("table.csv", "table.tex", "scores.png"))


def test_a_model_folder_through_the_program(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))
    from llava_collab.models.build import ModelSpec, build

    network, processor = build(ModelSpec(visual_expert={}, language_expert={}))
    network.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for i in range(6):
        for category in ("Visual QA", "Visual Captioning", "Spatial Inference"):
            Image.new("RGB", (20 + i, 30), (40 * i, 90, 10)).save(data / f"test-{category}-{i}.png")
    (data / "test-Visual QA-2.png").write_bytes(b"not a picture")
    run = program("run")
    common = {"model": str(tmp_path / "model"), "suite": ROOT / "eval" / "suites" / "cmt-open.yaml", "data_root": data}
    summary = run["main"](run["Args"](out=tmp_path / "plain", **common))
    assert (summary.ok, summary.errors) == (17, 1)
    summary = run["main"](run["Args"](out=tmp_path / "cached", feature_cache=True, **common))
    assert (summary.ok, summary.errors) == (17, 1)
    assert run["main"](run["Args"](out=tmp_path / "blind", blind=True, **common)).errors == 0
    plain, cached = ({row["sample_id"]: row["status"] for row in read_rows(tmp_path / name)} for name in ("plain", "cached"))
    assert plain == cached and plain["test-Visual QA-2"] == "error"
    identity = json.loads((tmp_path / "plain" / "run.json").read_text())["identity"]
    assert len(identity["model_sha256"]) == len(identity["prompt_template_sha256"]) == 64


def test_controls_are_not_mixed(data: Path, tmp_path: Path) -> None:
    run = program("run")
    suite = ROOT / "eval" / "suites" / "cmt-open.yaml"
    with pytest.raises(ValueError, match="one at a time"):
        run["main"](run["Args"](model="majority", suite=suite, out=tmp_path, data_root=data, blind=True, permute_images=True))


@pytest.mark.parametrize("name", ["run", "table"])
def test_help_teaches(name: str) -> None:
    command = [sys.executable, str(ROOT / "eval" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "records.jsonl" in done.stdout, done.stderr
