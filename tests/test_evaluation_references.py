"""Metrics against their reference implementations, on the cases that record_metric_cases.py recorded.

Where a metric and its reference disagree, the case has to be of a named class, and each class has as many cases as are stated here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llava_collab.data.samples import Sample
from llava_collab.evaluation import report
from llava_collab.evaluation.captions import DocumentFrequencies, cider_d, meteor
from llava_collab.evaluation.metrics import (
    Context,
    Scored,
    Scorer,
    anls,
    chair,
    rouge_l,
    same_answer,
    soft_accuracy,
)
from llava_collab.evaluation.text import caption_tokens, find_phrases, normalise_answer, parse_number, phrase_key
from llava_collab.types import Turn

HERE = Path(__file__).parent
VQA, ANLS, RELAXED, YES_NO, CHAIR, CAPTIONS = (
    json.loads((HERE / f"evaluation_{name}_cases.json").read_text(encoding="utf-8"))
    for name in ("vqa", "anls", "relaxed", "yes_no", "chair", "caption")
)
ITEMS = CAPTIONS["items"]
PLAIN, METEOR_OF_PLAIN = CAPTIONS["meteor_of_plain"]
Classes = dict[str, Callable[..., object]]


def score(metric: str, output: str, reference: str) -> Scored:
    return Scorer({"c": metric}).score(output, sample(reference))


def sample(*answers: str) -> Sample:
    return Sample("s", (), (Turn("user", "?"),), "c", "", answers)


def disagreements(rows: Iterable[tuple[Any, Any, tuple[Any, ...]]], classes: Classes) -> dict[str, int]:
    """Over rows of ours, theirs and the case: how many disagree, by the first class that holds. At least 200 have to agree.

    A class sees theirs and the case, and holds where it explains theirs.
    """
    rows = list(rows)
    apart = [(theirs, *case) for ours, theirs, case in rows if ours != pytest.approx(theirs, abs=1e-6)]
    assert len(rows) - len(apart) >= 200
    names = [next((name for name, holds in classes.items() if holds(*case)), f"unexplained: {case}") for case in apart]
    return dict(Counter(names))


def test_normaliser_agrees_with_the_official_one() -> None:
    classes: Classes = {
        "a typographic apostrophe is one here": lambda theirs, text: normalise_answer(text) == theirs.replace("’", "'"),
        "they remove 32 full stops at most": lambda theirs, text: theirs.count(".") == text.count(".") - 32,
        "they take the apostrophe from somebody'd": lambda theirs, text: (
            normalise_answer(text) == theirs.replace("somebodyd", "somebody'd")
        ),
    }
    found = disagreements([(normalise_answer(text), theirs, (text,)) for text, theirs in VQA["normalised"]], classes)
    assert found == dict(zip(classes, (2, 1, 10), strict=True))


def test_exact_match_agrees_with_the_official_normaliser() -> None:
    classes: Classes = {"articles alone are all alike there": lambda theirs, a, b: theirs and not normalise_answer(a) + normalise_answer(b)}
    found = disagreements([(same_answer(a, b), theirs, (a, b)) for a, b, theirs in VQA["same"]], classes)
    assert found == dict(zip(classes, (1,), strict=True))


def test_soft_accuracy_agrees_with_the_official_evaluation() -> None:
    def as_written(theirs: float, output: str, people: list[str]) -> bool:
        return len(set(people)) == 1 and theirs == 100 * (output == people[0])

    def of_three(theirs: float, output: str, people: list[str]) -> bool:
        return len(people) < 4 and theirs == pytest.approx(100 * soft_accuracy(output, people) * (len(people) - 1) / 3, abs=1e-5)

    def of_nothing(theirs: float, output: str, people: list[str]) -> bool:
        alike = ["x" if not normalise_answer(text) else "y" for text in people]
        return not normalise_answer(output) and theirs == pytest.approx(100 * soft_accuracy("x", alike), abs=1e-5)

    classes: Classes = {
        "answers that are all alike are compared as written there": as_written,
        "three matches are needed there even of two annotators": of_three,
        "articles alone are all alike there": of_nothing,
    }
    cases = [(output, [text for text, n in people.items() for _ in range(n)], theirs) for output, people, theirs in VQA["soft"]]
    found = disagreements([(100 * soft_accuracy(output, people), theirs, (output, people)) for output, people, theirs in cases], classes)
    assert found == dict(zip(classes, (17, 6, 3), strict=True))


def test_anls_agrees_with_anls_star() -> None:
    assert disagreements([(anls(output, options), theirs, (output,)) for output, options, theirs in ANLS["cases"]], {}) == {}


def test_relaxed_accuracy_agrees_with_lmms_eval() -> None:
    def text(theirs: float, output: str, target: str) -> bool:
        return theirs == 100 * (output.lower() == target.lower())

    def by_100(theirs: float, output: str, target: str) -> bool:
        value, wanted = (float(one.strip(" %")) / (100 if "%" in one else 1) for one in (output, target))
        return theirs == 100 * (abs(value - wanted) <= 0.05 * abs(wanted))

    def bound(theirs: float, output: str, target: str) -> bool:
        value, wanted = parse_number(output) or 0, parse_number(target) or 0
        return theirs == 0 and abs(value - wanted) == pytest.approx(0.05 * abs(wanted), rel=1e-9)

    classes: Classes = {
        "nan, inf, 1e3 and 1_000 are numbers there": lambda theirs, *pair: re.search(r"nan|inf|\de[+-]|\d_\d", " ".join(pair).lower()),
        "a target of 0 is compared as text there": lambda theirs, a, b: parse_number(b) == 0 and text(theirs, a, b),
        "currency, thousands and a full stop make text there": lambda theirs, *pair: (
            any(re.search(r"[$,−]|\..*\.$", one) for one in pair) and text(theirs, *pair)
        ),
        "a per cent sign divides by 100 there": lambda theirs, *pair: ("%" in pair[0]) != ("%" in pair[1]) and by_100(theirs, *pair),
        "other text has to be equal there": lambda theirs, a, b: parse_number(b) is None and text(theirs, a, b),
        "rounding puts the bound outside there": bound,
    }
    cases = [(score("relaxed", output, target).score, 100 * right, (output, target)) for output, target, right in RELAXED["cases"]]
    assert disagreements(cases, classes) == dict(zip(classes, (19, 23, 48, 21, 3, 39), strict=True))


def test_balanced_accuracy_agrees_with_scikit_learn() -> None:
    said = {
        "y": ["yes", "Yes.", "True", "YES, it is", "yes!"],
        "n": ["no", "No way.", "false", "NO"],
        "?": ["maybe", "", "not yes", "2", "…"],
    }
    rows = []
    for truths, outputs, accuracy, balanced, yes_rate in YES_NO["cases"]:
        answers = [said[output][i % len(said[output])] for i, output in enumerate(outputs)]
        scored = [score("accuracy", text, "yes" if truth == "y" else "no") for text, truth in zip(answers, truths, strict=True)]
        figures = report.yes_no([{"score": one.score, "scores": one.scores} for one in scored])
        both = len(set(truths)) == 2
        assert ("balanced_accuracy" in figures) is both  # of one kind of question alone it would be plain accuracy, which they print
        ours = figures["yes_no_accuracy"], figures.get("balanced_accuracy", 100 * balanced), figures["yes_rate"]
        rows.append((ours, (100 * accuracy, 100 * balanced, 100 * yes_rate), ()))
    assert disagreements(rows, {}) == {}


def test_chair_agrees_with_its_authors() -> None:
    names = {phrase_key(name): name for name in CHAIR["objects"]}
    classes: Classes = {
        "a train track is no train there": lambda theirs, text, more: "train track" in text and more["train"] == 1,
        "a mark does not part a name here": lambda theirs, text, more: "hot, dog" in text and more["hot dog"] == 1,
        "the singular of bus is bu there": lambda theirs, text, more: more == Counter({"bus": len(re.findall(r"\bbus\b", text))}),
    }
    rows = []
    for text, present, named, chair_s, chair_i in CHAIR["cases"]:
        figures, found = chair(text, {phrase_key(name) for name in present}, list(names)), find_phrases(text, list(names))
        assert ("chair_i" in figures) is bool(found)  # where nothing is named they have 0
        ours = [names[key] for key in found] == named, figures["chair_s"], figures.get("chair_i", 0)
        rows.append((ours, (True, 100 * chair_s, 100 * chair_i), (text, Counter(names[key] for key in found) - Counter(named))))
    assert disagreements(rows, classes) == dict(zip(classes, (13, 16, 3), strict=True))


MARKS: Classes = {
    "brackets are -lrb- and -rrb- there": lambda theirs, *texts: any(re.search(r"[()[\]{}]", text) for text in texts),
    "runs of ! and ? stay there": lambda theirs, *texts: any(re.search(r"[!?]{2}", text) for text in texts),
}


def test_caption_tokens_agree_with_ptb_tokenizer() -> None:
    def without(kept: str) -> Callable[..., bool]:
        return lambda theirs, text: caption_tokens(text) == [token for token in theirs.split(" ") if not re.fullmatch(kept, token)]

    classes: Classes = dict(zip(MARKS, (without(r"\W*-[lr][rsc]b-"), without("[!?]+")), strict=True))
    classes |= {
        "signs of money and fractions are rewritten there": lambda theirs, text: re.search("[£€½]", text),
        "slang is known there": lambda theirs, text: re.search(r"'n'|'tis|y'all|c'mon|'90s", text),
        "more abbreviations are known there": lambda theirs, text: re.search(r"\b(No|Jan)\.", text),
        "addresses and tags stay whole there": lambda theirs, text: re.search(r"@x|<b>", text),
        "some signs stay on their word there": lambda theirs, text: re.search(r"c#|AT&T|2\+2", text),
        "two telephone numbers are one token there": lambda theirs, text: "555-1234" in text,
        "a full stop amid letters stays there": lambda theirs, text: re.search(r"d\.S", text),
    }
    found = disagreements([(" ".join(caption_tokens(text)), theirs, (text,)) for text, theirs in CAPTIONS["tokens"]], classes)
    assert found == dict(zip(classes, (12, 14, 2, 5, 2, 2, 3, 1, 1), strict=True))


def test_cider_d_agrees_with_pycocoevalcap() -> None:
    frequencies = DocumentFrequencies.of([[candidate] for candidate, *_ in ITEMS])
    rows = [(cider_d(output, texts, frequencies), theirs, (output, *texts)) for output, texts, theirs, *_ in ITEMS]
    assert disagreements(rows, MARKS) == dict(zip(MARKS, (5, 7), strict=True))


def test_rouge_l_agrees_with_rouge_score() -> None:
    classes: Classes = {
        "letters beyond ASCII vanish there": lambda theirs, *texts: any(re.search(r"[^\W\d_]", re.sub("[a-zA-Z]", "", t)) for t in texts)
    }
    rows = [(rouge_l(output, texts), 100 * theirs, (output, *texts)) for output, texts, _, _, theirs, _ in ITEMS]
    assert disagreements(rows, classes) == dict(zip(classes, (5,), strict=True))
    assert rouge_l("猫が 座る", ["猫が 座る"]) == 100


def test_rouge_l_of_coco_is_another_number_of_the_same_matches() -> None:
    """COCO takes the best precision and the best recall, be they of two references, and weighs recall by beta = 1.2."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, apart = RougeScorer(["rougeL"]), 0
    for output, texts, _, _, rouge_score, coco in ITEMS[:PLAIN]:
        parts = [scorer.score(text, output)["rougeL"] for text in texts]
        precision, recalled = max(part.precision for part in parts), max(part.recall for part in parts)
        assert coco == pytest.approx(2.44 * precision * recalled / (recalled + 1.44 * precision), abs=1e-6)
        apart += abs(coco - rouge_score) > 1e-3
    assert apart > 150


