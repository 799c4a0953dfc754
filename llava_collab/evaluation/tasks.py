"""What systems of models are measured on: a set of labelled texts, or a suite of questions about pictures, as a `collab.recipe.Task`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from llava_collab.collab.recipe import CollabError, Task
from llava_collab.data.chance import unit_interval
from llava_collab.data.samples import Sample
from llava_collab.data.texts import TEXT_SETS, labelled_texts
from llava_collab.evaluation.evaluator import choose
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.suite import load_suite
from llava_collab.files import keyed
from llava_collab.types import Answer, Request, Turn

SHARES = {"validation": 0.1, "tuning": 0.1, "unlabelled": 0.15}
"""Shares of a text set's training texts that leaves are not fitted to: for thresholds, for gates, for a teacher to label."""


@dataclass(frozen=True)
class Suited:
    """What a suite's task was made of: its samples by request id ("train/...", "tuning/..." and so on), and their scorer."""

    samples: Mapping[str, Sample]
    scorer: Scorer

    def of(self, split: str) -> list[Sample]:
        """The samples of "train", "tuning", "validation" or "test"."""
        return [sample for name, sample in self.samples.items() if name.startswith(f"{split}/")]


def read_task(data: Mapping[str, Any], seed: int = 0, data_root: Path | None = None) -> tuple[Task, Suited | None]:
    """The task that a recipe's `data` names, and what it was made of where that is a suite:

        {texts: r52, shares: {unlabelled: 0.4}}    a set of `data.texts`, all of its labels as choices; `shares` in place of SHARES
        {suite: eval/suites/cmt-open.yaml, validation: decision, test: test, items_per_category: 100}

    A suite's `tuning` is a split of its own, or (left out) half of the validation split. Raises CollabError, and what readers raise.
    """
    data = keyed(
        data, "data", {"texts", "shares", "suite", "tuning", "validation", "test", "items_per_category", "categories"}, CollabError
    )
    if "texts" in data:
        return text_task(data["texts"], seed, keyed(data.get("shares") or SHARES, "data, shares", set(SHARES), CollabError)), None
    if "suite" in data:
        return suite_task(data, seed, data_root)
    raise CollabError("a recipe's data are {texts: NAME} or {suite: FILE, validation: SPLIT, test: SPLIT, tuning: SPLIT}")


def text_task(name: str, seed: int = 0, shares: Mapping[str, float] = SHARES) -> Task:
    """Classify the texts of a set. Its training texts are dealt out by a hash of seed and place: labelled, unlabelled, for validation."""
    if name not in TEXT_SETS:
        raise CollabError(f"no texts {name!r}; there are {', '.join(TEXT_SETS)}")
    train, test = labelled_texts(name, "train"), labelled_texts(name, "test")
    choices = tuple(sorted({label for _, label in train}))
    asked = {
        split: [(Request(f"{name}-{split}-{k}", (Turn("user", text),), choices=choices), label) for k, (text, label) in enumerate(pairs)]
        for split, pairs in (("train", train), ("test", test))
    }
    fit: list[tuple[Request, str]] = []
    parts: dict[str, list[Request]] = {name: [] for name in SHARES}
    shares = {name: shares.get(name, SHARES[name]) for name in SHARES}
    ends = list(accumulate(shares.values()))
    for request, label in asked["train"]:
        place = unit_interval(f"{seed}|{request.id}")
        part = next((name for name, end in zip(shares, ends, strict=True) if place < end), None)
        parts[part].append(request) if part else fit.append((request, label))
    right = {request.id: label for request, label in [*asked["train"], *asked["test"]]}
    tested = [request for request, _ in asked["test"]]
    quality = partial(_exact, right)
    unlabelled, tuning, validation = (parts[part] for part in ("unlabelled", "tuning", "validation"))
    return Task(f"{name}, seed {seed}", "score", fit, unlabelled, tuning, validation, tested, quality, right, seed)


def suite_task(data: Mapping[str, Any], seed: int, data_root: Path | None) -> tuple[Task, Suited]:
    """Answer the questions of a suite in free text, scored by its metrics."""
    suite = load_suite(Path(data["suite"]))
    splits = {name: suite.read(str(data.get(name, name)), data_root) for name in ("validation", "test")}
    if "tuning" in data:
        splits["tuning"] = suite.read(str(data["tuning"]), data_root)
    else:  # halves of one split, by a hash of the ids
        parts: dict[bool, list[Sample]] = {True: [], False: []}
        for sample in splits["validation"]:
            parts[unit_interval(f"tuning|{sample.id}") < 0.5].append(sample)
        splits |= {"tuning": parts[True], "validation": parts[False]}
    train = suite.read("train", data_root)
    scorer = suite.scorer(train, [sample for samples in splits.values() for sample in samples])
    asked, by_id = {}, {}
    for name, samples in splits.items():
        samples = [sample for sample in samples if not data.get("categories") or sample.category in data["categories"]]
        samples = [replace(sample, id=f"{name}/{sample.id}") for sample in choose(samples, data.get("items_per_category"), 0)]
        by_id |= {sample.id: sample for sample in samples}
        asked[name] = [sample.request(suite.max_new_tokens[sample.category]) for sample in samples]
    by_id |= {f"train/{sample.id}": sample for sample in train}
    quality = partial(_scored, scorer, by_id)
    told = "\n".join(f"{sample.id} {sample.family} {sample.turns} {sample.answers} {sample.meta}" for sample in by_id.values())
    learnt = hashlib.sha256(told.encode()).hexdigest()[:16]
    tuning, validation, test = (asked[split] for split in ("tuning", "validation", "test"))
    return Task(suite.name, "generate", [], [], tuning, validation, test, quality, seed=seed, learnt_from=learnt), Suited(by_id, scorer)


def _exact(right: Mapping[str, str], name: str, answer: Answer) -> float:
    return float(answer.text == right[name])


def _scored(scorer: Scorer, samples: Mapping[str, Sample], name: str, answer: Answer) -> float:
    return scorer.score(answer.text, samples[name]).score / 100.0
