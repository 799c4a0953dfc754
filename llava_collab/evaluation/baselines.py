"""Baselines without a network: guessing from the training answers, reading by OCR and rules, and rules that know what was drawn.

A request carries no family, so each baseline is told which questions it will be asked; `Majority` and `Blind` never see their answers
or pictures. An oracle below 95 means a faulty family; a blind guesser far above chance means one that needs no picture.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_collab.cmt.oracle import solve
from llava_collab.data.conversation import IMAGE_MARK
from llava_collab.evaluation.metrics import Scorer, references
from llava_collab.evaluation.reading import Reader, read_lines, reads
from llava_collab.evaluation.text import words_of
from llava_collab.types import Answer, Request, Usage

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample

Guess = Callable[["Sample"], str]


class Read(str):
    """An answer that was read off or computed: a gate may trust it as far as it is `sure` (`Answer.likelihood`; a guess has 0)."""

    sure: float = 1.0


TRIED, CONSTANTS = 200, 20


@dataclass
class Baseline:
    """A `Model` that answers each sample it was told of by a function of the sample. `answer` raises ValueError where it can't; `flops` is
    what looking at its picture takes (an OCR engine runs outside of torch, where nobody counts)."""

    name: str
    asked: Mapping[str, Sample]
    answer: Guess
    flops: Callable[[Sample], float] = lambda sample: 0.0

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Answer:
        if request.id not in self.asked:
            return Answer("", model=self.name, error=f"{self.name}: {request.id!r} is not among the questions it was told of")
        start = time.perf_counter()
        try:
            text = self.answer(self.asked[request.id])
        except ValueError as error:
            return Answer("", model=self.name, error=f"{self.name}: {error}")
        flops = self.flops(self.asked[request.id])
        usage = Usage(1, len(request.images), flops=flops, seconds=time.perf_counter() - start)
        return Answer(str(text), usage, self.name, likelihood=text.sure if isinstance(text, Read) else 0.0)


def majority(train: Iterable[Sample], asked: Iterable[Sample], scorer: Scorer, name: str = "majority") -> Baseline:
    """The most frequent training answer of the question's family, or of its category where the family is new."""
    return Baseline(name, _by_id(asked), partial(_most_frequent, _counts(train)))


def blind(train: Sequence[Sample], asked: Iterable[Sample], scorer: Scorer, name: str = "blind guesser") -> Baseline:
    """The best of several guessers that see the question's text alone, chosen family by family, by the scores that they are out for.

    They are: the most frequent answer of the family; that of the same prompt; naive Bayes over the prompt's words; the first and the
    last of the options; among the options, the one that is right most often; and the constant text that scores best, an answer, one
    sentence of answers, or the few most frequent sentences in a row. Which one a family gets is decided by fitting on one half of its
    training items and trying on the other (at most TRIED of each).
    """
    families: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in train:
        families[sample.category, sample.family].append(sample)
    counts = _counts(train)
    guessers: dict[tuple[str, str], Guess] = {}
    for key, samples in families.items():
        mixed = random.Random(0).sample(samples, len(samples))  # noqa: S311 - items may come in a pattern
        fitted, tried = mixed[::2], mixed[1::2] or mixed
        found = _guessers(fitted, scorer)
        scores = {kind: sum(scorer.score(guess(sample), sample).score for sample in tried[:TRIED]) for kind, guess in found.items()}
        guessers[key] = _guessers(samples, scorer)[max(scores, key=lambda kind: scores[kind])]
    fallback = partial(_most_frequent, counts)
    return Baseline(name, _by_id(asked), lambda sample: guessers.get((sample.category, sample.family), fallback)(sample))


def oracle(train: Sequence[Sample], asked: Iterable[Sample], scorer: Scorer, name: str = "oracle") -> Baseline:
    """`cmt.oracle` on the truth that CMT-open's items carry."""

    def answer(sample: Sample) -> str:
        if "truth" not in sample.meta:
            raise ValueError(f"{sample.id} carries no truth: the oracle answers CMT-open, second edition, only")
        return Read(solve(sample.family, sample.meta["slots"], sample.meta["truth"]))

    return Baseline(name, _by_id(asked), answer)


def ocr_rules(train: Sequence[Sample], asked: Iterable[Sample], scorer: Scorer, name: str = "OCR + rules") -> Baseline:
    """`cmt.oracle`'s rules on what an OCR engine reads of the first picture; the blind guess where that says nothing."""
    told = _by_id(asked)
    guess = blind(train, told.values(), scorer).answer
    reader = Reader(train)

    def answer(sample: Sample) -> str:
        if not reads(sample.family) or not sample.images:
            return guess(sample)
        try:
            return Read(solve(sample.family, sample.meta["slots"], [reader.truth(sample.family, read_lines(sample.images[0]))]))
        except ValueError:
            return guess(sample)

    return Baseline(name, told, answer)


