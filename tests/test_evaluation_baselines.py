"""Baselines without a network: what each may know, and that it makes the most of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_collab.data.samples import Sample
from llava_collab.evaluation import baselines, detector
from llava_collab.evaluation.baselines import BASELINES, blind, majority, ocr_rules, oracle
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.reading import Line, Reader
from llava_collab.types import Model, Request, Turn

EXACT = Scorer({"c": "vqa", "other": "vqa"})


def sample(number: int, prompt: str = "q", answer: str = "a", family: str = "f", category: str = "c", **meta: Any) -> Sample:
    return Sample(f"s{number}", (Path(f"{number}.png"),), (Turn("user", f"<image>\n{prompt}"),), category, family, (answer,), meta)


def answers(model: Model, asked: Sequence[Sample]) -> list[str]:
    return [answer.text for answer in model.generate([one.request() for one in asked])]


def test_majority_answers_by_family_then_category() -> None:
    train = [sample(i, answer=a, family=f) for i, (a, f) in enumerate([("red", "x")] * 2 + [("2", "y")] * 3 + [("blue", "x")])]
    asked = [sample(10, family="x"), sample(11, family="new"), sample(12, category="other")]
    model = majority(train, asked, EXACT)
    assert isinstance(model, Model)
    found = model.generate([s.request() for s in asked] + [Request("stranger", ())])
    assert [a.text for a in found] == ["red", "2", "", ""]
    assert [a.error is None for a in found] == [True, True, False, False]


def test_ties_go_by_the_alphabet_and_training_answers_are_needed() -> None:
    train = [sample(1, answer="yes"), sample(2, answer="no")]
    assert answers(majority(train, train, EXACT), train[:1]) == answers(majority(train[::-1], train, EXACT), train[:1]) == ["no"]
    for make in (majority, blind):
        with pytest.raises(ValueError, match="train file"):
            make([], train, EXACT)


def test_the_blind_guesser_finds_every_leak_of_the_wording() -> None:
    """A leak a family, each to be found by another of the guessers; a family without one stays at its most frequent answer."""
    train, asked = [], []
    for i in range(40):
        words = ("red", "blue", "green", "black")
        train += [
            sample(5 * i, f"Is it {words[i % 4]} like number {i}?", words[i % 4], "words"),
            sample(5 * i + 1, f"prompt {i % 4}", f"answer {i % 4}", "prompt"),
            sample(5 * i + 2, f"cat{i} or dog{i}?", f"cat{i}", "first", choices=[f"dog{i}", f"cat{i}"]),
            sample(5 * i + 3, f"{words[i % 4]} or fox?", "fox", "usual", choices=[words[i % 4], "fox"]),
            sample(5 * i + 4, "What?", "x" if i % 3 else f"y{i}", "none"),
        ]
    asked = [
        sample(900, "Is it green like number 77?", "green", "words"),
        sample(901, "prompt 3", "answer 3", "prompt"),
        sample(902, "cat77 or dog77?", "cat77", "first", choices=["dog77", "cat77"]),
        sample(903, "fox or mouse?", "fox", "usual", choices=["mouse", "fox"]),
        sample(904, "What?", "y", "none"),
    ]
    assert answers(blind(train, asked, EXACT), asked) == ["green", "answer 3", "cat77", "fox", "x"]


def test_the_blind_guesser_sees_no_options_that_only_the_picture_shows() -> None:
    train = [sample(i, "Which bar is the highest?", f"bar{i}", choices=[f"bar{i}", "low"]) for i in range(20)]
    asked = [sample(99, "Which bar is the highest?", "bar99", choices=["bar99", "low"])]
    assert answers(blind(train, asked, EXACT), asked) == ["bar0"]


def test_the_oracle_needs_the_truth() -> None:
    truth = [{"objects": [{"name": "camel", "box": [0, 0, 50, 50], "large": True}]}]
    asked = [
        sample(1, family="name", slots={}, truth=truth),
        sample(2, family="name"),
        sample(3, family="which", slots={"a": "a", "b": "b"}, truth=truth),
    ]
    found = oracle([], asked, EXACT).generate([one.request() for one in asked])
    assert found[0].text == "camel" and found[0].error is None
    assert "carries no truth" in str(found[1].error) and "which" in str(found[2].error)


def line(text: str, x: float, y: float, height: float = 16) -> Line:
    return Line(text, x - 4 * len(text), y - height / 2, x + 4 * len(text), y + height / 2)


def test_print_becomes_truth() -> None:
    card = {"country": "Portugal", "capital": "Lisbon", "region": "Europe", "text": [["Portugal", 40]]}
    tile = {"symbol": "Be", "name": "Beryllium", "number": 4, "text": [["Be", 90]]}
    reader = Reader([sample(1, truth=[card]), sample(2, truth=[tile])])
    assert reader.truth("capital", [line("PORTUGA1", 112, 170)])["capital"] == "Lisbon"
    assert reader.truth("card_read", [line("Atlantis", 112, 170)]) == {"country": "Atlantis"}
    assert reader.truth("element_name", [line("4", 40, 40, 30), line("Be", 112, 120, 90)]) == {
        "symbol": "Be",
        "number": "4",
        "name": "Beryllium",
    }
    assert reader.truth("sign", [line("NO", 80, 90), line("EXIT", 140, 92)]) == {"word": "NO EXIT"}
    lying = [line("Title 1999", 112, 15), line("rain", 30, 60), line("102", 180, 60), line("fog", 30, 110), line("l3", 90, 110)]
    assert reader.truth("chart_top", lying) == {"rows": [["rain", 102], ["fog", 13]]}
    standing = [line("Title", 112, 15), line("93", 170, 40), line("20", 56, 90), line("IBM", 56, 210), line("GOOG", 170, 211)]
    assert reader.truth("chart_top", standing) == {"rows": [["IBM", 20], ["GOOG", 93]]}
    bill = [line("SHOP", 112, 20), line("tea", 30, 60), line("4.35", 190, 61), line("TOTAL", 40, 120), line("4.35", 190, 120)]
    assert reader.truth("receipt_total", bill) == {"rows": [["tea", 435]]}
    with pytest.raises(ValueError, match="no print"):
        reader.truth("sign", [])


def test_ocr_answers_by_rules_and_guesses_where_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = {"word": "TAXI", "text": [["TAXI", 40]]}
    train = [sample(i, family="sign", answer="STOP", truth=[sign]) for i in range(3)] + [sample(9, family="name", answer="dog")]
    asked = [sample(20, family="sign", slots={}), sample(21, family="sign", slots={}), sample(22, family="name")]
    read = {"20.png": [line("TAXI", 112, 90)], "21.png": []}
    monkeypatch.setattr(baselines, "read_lines", lambda path: read[path.name])
    assert answers(ocr_rules(train, asked, EXACT), asked) == ["TAXI", "STOP", "dog"]


def test_a_detector_answers_by_rules_as_surely_as_it_sees_and_else_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    things = {"cat": (0, True), "dog": (3, False)}  # name: quarter, large

    def seen(names: Sequence[str]) -> np.ndarray:
        rows = np.zeros((4, 6), np.float32)
        for name in names:
            quarter, large = things[name]
            rows[quarter, list(things).index(name)], rows[quarter, 4] = 5.0, 5.0 * large
        return rows

    class Eyes:
        flops = 7.0

        def __call__(self, paths: Sequence[Path]) -> np.ndarray:
            noise = np.random.default_rng(0).normal(0, 0.1, (len(paths), 4, 6))
            return np.stack([seen([name for name in things if name in path.stem]) for path in paths]) + noise.astype(np.float32)

    def shown(number: int, names: str, **more: Any) -> Sample:
        boxes = {0: [0, 0, 100, 100], 3: [120, 120, 200, 200]}
        objects = [{"name": name, "box": boxes[things[name][0]], "large": things[name][1]} for name in names.split("-") if name]
        own = sample(number, truth=[{"objects": objects, "place": "sea"}], **more)
        return replace(own, images=(Path(f"{number}-{names}.png"),))

    monkeypatch.setattr(detector, "Quarters", Eyes)
    names = ("cat", "dog", "cat-dog")
    train = [shown(k, names[k % 3], family="exists", answer="no" if k % 3 else "yes", slots={"a": "a cat"}) for k in range(60)]
    asked = [
        shown(90, "cat", family="exists", slots={"a": "a cat"}),
        shown(91, "cat-dog", family="relation_yesno", slots={"a": "the cat", "x": "above", "b": "the dog"}),
        shown(92, "cat", family="relation_yesno", slots={"a": "the cat", "x": "above", "b": "the dog"}),
    ]
    model = BASELINES["detector"](train, asked, EXACT, "detector")
    exists, above, unseen = model.generate([one.request() for one in asked])
    assert (exists.text, above.text) == ("yes", "yes") and exists.likelihood is not None and 0.5 < exists.likelihood < 1.0
    assert exists.usage.flops == 7.0 and exists.model == "detector" and unseen.likelihood == 0.0  # no dog to be above: a guess
    with pytest.raises(ValueError, match="no training picture"):
        BASELINES["detector"]([sample(1)], [], EXACT, "detector")


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "detector"])  # which needs a network; see above
def test_every_baseline_carries_its_label(name: str) -> None:
    train = [sample(1, family="name", slots={}, truth=[{"objects": [{"name": "a", "box": [0, 0, 1, 1], "large": True}]}])]
    assert BASELINES[name](train, train, EXACT, "label").generate([train[0].request()])[0].model == "label"


def test_a_constant_text_that_is_partly_right_is_found() -> None:
    """No whole answer comes twice, but a sentence does."""
    train = [sample(i, answer=f"alpha{i} beta{i} gamma{i} delta{i}. There are two objects.") for i in range(20)]
    asked = [sample(99, answer="alpha99 beta99 gamma99 delta99. There are two objects.")]
    assert answers(blind(train, asked, Scorer({"c": "rouge_l"})), asked) == ["There are two objects."]