def test_corpus_bleu_agrees_with_pycocoevalcap() -> None:
    rows = []
    for start, theirs in enumerate(CAPTIONS["bleu"]):
        window = [ITEMS[(start + step) % len(ITEMS)] for step in range(4)]
        ours = report.corpus_bleu([{"output": output, "references": texts} for output, texts, *_ in window])
        rows.append((ours, 100 * theirs, tuple(text for output, texts, *_ in window for text in (output, *texts))))
    classes: Classes = {
        "marks and clitics are tokens of another kind in sacrebleu": lambda theirs, *texts: any(re.search(r"[^\w ]", t) for t in texts)
    }
    assert disagreements(rows, classes) == dict(zip(classes, (63,), strict=True))


@pytest.mark.slow
def test_records_are_what_the_libraries_say_today() -> None:
    from anls_star import anls_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu

    for output, options, recorded in ANLS["cases"]:
        assert anls_score(gt=tuple(options), pred=output) == pytest.approx(recorded, abs=1e-6)
    context = Context(DocumentFrequencies.of([["a dog"], ["two cats"]]))
    for output, texts, _, _, recorded, _ in ITEMS:
        assert RougeScorer(["rougeL"]).score_multi(texts, output)["rougeL"].fmeasure == pytest.approx(recorded, abs=1e-6)
        beside = Scorer({"c": "caption"}, context=context).score(output, sample(*texts)).scores
        assert beside["bleu4_sentence"] == sentence_bleu(output.lower(), [text.lower() for text in texts]).score


@pytest.mark.slow
def test_meteor_agrees_with_pycocoevalcap() -> None:
    scored = meteor([output for output, *_ in ITEMS], [texts for _, texts, *_ in ITEMS])
    if scored is None:
        pytest.skip("METEOR needs Java and pycocoevalcap")
    rows = [(ours, 100 * row[3], (row[0], *row[1])) for ours, row in zip(scored[1], ITEMS, strict=True)]
    assert disagreements(rows, MARKS) == dict(zip(MARKS, (4, 7), strict=True))
    plain = meteor([output for output, *_ in ITEMS[:PLAIN]], [texts for _, texts, *_ in ITEMS[:PLAIN]])
    assert plain is not None and plain[0] == pytest.approx(100 * METEOR_OF_PLAIN, abs=1e-6)
