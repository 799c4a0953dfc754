"""Recipes: what they may say, what is found on validation data, and that nothing is asked twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from running import ROOT

from llava_collab.collab.asking import ask
from llava_collab.collab.builder import Builder
from llava_collab.collab.recipe import CollabError, Task, load_recipe
from llava_collab.collab.recorded import Recorded
from llava_collab.evaluation.records import read_rows
from llava_collab.evaluation.system import (
    advantage_table,
    asked_table,
    domain_table,
    measure,
    measure_latency,
    plot_systems,
    read_systems,
    system_table,
)
from llava_collab.evaluation.tools import TOOLS
from llava_collab.types import Answer, Request, Turn, Usage

LABELS = ("bird", "cat", "dog")
WORDS = {"bird": "sings flies nests feathers", "cat": "purrs sleeps whiskers mouse", "dog": "barks runs digs bone"}


def task(seed: int = 0) -> Task:
    """Made-up texts of three classes, some of them hard."""
    rng = np.random.default_rng(seed)
    right: dict[str, str] = {}

    def some(name: str, count: int) -> list[Request]:
        requests = []
        for k in range(count):
            label = LABELS[rng.integers(3)]
            own, other = WORDS[label].split(), WORDS[LABELS[rng.integers(3)]].split()
            text = " ".join([*rng.choice(own, 2), *rng.choice(other, 2), *rng.choice(["the", "a", "my"], 3), f"n{rng.integers(40)}"])
            requests.append(Request(f"{name}-{k}", (Turn("user", text),), choices=LABELS))
            right[requests[-1].id] = label
        return requests

    fit = some("fit", 120)
    return Task(
        "animals", "score", [(r, right[r.id]) for r in fit], some("unlabelled", 60), some("tuning", 60), some("validation", 60),
        some("test", 80), lambda name, answer: float(answer.text == right[name]), right, seed,
    )  # fmt: skip


RECIPE = {
    "name": "animals",
    "pair": {"small": "small", "large": "large"},
    "models": {
        "small": {"kind": "naive-bayes", "words": 6},
        "large": {"kind": "tfidf-lr"},
        "hinted": {"kind": "tfidf-lr", "hinted_by": "small"},
        "taught": {"kind": "two-stage", "student": "small", "teacher": "large", "small_sure": 0.6, "large_sure": 0.6, "steps": 20},
        "strong": {"kind": "distilled", "teacher": "small", "alpha": 0.5, "steps": 20},
    },
    "systems": {
        "DS": {"shunt": {"small": "small", "large": "large", "gate": {"kind": "max", "calibrate": True}, "threshold": {"share": 0.4}}},
        "soft": {"shunt": {"small": "taught", "large": "hinted", "gate": "margin", "hint": "soft", "threshold": {"drop": 0.01}}},
        "hard": {
            "shunt": {"small": "small", "large": "large", "hint": {"kind": "hard", "sure": "threshold"}, "threshold": {"traffic": 0.3}}
        },
        "route": {"route": {"small": "small", "large": "DS", "gate": "random", "threshold": 0.5}},
        "oracle": {"route": {"small": "small", "large": "large", "gate": "oracle", "threshold": {"drop": 0.0}}},
        "router": {
            "route": {"small": "small", "large": "large", "gate": {"kind": "transformed", "epochs": 5}, "threshold": {"share": 0.4}}
        },
        "learned": {
            "shunt": {
                "small": "small",
                "large": "large",
                "gate": {"kind": "deterministic", "features": ["draft", "text"], "epochs": 5},
                "threshold": {"share": 0.4},
            }
        },
        "prior": {"shunt": {"small": "small", "large": "large", "hint": "prior", "threshold": {"traffic": 0.4}}},
        "both": {"ensemble": {"models": ["small", "large"]}},
    },
}


PAIR = {"small": "small", "large": "large"}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "eval/suites/systems").glob("*.yaml")))
def test_every_recipe_in_the_tree_reads(path: str) -> None:
    recipe = load_recipe(ROOT / "eval/suites/systems" / path, TOOLS)
    assert recipe.models and recipe.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"models": {"small": {"kind": "magic"}}}, "no kind 'magic'"),
        ({"models": {"small": {"kind": "naive-bayes", "wrods": 3}}}, "wrods"),
        ({"systems": {"s": {"shunt": {"small": "small", "large": "giant"}}}}, "names 'giant'"),
        ({"systems": {"s": {"blend": {}}}}, "has to be one of shunt"),
        ({"systems": {"small": {"ensemble": {"models": ["large"]}}}}, "a model and a system"),
        ({"pair": {"small": "small", "large": "nobody"}}, "names 'nobody'"),
        ({"models": {"small": {"kind": "network"}, "large": {"kind": "tfidf-lr"}}, "systems": {}}, "network needs path"),
        ({"systems": {"s": {"ensemble": {}}}}, "ensemble needs models"),
        ({"systems": {"s": {"shunt": PAIR | {"gate": {"kind": "max", "epochs": 3}}}}}, "epochs"),
        ({"systems": {"s": {"shunt": PAIR | {"gate": "vibes"}}}}, "gate: no kind 'vibes'"),
        ({"systems": {"s": {"shunt": PAIR | {"hint": {"kind": "prior", "wieght": 0.3}}}}}, "wieght"),
        ({"systems": {"s": {"shunt": PAIR | {"hint": {"kind": "transfer", "model": "giant"}}}}}, "names 'giant'"),
        ({"systems": {"s": {"route": PAIR | {"gate": {"kind": "deterministic", "features": ["giant"]}}}}}, "names 'giant'"),
        ({"systems": {"s": {"shunt": PAIR | {"threshold": {"traffic": 0.3, "drop": 0.1}}}}}, "one budget"),
        ({"models": {"small": {"kind": "oracle"}, "large": {"kind": "tfidf-lr", "hinted_by": "small"}}, "systems": {}}, "in folds"),
    ],
)
def test_recipes_say_what_they_can_not_mean(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CollabError, match=message):
        load_recipe(write(tmp_path, **changes), TOOLS)


def test_circles_and_missing_data_are_named(tmp_path: Path) -> None:
    circle = {"a": {"ensemble": {"models": ["small", "b"]}}, "b": {"ensemble": {"models": ["a"]}}}
    with pytest.raises(CollabError, match="a -> b -> a is a circle"):
        Builder(load_recipe(write(tmp_path, systems=circle)), task=task()).model("a")
    with pytest.raises(CollabError, match="run eval/system.py first"):
        Builder(load_recipe(write(tmp_path))).model("small")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    recipe = load_recipe(write(folder))
    for seed in (0, 1):
        own = replace(task(), seed=seed)
        measure(
            Builder(recipe, task=own, folder=folder / f"seed-{seed}"), own, [*recipe.models, *recipe.systems], folder / f"seed-{seed}", {}
        )
    return folder


def test_systems_are_measured_on_the_same_requests(measured: Path) -> None:
    systems = {system.name: system for system in read_systems(measured)}
    assert set(systems) == set(RECIPE["models"]) | set(RECIPE["systems"])  # type: ignore[arg-type]
    small, large, oracle = (systems[name] for name in ("small", "large", "oracle"))
    assert large.quality().mean > small.quality().mean + 5
    assert oracle.quality().mean >= large.quality().mean - 1
    share = systems["DS"].share_large()
    assert share is not None and systems["DS"].asked() == {"small": 1.0, "large": pytest.approx(share)}
    assert systems["hard"].share_large() == pytest.approx(0.3, abs=0.05)  # type: ignore[comparison-overlap]
    route = systems["route"].asked()
    assert route["small"] > route["large"] > 0  # the nested shunt asks the small one too
    assert systems["route"].share_large() == pytest.approx(route["large"]) and systems["route"].curve() is None
    for name in ("DS", "soft", "hard", "route", "router", "learned"):
        for rows in systems[name].seeds:
            for row in rows:
                for field, value in row["usage"].items():
                    assert value == pytest.approx(sum(part["usage"][field] for part in row["parts"])), (name, field)
    curve = systems["DS"].curve()
    assert curve is not None and curve.small == pytest.approx(small.quality().mean) and curve.large == pytest.approx(large.quality().mean)


def test_tables_and_plot_are_made_of_records_alone(measured: Path, tmp_path: Path) -> None:
    systems = read_systems(measured, ["small", "large", "DS", "router"])
    text = "\n".join(
        table.markdown()
        for table in (system_table(systems, ("small", "large")), advantage_table(systems, ("small", "large")), asked_table(systems))
    )
    assert domain_table(systems, "nobody") is None
    domain = domain_table(systems, "small", 0.6)
    assert domain is not None
    cells = {"own domain": float(domain.lines[0][1]), "elsewhere": float(domain.lines[0][3])}
    assert domain.lines[0][2] == "+0.00 [+0.00, +0.00]"
    share = float(domain.title.split(": ")[1].split("%")[0]) / 100
    whole = share * cells["own domain"] + (1 - share) * cells["elsewhere"]
    assert whole == pytest.approx(systems[0].quality().mean, abs=0.1) and cells["own domain"] > cells["elsewhere"]
    never = domain_table(systems, "small", 1.1)  # it is never so sure: the cells of its own domain stay empty
    assert never is not None and all(line[1:3] == ["", ""] and line[3] for line in never.lines)
    assert "minus large" in text and "cost advantage" in text and "| DS | small 100.0%, large" in text
    plot_systems(systems, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(CollabError, match="no measured systems"):
        read_systems(tmp_path)


def test_latency_is_of_requests_that_come_one_by_one(measured: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, recipe = task(), load_recipe(measured / "recipe.yaml")
    live = Builder(recipe, folder=measured / "seed-0", keep_answers=False)
    measure_latency(live, own, ["small", "DS", "oracle"], measured / "seed-0", 5)
    systems = {system.name: system for system in read_systems(measured)}
    assert "oracle: no latency" in caplog.text and not systems["oracle"].one_by_one
    assert len(systems["DS"].one_by_one) == 5 and systems["DS"].latency(95) <= max(systems["DS"].one_by_one)
    shown = {row["model"] for row in system_table(list(systems.values()), None).plain if row["figure"] == "ms p50"}
    assert shown == {"DS", "small"}
    for path in measured.glob("*/systems/*/latency.json"):
        path.unlink()


def test_a_second_measurement_asks_nobody(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.glob("seed-0/answers/*")}
    own = task()
    builder = Builder(load_recipe(measured / "recipe.yaml"), task=own, folder=measured / "seed-0")
    builder.model("DS").score(own.test)  # type: ignore[attr-defined]
    assert before and {path: path.stat().st_mtime_ns for path in measured.glob("seed-0/answers/*")} == before


def test_what_was_found_serves_without_the_data_and_refuses_another_model(measured: Path) -> None:
    class Fixed:
        name = "fixed"

        def score(self, requests: Sequence[Request]) -> list[Answer]:
            return [Answer("cat", Usage(1), "fixed", scores=(0.1, 0.8, 0.1)) for _ in requests]

        generate = score

    recipe = load_recipe(measured / "recipe.yaml")
    stored = json.loads((measured / "seed-0/thresholds/DS.json").read_text())
    made = {"naive-bayes": lambda name, spec: Fixed()}
    simple = replace(
        recipe,
        models={"small": {"kind": "fixed"}, "large": {"kind": "fixed"}},
        systems={"DS": {"shunt": {"small": "small", "large": "large", "threshold": {"share": 0.4}}}},
    )
    with pytest.raises(ValueError, match="found with other settings"):
        Builder(simple, folder=measured / "seed-0", tools={"fixed": made["naive-bayes"]}).model("DS")
    assert stored["rule"].startswith("best quality at a share")


def test_answers_are_kept_and_a_cut_line_is_asked_again(tmp_path: Path) -> None:
    calls: list[str] = []

    class Echo:
        name = "echo"

        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            calls.extend(request.id for request in requests)
            return [
                Answer("", model="echo", error="no") if request.id == "bad" else Answer(request.text, Usage(1, seconds=0.5), "echo")
                for request in requests
            ]

    asked = [Request(name, (Turn("user", f"{name}?"),)) for name in ("a", "b", "bad")]
    path = tmp_path / "echo.jsonl"
    first = Recorded(Echo(), path, "v1").generate(asked)
    assert Recorded(Echo(), path, "v1").generate(asked) == first and sorted(calls) == ["a", "b", "bad", "bad"]
    path.write_bytes(path.read_bytes()[:-10])
    calls.clear()
    again = Recorded(Echo(), path, "v1").generate(asked[:2])
    assert again == first[:2] and len(calls) == 1
    assert Recorded(Echo(), path, "v2").generate(asked[:1]) and len(calls) == 2
    renamed = [replace(asked[0], id="other")]
    assert Recorded(Echo(), path, "v1").generate(renamed) == first[:1] and len(calls) == 2
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="no kept answer"):
        Recorded(Echo(), path, "v1")


def test_a_disk_that_is_full_is_no_samples_fault(tmp_path: Path) -> None:
    class Echo:
        name = "echo"

        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            return [Answer(request.text, Usage(1), "echo") for request in requests]

    (tmp_path / "file").write_text("")
    model = Recorded(Echo(), tmp_path / "file" / "echo.jsonl", "v1")  # a folder that can't be
    with pytest.raises(RuntimeError, match="answers can't be kept"):
        ask(model, [Request(name, (Turn("user", name),)) for name in ("a", "b")])


def test_leaves_temperatures_and_hints_serve_without_the_data(measured: Path) -> None:
    recipe, own = load_recipe(measured / "recipe.yaml"), task()
    for name in ("small", "taught", "DS", "hard", "prior", "learned"):
        fresh = Builder(recipe, folder=measured / "seed-0", keep_answers=False).model(name)
        rows = read_rows(measured / "seed-0" / "systems" / name)
        assert [answer.text for answer in ask(fresh, own.test, "score")] == [row["output"] for row in rows], name
    changed = replace(recipe, models=dict(recipe.models) | {"small": {"kind": "naive-bayes", "words": 7}})
    builder = Builder(changed, folder=measured / "seed-0")
    for name in ("small", "DS", "small"):  # and says so again, not that there is a circle
        with pytest.raises(ValueError, match="'small' was found with other settings"):
            builder.model(name)
    with pytest.raises(ValueError, match="other settings or data"):
        Builder(replace(recipe, data={"texts": "others"}), folder=measured / "seed-0").model("small")


def test_a_threshold_is_of_what_its_gate_and_hint_learnt(measured: Path, tmp_path: Path) -> None:
    recipe = load_recipe(measured / "recipe.yaml")
    for name, found in (("DS", {"temperature": 9.0}), ("hard", {"strong": ["cat"]}), ("prior", {"prior": 0.77})):
        folder = tmp_path / name
        shutil.copytree(measured / "seed-0", folder)
        path = folder / "found" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | found))
        with pytest.raises(ValueError, match="chosen for something else"):
            Builder(recipe, folder=folder).model(name)


def test_a_stored_system_answers_without_its_data(measured: Path, tmp_path: Path) -> None:
    """As `llava-collab ask` does: thresholds and routers come from the folder, leaves need no fitting."""

    class Fixed:
        def __init__(self, name: str) -> None:
            self.name = name

        def score(self, requests: Sequence[Request]) -> list[Answer]:
            return [Answer("cat", Usage(1), self.name, scores=(0.1, 0.8, 0.1)) for _ in requests]

        generate = score

    systems = {
        "router": {"route": {"small": "a", "large": "b", "gate": {"kind": "transformed", "epochs": 3}, "threshold": {"share": 0.4}}},
        "DS": {"shunt": {"small": "a", "large": "b", "threshold": {"drop": 0.5}}},
    }
    path = tmp_path / "fixed.yaml"
    path.write_text(yaml.safe_dump({"models": {"a": {"kind": "fixed"}, "b": {"kind": "fixed"}}, "systems": systems}), encoding="utf-8")
    recipe, tools = load_recipe(path, ["fixed"]), {"fixed": lambda name, spec: Fixed(name)}
    own = task()
    found = [Builder(recipe, task=own, folder=tmp_path, tools=tools).model(name) for name in systems]
    again = [Builder(recipe, folder=tmp_path, keep_answers=False, tools=tools).model(name) for name in systems]
    for one, other in zip(found, again, strict=True):
        assert [a.model for a in one.generate(own.test)] == [a.model for a in other.generate(own.test)]
    with pytest.raises(ValueError, match="not a stored threshold"):
        Builder(recipe, folder=tmp_path / "elsewhere", tools=tools).model("DS")
