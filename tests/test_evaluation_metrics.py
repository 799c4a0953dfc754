"""The rules of the metrics by hand: traps, odd outputs, METEOR without Java. What they share with others: test_evaluation_references.py."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llava_collab.data.samples import Sample
from llava_collab.evaluation import captions, report
from llava_collab.evaluation.captions import DocumentFrequencies, meteor
from llava_collab.evaluation.evaluator import run_identity
from llava_collab.evaluation.metrics import (
    METRICS,
    Context,
    Scorer,
    chair,
    checklist_recall,
    describe,
    same_answer,
    soft_accuracy,
)
from llava_collab.evaluation.text import find_phrases, parse_number, phrase_key, polarity, singular
from llava_collab.types import Turn


def item(*answers: str, category: str = "c", family: str = "", **meta: Any) -> Sample:
    return Sample("s", (), (Turn("user", "?"),), category, family, answers, meta)


def score(metric: str, output: str, sample: Sample, context: Context | None = None) -> float:
    return Scorer({"c": metric}, context=context or Context()).score(output, sample).score


PROGRAM = """
import sys
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    print(parts[-1].count("a") if kind == "SCORE" else "\\n".join([str(int(p) / 10) for p in parts] + ["0.25"]), flush=True)
"""


def test_meteor_is_one_program_for_all_samples_and_absent_without_java(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def program(source: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", source], stdin=pipe, stdout=pipe, text=True)

    rows = [{"output": f"{text}\n|||", "references": ["x"], "metric": "cider_d", "scores": {}} for text in ("a", "", "aaa")]
    with program(PROGRAM) as running:
        monkeypatch.setattr(captions, "_meteor_program", lambda: running)
        assert meteor([row["output"] for row in rows], [["x"]] * 3) == (25.0, [10.0, 0.0, 30.0])
        assert report.beside(rows)["meteor"] == 25
    with program("") as running:  # a program that dies is a line in the log and no figure
        monkeypatch.setattr(captions, "_meteor_program", lambda: running)
        assert meteor(["a"], [["x"]]) is None and "no METEOR" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    captions._meteor_program.cache_clear()
    assert meteor(["a"], [["x"]]) is None and "meteor" not in report.beside(rows)
    captions._meteor_program.cache_clear()


def test_a_run_carries_the_versions_of_the_metrics_it_used() -> None:
    scorer = Scorer({"a": "vqa", "b": "anls"}, {("b", "f"): "accuracy"})
    identity = run_identity(cast(Any, SimpleNamespace(name="m")), [], scorer, {}, "test", {})
    assert identity["metrics"]["versions"] == {name: METRICS[name].version for name in ("accuracy", "anls", "vqa")}


def test_every_metric_is_described_with_version_and_source() -> None:
    lines = describe().splitlines()
    assert describe() in (Path(__file__).parent.parent / "docs/evaluation.md").read_text(encoding="utf-8")
    assert len(lines) == 2 + len(METRICS) and all(line.count(" | ") == 2 for line in lines)
    for name, metric in METRICS.items():
        assert name == metric.name and f"| `{name}` | {metric.version} | {metric.source} |" in lines


@pytest.mark.parametrize("output", ["", " \n", "...", "the", "猫が座っている。", "É, ß; ½", "\x00", "a dog " * 5_000, "x" * 100_000])
@pytest.mark.parametrize("reference", ["a dog", "the", "5", "yes", "猫"])
def test_odd_outputs_have_plain_scores(output: str, reference: str) -> None:
    context = Context(DocumentFrequencies.of([["a dog"], ["two cats"]]), (("dog",), ("cat",)))
    sample = item(reference, objects=["dog"], checklist={"objects": ["dog"], "counts": ["2 dogs"]}, beats=[["dog"], ["a"]])
    for name in METRICS:
        scored = Scorer({"c": name}, context=context).score(output, sample)
        assert 0 <= scored.score <= 100
        assert all(value == value and 0 <= value < 1e6 for value in scored.scores.values())
        if not output.strip(" \n.") and reference != "the":
            assert scored.score == 0, name


def test_soft_accuracy_of_few_annotators_reaches_one() -> None:
    assert soft_accuracy("red", ["red", "red"]) == 1
    assert soft_accuracy("red", ["red", "blue"]) == 0.5
    assert soft_accuracy("red", ["red", "red", "blue"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_vqa_names_which_of_its_two_metrics_it_used() -> None:
    scorer = Scorer({"c": "vqa"})
    assert scorer.score("two", item("2")).metric == "exact_match"
    soft = scorer.score("2", item("2", human_answers=["2", "two", "3"]))
    assert (soft.metric, soft.score) == ("vqa_soft", pytest.approx(100 * (0.5 + 0.5 + 1) / 3))


def test_options_that_are_articles_still_compare() -> None:
    assert same_answer('"A",', "a") and same_answer("...", "...") and not same_answer("?", "!")
    assert same_answer("A.", "a") and not same_answer("", "A") and not same_answer("the", "A")


def test_document_frequencies_survive_their_file(tmp_path: Path) -> None:
    frequencies = DocumentFrequencies.of([["a cat", "a cat sat"], ["a dog"], ["the dog"]])
    assert frequencies.counts == {("a",): 2, ("dog",): 2}  # n-grams of one item weigh what unseen ones weigh
    frequencies.save(tmp_path / "frequencies.json")
    assert DocumentFrequencies.load(tmp_path / "frequencies.json") == frequencies
    assert frequencies.sha256() != DocumentFrequencies.of([["a cat"], ["a dog"], ["the dog"]] * 2).sha256()


def test_caption_score_is_bounded_and_needs_frequencies() -> None:
    train = [item("a red boat on a lake"), item("two dogs in snow"), item("a cat on a chair")]
    context = Context.of(train, [], {"c": "caption"})
    assert score("caption", "a red boat on a lake", train[0], context) == pytest.approx(100)
    assert score("caption", "", train[0], context) == 0
    with pytest.raises(ValueError, match="train file"):
        Scorer({"c": "caption"}).check(train)


@pytest.mark.parametrize(
    ("output", "target", "right"),
    [
        ("95", "100", True),
        ("105", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0", "0", True),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("5%", "5", True),
        ("5", "5%", True),
        ("0.05", "5%", False),
        ("1,000", "1000", True),
        ("1000", "1,020", True),
        ("$2.50", "2.5", True),
        ("7.", "7", True),
        ("seven", "7", False),
        ("", "0", False),
    ],
)
def test_relaxed_accuracy_traps(output: str, target: str, right: bool) -> None:
    assert score("relaxed", output, item(target)) == 100 * right


def test_relaxed_falls_back_to_anls_and_takes_the_best_reference() -> None:
    assert score("relaxed", "berlim", item("Berlin")) == pytest.approx(100 * 5 / 6)
    assert score("relaxed", "20", item("twenty", "20")) == 100


@pytest.mark.parametrize("metric", ["anls", "relaxed"])
def test_a_near_miss_among_choices_is_wrong(metric: str) -> None:
    assert score(metric, "South America", item("North America", choices=["North America", "South America"])) == 0
    assert score(metric, "South America", item("North America")) > 80


@pytest.mark.parametrize("text", ["12,34", "1.2.3", "5 cats", "-", "", "12/2018", "1e5"])
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("output", "answers", "choices", "right"),
    [
        ("Yes, it is.", ("yes",), (), True),
        ("No", ("yes",), (), False),
        ("Maybe yes", ("yes",), (), False),
        ("true", ("True",), (), True),
        ("left", ("left",), ("left", "right"), True),
        ("It is on the left.", ("left",), ("left", "right"), True),
        ("left or right", ("left",), ("left", "right"), False),
        ("A", ("left",), ("left", "right"), True),
        ("(B)", ("left",), ("left", "right"), False),
        ("A. left", ("A", "A. left", "left"), (), True),
        ("C) because", ("C",), (), True),
        ("A dog", ("A",), (), False),
        ("The cats", ("cat",), ("cat", "dog"), True),
        ("", ("A",), (), False),
        ("3", ("three",), (), True),
    ],
)
def test_closed_answers(output: str, answers: tuple[str, ...], choices: tuple[str, ...], right: bool) -> None:
    assert score("accuracy", output, item(*answers, choices=list(choices))) == 100 * right


def test_polarity_reads_the_first_word() -> None:
    assert [polarity(text) for text in ("Yes.", "no way", "True", "nothing", "")] == [True, False, True, None, None]


def test_phrases_match_as_words_longest_first() -> None:
    names = [phrase_key(name) for name in ("truck", "fire truck", "box", "cat")]
    assert find_phrases("A fire truck and two boxes, no caterpillar", names) == [("fire", "truck"), ("box",)]


def test_singular_and_plural_meet() -> None:
    pairs = "box boxes,bus buses,knife knives,man men,fireman firemen,woman women,person people,cookie cookies,cherry cherries,house houses"
    pairs += ",tomato tomatoes,shoe shoes,glass glasses,child children,horse horses,tie ties,octopus octopuses,bench benches,tree trees"
    for one, many in (pair.split() for pair in pairs.split(",")):
        assert singular(one) == singular(many), (one, many)
    assert len({singular(word) for word in "bus but busy man mane tie tile shoe show tree three".split()}) == 11


def test_beats_in_order_against_every_choice() -> None:
    """300 random stories: the longest chain found by trying every increasing choice of sentences."""
    rng = random.Random(0)
    words = ["red box", "dogs", "2 cats", "fire truck", "tree", "boats"]
    for _ in range(300):
        asked = [rng.sample(words, rng.randint(1, 2)) for _ in range(rng.randint(1, 4))]
        told = [rng.sample(words, rng.randint(0, 3)) for _ in range(rng.randint(0, 4))]
        known = {word for beat in asked for word in beat}

        def tells(sentence: list[str], beat: list[str], asked: list[list[str]] = asked, known: set[str] = known) -> bool:
            return set(beat) <= set(sentence) and set(sentence) & known <= {*beat, *asked[0]}

        text = " ".join(f"Then {' and '.join(sentence)}{rng.choice('.!?')}" for sentence in told)
        best = max(
            sum(tells(told[at], beat) for beat, at in zip(beats, places, strict=True))
            for size in range(min(len(asked), len(told)) + 1)
            for beats in combinations(asked, size)
            for places in combinations(range(len(told)), size)
        )
        scored = Scorer({"c": "beats"}).score(text, item("x", beats=asked))
        assert scored.score == pytest.approx(100 * best / len(asked))
        anywhere = sum(any(tells(sentence, beat) for sentence in told) for beat in asked)
        assert scored.scores["beats_recall"] == pytest.approx(100 * anywhere / len(asked))


def test_one_sentence_tells_one_beat_and_order_counts() -> None:
    sample = item("x", beats=[["fox", "forest"], ["sea", "boat"], ["sky", "tree"]])
    score = lambda text: Scorer({"c": "beats"}).score(text, sample).score  # noqa: E731
    assert score("A fox in the forest. Then a boat at the sea. At last trees in the sky.") == 100
    assert score("Trees in the sky. A boat at the sea. A fox in the forest.") == pytest.approx(100 / 3)
    everything = "A fox, the forest, a boat, the sea, the sky and a tree."
    assert score(everything) == score(f"{everything} {everything} {everything}") == 0, "to name everything tells nothing"
    assert score("The fox in the forest then came to the sea and saw a boat.") == pytest.approx(100 / 3)
    assert score("A fox. A forest. A sea. A boat.") == 0
    for wrong in (["fox"], "fox", [["fox"], 3]):
        with pytest.raises(ValueError, match="sample 's': beats has to be a list of beats"):
            Scorer({"c": "beats"}).check([item("x", beats=wrong)])
    with pytest.raises(ValueError, match="scores by the sample's beats"):
        Scorer({"c": "beats"}).check([item("x")])


def test_checklist_score_is_recall_times_what_is_there() -> None:
    samples = [
        item("There is a dog beside a tree.", objects=["dog"], checklist={"objects": ["dog"], "counts": ["one dog"]}),
        item("x", objects=["cat", "tree"]),
    ]
    score = lambda text: Scorer({"c": "checklist"}, context=Context.of([], samples, {"c": "checklist"})).score(text, samples[0]).score  # noqa: E731
    assert score("One dog.") == 100 and score("One dog and a tree") == 100, "what the reference names is there"
    assert score("A dog") == 50 and score("A dog and a cat") == 25 and score("A cat") == 0 and score("") == 0


def test_checklist_by_kind() -> None:
    checklist = {"objects": ["box", "dog"], "counts": ["2 boxes"], "relations": ["a dog beside a box", "the"], "attributes": []}
    found = checklist_recall("Two boxes; a cat beside the box", {"checklist": checklist})
    kinds = {"checklist_objects_recall": 50, "checklist_counts_recall": 100, "checklist_relations_recall": 0}
    assert found == {"checklist_recall": 50} | kinds
    for wrong in ("a dog", {"objects": "dog"}, [["dog"]], [3]):
        with pytest.raises(ValueError, match="sample 's': checklist has to be a list of phrases"):
            Scorer({"c": "description"}).check([item("x", checklist=wrong)])


def test_yes_of_people_is_what_most_of_them_say() -> None:
    scored = Scorer({"c": "vqa"}).score("yes", item("yes", human_answers=["no", "yes", "yes"]))
    assert scored.scores == {"said_yes": 100, "is_yes": 100}


def test_checklist_recall_and_chair() -> None:
    output = "Two red boxes stand beside a dog; a bird flies."
    assert checklist_recall(output, {"checklist": ["2 red box", "the dog", "cat", "red boxes"]}) == {"checklist_recall": 75}
    assert checklist_recall(output, {}) == {}
    universe = [phrase_key(name) for name in ("box", "dog", "bird", "cat")]
    figures = chair(output, {("box",), ("dog",)}, universe)
    assert figures == {"chair_s": 100, "objects_named": 3, "chair_i": pytest.approx(100 / 3)}
    assert chair("a dog, the dog, dogs and a cat", {("dog",)}, universe)["chair_i"] == 25  # mentions
    assert "chair_i" not in chair("nothing to see", set(), universe)


def test_description_reports_what_stands_beside() -> None:
    sample = item("a red box and a dog", objects=["box", "dog"], checklist=["red box", "dog"])
    context = Context.of([item("x", objects=["cat"]), item("x", category="d", objects=["a"])], [sample], {"c": "description"})
    scored = Scorer({"c": "description"}, context=context).score("a red box and a cat", sample)
    assert scored.metric == "rouge_l"
    assert scored.scores == {"words": 6, "checklist_recall": 50, "chair_s": 100, "objects_named": 2, "chair_i": 50}


def test_family_overrides_category_and_bad_names_are_refused() -> None:
    scorer = Scorer({"c": "relaxed"}, {("c", "year"): "accuracy"})
    assert scorer.score("2015", item("2016")).score == 100
    assert scorer.score("2015", item("2016", family="year")).score == 0
    with pytest.raises(ValueError, match="no metric 'nope'"):
        Scorer({"c": "nope"})
    with pytest.raises(ValueError, match="has no metric"):
        scorer.check([item("x", category="other")])
    with pytest.raises(ValueError, match="no reference"):
        scorer.check([item()])
