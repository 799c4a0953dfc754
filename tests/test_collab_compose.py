"""What composites mean: who answers at which threshold, what a hint changes, and that a bill is the sum of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest

from llava_collab.collab.compose import Ensemble, Route, Shunt
from llava_collab.collab.gates import Confidence, Oracle, Random
from llava_collab.collab.hints import Hard, Soft, Transfer, strong_choices
from llava_collab.collab.single import chosen
from llava_collab.types import Answer, Model, Request, ScoringModel, Turn, Usage

CHOICES = ("red", "green", "blue")


@dataclass
class Known:
    """A model that gives fixed scores by request id, and keeps its traffic."""

    name: str
    scores: dict[str, tuple[float, ...]]
    price: float = 1.0
    fails: frozenset[str] = frozenset()
    seen: list[Request] = field(default_factory=list)
    given: list[Answer] = field(default_factory=list)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [replace(answer, scores=None) for answer in self.score(requests)]

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        self.seen += requests
        answers = [self._one(request) for request in requests]
        self.given += answers
        return answers

    def _one(self, request: Request) -> Answer:
        usage = Usage(1, 0, len(request.text), 1, 3.0, 0.25, self.price)
        if request.id in self.fails:
            return Answer("", usage, self.name, error="out of order")
        own = dict(zip(CHOICES, self.scores[request.id], strict=True))
        left = [own[choice] for choice in request.choices]
        return chosen(request, [value / sum(left) for value in left], usage, self.name)


def ask(name: str, choices: tuple[str, ...] = CHOICES) -> Request:
    return Request(name, (Turn("user", f"Which colour has {name}?"),), choices=choices)


REQUESTS = [ask(name) for name in ("a", "b", "c", "d")]
SURE = {"a": (0.9, 0.05, 0.05), "b": (0.4, 0.35, 0.25), "c": (0.1, 0.7, 0.2), "d": (0.2, 0.3, 0.5)}
LARGE = {"a": (0.8, 0.1, 0.1), "b": (0.1, 0.8, 0.1), "c": (0.2, 0.2, 0.6), "d": (0.3, 0.3, 0.4)}


def pair(**changes: object) -> tuple[Known, Known]:
    return Known("small", SURE), Known("large", LARGE, 10.0, **changes)  # type: ignore[arg-type]


def test_thresholds_of_all_small_and_all_large() -> None:
    small, large = pair()
    answers = Shunt(small, large, Confidence(), 0.0).score(REQUESTS)
    assert [answer.model for answer in answers] == ["small"] * 4 and not large.seen
    assert [answer.text for answer in answers] == [answer.text for answer in small.given]
    answers = Shunt(small, large, Confidence(), 1.01).score(REQUESTS)
    assert [answer.model for answer in answers] == ["large"] * 4
    assert [answer.scores for answer in answers] == [answer.scores for answer in Known("large", LARGE).score(REQUESTS)]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_a_bill_is_the_sum_of_what_its_parts_billed(verb: str) -> None:
    small, large = pair()
    middle, helper = Known("middle", LARGE, 4.0), Known("helper", SURE, 0.5)
    inner = Shunt(middle, large, Oracle({"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}), 0.5, hint=Transfer(helper))
    outer = Shunt(small, inner, Oracle({"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}), 0.5, hint=Soft())
    answers = getattr(outer, verb)(REQUESTS)
    billed = sum((answer.usage for answer in answers), Usage())
    traffic = sum((answer.usage for model in (small, middle, large, helper) for answer in model.given), Usage())
    assert (billed.calls, billed.price, billed.flops, billed.prompt_tokens) == (
        traffic.calls, traffic.price, traffic.flops, traffic.prompt_tokens)  # fmt: skip
    assert billed.seconds > traffic.seconds  # the gates' time is on it
    assert [len(model.given) for model in (small, middle, large, helper)] == [4, 3, 2, 2]
    for answer in answers:
        assert answer.usage == sum((part.usage for part in answer.parts), Usage())
        assert answer.by[0] == "small" and answer.by[-1] == answer.model
    assert sum(answer.by.count("helper") for answer in answers) == len(helper.given)


def test_soft_hints_only_add_text_and_hard_ones_only_take_choices() -> None:
    small, large = pair()
    Shunt(small, large, Confidence(), 0.95, hint=Soft(top=2)).score(REQUESTS)
    assert large.seen[1].text == "Which colour has b?\nA small model suggests: red (0.40), green (0.35)."
    assert [replace(request, turns=()) for request in large.seen] == [replace(request, turns=()) for request in REQUESTS]
    small, large = pair()
    answers = Shunt(small, large, Confidence(), 0.95, hint=Hard(frozenset({"green"}))).score(REQUESTS)
    assert [request.turns for request in large.seen] == [request.turns for request in REQUESTS]
    assert all(request.choices == ("red", "blue") for request in large.seen)
    for answer, request in zip(answers, REQUESTS, strict=True):
        assert answer.scores is not None and answer.scores[1] == 0.0 and sum(answer.scores) == pytest.approx(1.0)
        assert answer.text == request.choices[max(range(3), key=answer.scores.__getitem__)]


def test_a_hard_hint_leaves_choices_to_choose_from() -> None:
    assert Hard(frozenset(CHOICES)).apply(ask("a")).choices == CHOICES
    assert Hard(frozenset(CHOICES[:2])).apply(ask("a")).choices == CHOICES


def test_strong_choices_are_those_answered_surely_and_rightly() -> None:
    import numpy as np

    scores = np.array([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.9, 0.0], [0.5, 0.45, 0.05]])
    assert strong_choices(scores, [0, 0, 1, 1], CHOICES, 0.75) == {"red"}  # green: one of two is unsure; blue: never seen
    assert strong_choices(scores, [0, 0, 1, 1], CHOICES, 0.85) == set()


def test_routes_ask_one_model_and_take_no_gate_that_reads_a_draft() -> None:
    small, large = pair()
    answers = Route(small, large, Random(0), 0.5).score(REQUESTS)
    assert len(small.seen) + len(large.seen) == 4 and small.seen and large.seen
    assert all(len(answer.by) == 1 for answer in answers)
    with pytest.raises(ValueError, match="reads a draft"):
        Route(small, large, Confidence(), 0.5)


def test_the_oracle_is_at_least_as_good_as_every_gate_at_every_share() -> None:
    truth = {"a": "red", "b": "green", "c": "green", "d": "blue"}
    small, large = pair()

    def right(answers: list[Answer]) -> dict[str, float]:
        return {request.id: float(answer.text == truth[request.id]) for request, answer in zip(REQUESTS, answers, strict=True)}

    alone, with_large = right(small.score(REQUESTS)), right(large.score(REQUESTS))
    gains = {name: alone[name] - with_large[name] for name in truth}
    for gate in (Random(0), Random(1), Random(2)):
        confidences = gate(REQUESTS, [])
        for calls in range(5):
            order = sorted(confidences)
            threshold = (order + [2.0])[calls]
            best = sorted(gains.values())
            bound = (best + [2.0])[calls]
            found = sum(right(Route(small, large, gate, threshold).score(REQUESTS)).values())
            limit = sum(right(Route(small, large, Oracle(gains), bound).score(REQUESTS)).values())
            assert limit >= found
    with pytest.raises(ValueError, match="was not told of 'z'"):
        Oracle(gains)([ask("z")], [])


def test_failures_reach_the_small_model_only_where_the_composite_says_so() -> None:
    for degrade in (False, True):
        small, large = pair(fails=frozenset({"b"}))
        for composite in (
            Shunt(small, large, Confidence(), 0.95, degrade=degrade),
            Route(small, large, Oracle(dict.fromkeys("abcd", 0.0)), 0.5, degrade=degrade),
        ):
            answers = composite.score(REQUESTS)
            assert [answer.error for answer in answers] == [None, None if degrade else "out of order", None, None]
            assert answers[1].by == (("small", "large") if degrade or isinstance(composite, Shunt) else ("large",))
            if degrade:
                assert answers[1].model == "small" and answers[1].note == "large failed (out of order); small answered"
    small, large = Known("small", SURE, fails=frozenset({"a"})), Known("large", LARGE)
    answers = Shunt(small, large, Confidence(), 0.0).score(REQUESTS)
    assert [answer.model for answer in answers] == ["large", "small", "small", "small"]


def test_gates_need_the_probabilities_that_they_read() -> None:
    small, large = pair()
    with pytest.raises(ValueError, match="reads probabilities, and small gave none"):
        Shunt(small, large, Confidence(), 0.5).generate(REQUESTS)
    with pytest.raises(ValueError, match="margin"):
        Confidence("margin")(REQUESTS[:1], [Answer("red", model="small", likelihood=0.8)])
    assert Confidence()(REQUESTS[:1], [Answer("red", model="small", likelihood=0.8)]) == [0.8]


def test_an_ensemble_averages_scores_and_votes_on_texts() -> None:
    small, large = pair(fails=frozenset({"d"}))
    both = Ensemble((small, large))
    answers = both.score(REQUESTS)
    assert answers[0].scores == pytest.approx((0.85, 0.075, 0.075))
    assert answers[3].scores == SURE["d"] and answers[3].by == ("small", "large")
    assert [answer.text for answer in Ensemble((small, large, Known("third", LARGE))).generate(REQUESTS)] == [
        "red",
        "green",
        "blue",
        "blue",
    ]


def test_concurrent_requests_get_the_answers_of_sequential_ones() -> None:
    small, large = pair()
    composite = Shunt(small, Shunt(Known("middle", LARGE), large, Confidence("margin"), 0.5), Confidence("entropy"), 0.3, hint=Soft())
    requests = [replace(ask(name), turns=(Turn("user", f"{name}?"),)) for name in "abcdabcdabcdabcdabcdabcdabcdabcd"]
    alone = [composite.score([request])[0] for request in requests]
    with ThreadPoolExecutor(32) as pool:
        together = [answers[0] for answers in pool.map(lambda request: composite.score([request]), requests)]
    assert [(a.text, a.scores, a.by) for a in together] == [(a.text, a.scores, a.by) for a in alone]


def test_composites_are_models() -> None:
    small, large = pair()
    for composite in (Shunt(small, large, Confidence(), 0.5, "s"), Route(small, large, Random(), 0.5, "r"), Ensemble((small, large))):
        assert isinstance(composite, Model) and isinstance(composite, ScoringModel)
    assert Shunt(small, large, Confidence(), 0.5).score([]) == []


def test_a_prior_weighs_the_choices_of_the_large_model() -> None:
    small, large = pair()
    answers = Shunt(small, large, Confidence(), 0.95, prior=0.5).score(REQUESTS)
    for answer, request in zip(answers, REQUESTS, strict=True):
        products = [b * a**0.5 for a, b in zip(SURE[request.id], LARGE[request.id], strict=True)]
        assert answer.scores == pytest.approx([p / sum(products) for p in products])
    off = Shunt(small, large, Confidence(), 0.95, prior=0.0).score(REQUESTS)
    assert [answer.scores for answer in off] == [LARGE[request.id] for request in REQUESTS]


def test_transferred_results_are_of_the_same_pictures_and_guesses_are_not_told() -> None:
    class Reader(Known):
        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            self.seen += requests
            return [Answer("42", Usage(1), self.name, likelihood=float(request.id == "a")) for request in requests]

    reader = Reader("reader", SURE)
    asked = [replace(REQUESTS[k], turns=(Turn("user", "<image>\nWhich colour?"),), images=("x.png",)) for k in (0, 1)]
    told, helpers = Transfer(reader, "What is written there?")(asked, [])
    assert [request.text for request in reader.seen] == ["<image>\nWhat is written there?"] * 2 and len(helpers) == 2
    assert told[0].text == "<image>\nWhich colour?\nKnown from a small model: 42." and told[1] == asked[1]