def detector_rules(train: Sequence[Sample], asked: Iterable[Sample], scorer: Scorer, name: str = "detector + rules") -> Baseline:
    """`cmt.oracle`'s rules on the things that a detector sees in the first picture; the blind guess where that says nothing."""
    from llava_collab.evaluation.detector import Detector, Quarters, sees

    told = _by_id(asked)
    guess = blind(train, told.values(), scorer).answer
    seeing = Quarters()
    detector = Detector(train, seeing)

    def looks(sample: Sample) -> bool:
        return sees(sample.family) and bool(sample.images)

    def answer(sample: Sample) -> str:
        if not looks(sample):
            return guess(sample)
        truth, sure = detector.truth(Path(sample.images[0]))
        try:
            seen = Read(solve(sample.family, sample.meta["slots"], [truth]))
        except ValueError:
            return guess(sample)
        seen.sure = sure
        return seen

    return Baseline(name, told, answer, lambda sample: seeing.flops if looks(sample) else 0.0)


def _by_id(asked: Iterable[Sample]) -> dict[str, Sample]:
    return {sample.id: sample for sample in asked}


Counts = Mapping[tuple[str, ...], Counter[str]]


def _counts(train: Iterable[Sample]) -> Counts:
    """How often each first reference occurs, by (category, family) and by category. Raises ValueError without training samples."""
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sample in train:
        for answer in references(sample)[:1]:
            counts[sample.category, sample.family][answer] += 1
            counts[sample.category,][answer] += 1
    if not counts:
        raise ValueError("this baseline needs training samples; name a train file in the suite")
    return counts


def _most_frequent(counts: Counts, sample: Sample) -> str:
    counter = counts.get((sample.category, sample.family)) or counts.get((sample.category,))
    if not counter:
        raise ValueError(f"no training answer of category {sample.category!r}")
    return _top(counter)


def _top(counter: Mapping[str, float]) -> str:
    """Ties go to the alphabetically first answer, so that a baseline is a constant of the data."""
    return min(counter, key=lambda answer: (-counter[answer], answer))


def _prompt(sample: Sample) -> str:
    return " ".join(turn.text for turn in sample.request().turns).replace(IMAGE_MARK, "").strip()


def _options(sample: Sample) -> list[str]:
    """The options that the prompt names, in its order: those of a chart can only be seen."""
    prompt = _prompt(sample).lower()
    options = [str(choice) for choice in sample.meta.get("choices") or () if str(choice).lower() in prompt]
    return sorted(options, key=lambda option: prompt.find(option.lower()))


def _constant(train: Sequence[Sample], scorer: Scorer) -> str:
    """The text that scores best on the training items, whatever is asked."""
    texts = Counter(references(sample)[0] for sample in train)
    sentences = Counter(part for sample in train for part in re.split(r"(?<=[.!?])\s+", references(sample)[0]))
    common = [sentence for sentence, _ in sentences.most_common(CONSTANTS)]
    candidates = [text for text, _ in texts.most_common(CONSTANTS)] + common + [" ".join(common[:n]) for n in range(2, 6)]
    return max(dict.fromkeys(candidates), key=lambda text: sum(scorer.score(text, sample).score for sample in train[:TRIED]))


def _guessers(train: Sequence[Sample], scorer: Scorer) -> dict[str, Guess]:
    """Guessers fitted to the samples of one family."""
    answers = Counter(references(sample)[0] for sample in train)
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    shown: Counter[str] = Counter()
    for sample in train:
        by_prompt[_prompt(sample)][references(sample)[0]] += 1
        shown.update(_options(sample))
    common = _top(answers)
    guessers: dict[str, Guess] = {
        "family": lambda sample: common,
        "prompt": lambda sample: _top(by_prompt[_prompt(sample)]) if by_prompt[_prompt(sample)] else common,
        "words": _naive_bayes(train),
    }
    if scorer.metric(train[0]) not in ("vqa", "accuracy", "anls", "relaxed"):  # where a text may be partly right
        best = _constant(train, scorer)
        guessers["constant"] = lambda sample: best
    if all(_options(sample) for sample in train):  # a prompt without options gets the common answer
        rates = {option: answers[option] / shown[option] for option in shown}
        guessers["first option"] = lambda sample: (_options(sample) or [common])[0]
        guessers["last option"] = lambda sample: (_options(sample) or [common])[-1]
        guessers["usual option"] = lambda sample: max(_options(sample) or [common], key=lambda option: rates.get(option, 0.0))
    return guessers


def _naive_bayes(train: Sequence[Sample]) -> Guess:
    """Multinomial naive Bayes over the words of the prompt, add-one smoothing."""
    answers = sorted({references(sample)[0] for sample in train})
    prompts = [words_of(_prompt(sample)) for sample in train]
    vocabulary = {word: i for i, word in enumerate(sorted({word for words in prompts for word in words}))}
    counts_AW = np.ones((len(answers), len(vocabulary)))
    prior_A = np.zeros(len(answers))
    index = {answer: i for i, answer in enumerate(answers)}
    for sample, words in zip(train, prompts, strict=True):
        row = index[references(sample)[0]]
        prior_A[row] += 1
        for word in words:
            counts_AW[row, vocabulary[word]] += 1
    weights_AW = np.log(counts_AW / counts_AW.sum(1, keepdims=True))

    def guess(sample: Sample) -> str:
        known = [vocabulary[word] for word in words_of(_prompt(sample)) if word in vocabulary]
        return answers[int(np.argmax(np.log(prior_A) + weights_AW[:, known].sum(1)))]

    return guess


BASELINES: Mapping[str, Callable[[Sequence[Sample], Iterable[Sample], Scorer, str], Baseline]] = {
    "majority": majority,
    "blind": blind,
    "ocr": ocr_rules,
    "detector": detector_rules,
    "oracle": oracle,
}
