"""Metrics: an output and its sample in, a score of 0 to 100 out, with further figures beside it.

`METRICS` names each with its version and its source, and `describe()` prints them. tests/test_evaluation_references.py holds every one
against its reference implementation on recorded cases, and names where and why they differ.

Several references: the best one counts (except CIDEr-D, which averages, and soft accuracy, which counts annotators).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from string import punctuation, whitespace
from typing import TYPE_CHECKING, Any

from llava_collab.evaluation.captions import DocumentFrequencies, cider_d
from llava_collab.evaluation.text import caption_tokens, find_phrases, normalise_answer, parse_number, phrase_key, polarity

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


FALSE = "false"
"""Kind of a checklist that holds what must not be said."""


@dataclass(frozen=True)
class Scored:
    """`score` 0..100; `metric` is what was computed; `scores` are further figures (0..100, lengths in words)."""

    score: float
    metric: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What metrics know beyond the item: n-gram frequencies of the training captions, every object name and every beat of the data set."""

    frequencies: DocumentFrequencies | None = None
    objects: tuple[tuple[str, ...], ...] = ()
    beats: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, train: Sequence[Sample], samples: Sequence[Sample], categories: Mapping[str, str]) -> Context:
        """Frequencies from the training samples of categories with metric `caption` (None without any); objects from training and
        evaluation samples of those with `description` or `checklist` (elsewhere `objects` may be labels of a chart).
        """
        captions = [references(sample) for sample in train if categories.get(sample.category) == "caption"]
        described = [sample for sample in (*train, *samples) if categories.get(sample.category) in ("description", "checklist")]
        objects = {key for sample in described for key in _object_keys(sample.meta)}
        told = [sample for sample in (*train, *samples) if categories.get(sample.category) == "beats"]
        beats = {phrase for sample in told for beat in _beats(sample.meta) for phrase in beat}
        return cls(DocumentFrequencies.of(captions) if captions else None, tuple(sorted(objects)), tuple(sorted(beats)))


@dataclass(frozen=True)
class Scorer:
    """Which metric scores which sample: by category, with exceptions `(category, family)`."""

    categories: Mapping[str, str]
    families: Mapping[tuple[str, str], str] = field(default_factory=dict)
    context: Context = field(default_factory=Context)

    def __post_init__(self) -> None:
        for name in {*self.categories.values(), *self.families.values()}:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}")

    def metric(self, sample: Sample) -> str:
        """Name of the sample's metric. Raises ValueError for a category without one."""
        name = self.families.get((sample.category, sample.family)) or self.categories.get(sample.category)
        if name is None:
            raise ValueError(
                f"sample {sample.id!r}: category {sample.category!r} has no metric; the suite knows {', '.join(self.categories)}"
            )
        return name

    def check(self, samples: Iterable[Sample]) -> None:
        """Raise ValueError for the first sample that can't be scored, before any model time is spent."""
        for sample in samples:
            if self.metric(sample) == "caption" and self.context.frequencies is None:
                raise ValueError(f"sample {sample.id!r}: captions are scored with training frequencies; name a train file in the suite")
            if not references(sample):
                raise ValueError(f"sample {sample.id!r}: no reference answer; give it `answers` or a last turn of the assistant")
            name = self.metric(sample)
            read = {"description": _checklist, "checklist": _checklist, "beats": _beats}.get(name)
            try:
                found = read(sample.meta) if read else None
            except ValueError as error:
                raise ValueError(f"sample {sample.id!r}: {error}") from error
            if name in ("checklist", "beats") and not found:
                raise ValueError(f"sample {sample.id!r}: metric {name!r} scores by the sample's {name}, and it has none")

    def score(self, output: str, sample: Sample) -> Scored:
        return METRICS[self.metric(sample)].function(output, sample, self.context)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the metrics in use, by name: a part of a run's identity."""
        return {name: METRICS[name].version for name in sorted({*self.categories.values(), *self.families.values()})}


def references(sample: Sample) -> tuple[str, ...]:
    """The sample's answers, or the text of its last turn where that is the assistant's."""
    if sample.answers:
        return sample.answers
    return (sample.turns[-1].text,) if sample.turns and sample.turns[-1].role == "assistant" else ()


def vqa(output: str, sample: Sample, context: Context) -> Scored:
    """`vqa_soft` where `meta["human_answers"]` lists one answer an annotator (two or more), else `exact_match`."""
    people = sample.meta.get("human_answers") or ()
    if len(people) >= 2:
        return Scored(100.0 * soft_accuracy(output, people), "vqa_soft", _yes(output, Counter(people).most_common(1)[0][0]))
    options = references(sample)
    return Scored(100.0 * any(same_answer(output, option) for option in options), "exact_match", _yes(output, options[0]))


def soft_accuracy(output: str, people: Sequence[str]) -> float:
    """VQA accuracy, 0..1: mean over annotators left out of min(1, matches among the others / 3) (Antol et al. 2015).

    With fewer than four annotators the 3 becomes the number of the others, so that full agreement still gives 1.
    """
    matches = [same_answer(output, answer) for answer in people]
    needed = min(3, len(people) - 1)
    return sum(min(1.0, (sum(matches) - own) / needed) for own in matches) / len(people)


def same_answer(left: str, right: str) -> bool:
    """Equal after the VQA normaliser; where it leaves nothing (the option `A` is an article), equal but for case and outer marks."""
    a, b = normalise_answer(left), normalise_answer(right)
    return a == b if a or b else _bare(left) == _bare(right)


def _bare(text: str) -> str:
    return text.strip(punctuation + whitespace).lower() or text.strip()


def accuracy(output: str, sample: Sample, context: Context) -> Scored:
    """Closed answers: equal, the same yes/no in the first word, the same option letter, or the only one of `choices` that is named."""
    options = references(sample)
    choices = [str(choice) for choice in sample.meta.get("choices") or ()]
    right = any(same_answer(output, option) for option in options)
    if not right and _is_polar(options[0]):
        right = polarity(output) == polarity(options[0])
    elif not right:
        right = any(same_answer(picked, option) for picked in _picked(output, choices) for option in options)
    return Scored(100.0 * right, "accuracy", _yes(output, options[0]))


def _picked(output: str, choices: Sequence[str]) -> list[str]:
    """What the output chooses, in every way to say it: its option letter, and the text of that option."""
    match = re.fullmatch(r"\s*\(?([A-Z])(?:[.):].*|\s*)", output, re.DOTALL)
    if match:
        index = ord(match[1]) - ord("A")
        return [match[1], choices[index]] if index < len(choices) else [match[1]]
    named = set(find_phrases(output, [phrase_key(choice) for choice in choices]))
    if len(named) != 1:
        return []
    index = next(i for i, choice in enumerate(choices) if phrase_key(choice) in named)
    return [choices[index], chr(ord("A") + index)]


def _is_polar(answer: str) -> bool:
    return normalise_answer(answer) in {"yes", "no", "true", "false"}


def _yes(output: str, answer: str) -> dict[str, float]:
    """For yes/no items: did it say yes, is yes right; balanced accuracy and yes-rate are computed from these."""
    if not _is_polar(answer):
        return {}
    return {"said_yes": 100.0 * (polarity(output) is True), "is_yes": 100.0 * (polarity(answer) is True)}


def caption(output: str, sample: Sample, context: Context) -> Scored:
    """10 x CIDEr-D with training frequencies. Raises ValueError without these."""
    import sacrebleu

    if context.frequencies is None:
        raise ValueError("captions are scored with training frequencies; name a train file in the suite")
    value = cider_d(output, references(sample), context.frequencies)
    bleu = sacrebleu.sentence_bleu(output, list(references(sample)), lowercase=True).score
    beside = {"cider_d_x100": 100.0 * value, "bleu4_sentence": bleu, "rouge_l": rouge_l(output, references(sample))}
    return Scored(10.0 * value, "cider_d", {**beside, "words": float(len(caption_tokens(output)))})


class _Words:
    """Tokens of rouge-score for ASCII texts; other letters, which that would drop, are kept (else a right answer in Chinese scores 0)."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(output: str, options: Sequence[str]) -> float:
    """ROUGE-L F (rouge-score, no stemming), best over the references, 0..100. COCO's ROUGE-L weighs recall more and is another number."""
    return 100.0 * _rouge().score_multi(list(options), output)["rougeL"].fmeasure


def _rouge_only(output: str, sample: Sample, context: Context) -> Scored:
    return Scored(rouge_l(output, references(sample)), "rouge_l", {"words": float(len(output.split()))})


def description(output: str, sample: Sample, context: Context) -> Scored:
    """ROUGE-L F; recall of `meta["checklist"]`; CHAIR over the objects of the data set; length in words."""
    beside = {"words": float(len(output.split())), **checklist_recall(output, sample.meta)}
    if context.objects and "objects" in sample.meta:
        beside |= chair(output, set(_object_keys(sample.meta)), context.objects)
    return Scored(rouge_l(output, references(sample)), "rouge_l", beside)


def checklist(output: str, sample: Sample, context: Context) -> Scored:
    """(Phrases of the checklist held - phrases of its kind `false` held) / phrases of the checklist, at least 0, times the share of the
    different objects named that are there; 0 where none of the sample's is named. ROUGE-L, recall by kind, CHAIR and length beside.

    So neither a list of everything nor both sizes and all corners of a thing, nor a count without things, earns anything. An object that a
    reference names is taken to be there, so that a reference has 100.
    """
    beside = {"words": float(len(output.split())), "rouge_l": rouge_l(output, references(sample)), **checklist_recall(output, sample.meta)}
    own = set(_object_keys(sample.meta))
    present = own | {name for text in references(sample) for name in find_phrases(text, context.objects)}
    beside |= chair(output, present, context.objects)
    named = set(find_phrases(output, [*context.objects, *present]))
    words, kinds = phrase_key(output), _checklist(sample.meta)
    wrong = sum(bool(_places(words, phrase)) for phrase in kinds.pop(FALSE, []))
    held = [bool(_places(words, phrase)) for phrases in kinds.values() for phrase in phrases]
    truth = len(named & present) / len(named) if named & own else 0.0
    return Scored(100.0 * max(0, sum(held) - wrong) / len(held) * truth, "checklist", beside)


def story(output: str, sample: Sample, context: Context) -> Scored:
    """ROUGE-L F; length in words."""
    return _rouge_only(output, sample, context)


def beats(output: str, sample: Sample, context: Context) -> Scored:
    """Per cent of `meta["beats"]` that are told in order; those told at all, ROUGE-L and length beside.

    A beat is told by one sentence that holds all its phrases and no phrase of the data set's other beats (those of the first beat, which
    names who it is about, aside), and a sentence tells one beat; the longest chain of beats and sentences, both in order, counts.
    """
    wanted = _beats(sample.meta)
    sentences = re.split(r"(?<=[.!?])\s+", output)
    named = [(phrase_key(text), set(find_phrases(text, [*context.beats, *itertools.chain(*wanted)]))) for text in sentences]
    told = [[all(_places(words, p) for p in beat) and found <= {*beat, *wanted[0]} for words, found in named] for beat in wanted]
    chain = [0] * (len(sentences) + 1)  # longest chain of the beats so far within the first n sentences
    for row in told:
        before = list(chain)
        for n, hit in enumerate(row, start=1):
            chain[n] = max(chain[n - 1], before[n], before[n - 1] + hit)
    beside = {"words": float(len(output.split())), "rouge_l": rouge_l(output, references(sample))}
    beside["beats_recall"] = 100.0 * sum(map(any, told)) / len(wanted)
    return Scored(100.0 * chain[-1] / len(wanted), "beats", beside)


def checklist_recall(output: str, meta: Mapping[str, Any]) -> dict[str, float]:
    """`checklist_recall`: per cent of the phrases in `meta["checklist"]` that the output holds (singular, articles aside); {} without any.

    The checklist is a list of phrases, or a mapping of such lists by kind (objects, attributes, ...), each of which then has its own
    `checklist_{kind}_recall` as well. Raises ValueError for anything else.
    """
    words = phrase_key(output)
    found = {kind: [bool(_places(words, phrase)) for phrase in phrases] for kind, phrases in _checklist(meta).items()}
    figures = {"checklist_recall": [hit for kind, hits in found.items() if kind != FALSE for hit in hits]}
    figures |= {f"checklist_{kind}_recall": hits for kind, hits in found.items() if kind not in ("", FALSE)}
    figures |= {"checklist_false": found[FALSE]} if FALSE in found else {}
    return {name: 100.0 * sum(hits) / len(hits) for name, hits in figures.items() if hits}


def _checklist(meta: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """Phrases as they are compared, by kind; a plain list is of the kind "". Phrases of articles alone are left out."""
    value = meta.get("checklist") or ()
    kinds = value if isinstance(value, Mapping) else {"": value}
    if not all(_is_phrases(phrases) for phrases in kinds.values()):
        raise ValueError(f"checklist has to be a list of phrases, or a mapping of such lists by kind; found {value!r}")
    keys = {kind: [words for words in map(phrase_key, phrases) if words] for kind, phrases in kinds.items()}
    return {kind: phrases for kind, phrases in keys.items() if phrases}


def _beats(meta: Mapping[str, Any]) -> list[list[tuple[str, ...]]]:
    """Each beat as its phrases, as they are compared."""
    value = meta.get("beats") or ()
    if not isinstance(value, list | tuple) or not all(_is_phrases(beat) for beat in value):
        raise ValueError(f"beats has to be a list of beats, each a list of phrases; found {value!r}")
    keys = [[words for words in map(phrase_key, beat) if words] for beat in value]
    return [beat for beat in keys if beat]


def _is_phrases(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(phrase, str) for phrase in value)


def _places(words: Sequence[str], phrase: Sequence[str]) -> list[int]:
    """Every index at which the phrase begins."""
    return [at for at in range(len(words) - len(phrase) + 1) if words[at : at + len(phrase)] == phrase]


def chair(output: str, present: set[tuple[str, ...]], objects: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Object hallucination (CHAIR, Rohrbach et al. 2018): `chair_i` per cent of the objects named that are not there, `chair_s` any at all.

    Every mention counts, as in the authors' code (their formula has sets). Object names are matched as words; there is no synonym list.
    `chair_i` is left out where no object is named.
    """
    named = find_phrases(output, objects)
    wrong = [name for name in named if name not in present]
    beside = {"chair_s": 100.0 * bool(wrong), "objects_named": float(len(named))}
    return {**beside, "chair_i": 100.0 * len(wrong) / len(named)} if named else beside


def _object_keys(meta: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [key for key in (phrase_key(str(name)) for name in meta.get("objects") or ()) if key]


def anls(output: str, options: Sequence[str], threshold: float = 0.5) -> float:
    """Best 1 - edit distance / longer length over the references, 0 below the threshold; 0..1 (Biten et al. 2019).

    A similarity of exactly the threshold counts, as in anls-star and the field's harnesses; the paper's formula has 0 there.
    """
    best = 0.0  # case and spacing don't count, as in anls-star
    prediction = " ".join(output.lower().split())
    for option in options:
        target = " ".join(option.lower().split())
        longer = max(len(prediction), len(target))
        if longer and 1.0 - abs(len(prediction) - len(target)) / longer < threshold:
            continue  # the lengths alone put it below; an endless output costs nothing
        similarity = 1.0 - _edit_distance(prediction, target) / longer if longer else 1.0
        best = max(best, similarity if similarity >= threshold else 0.0)
    return best


def _edit_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _anls(output: str, sample: Sample, context: Context) -> Scored:
    if sample.meta.get("choices"):  # a near miss among choices is another choice: South America is not North America
        return accuracy(output, sample, context)
    options = references(sample)
    return Scored(100.0 * anls(output, options), "anls", {"exact_match": 100.0 * any(same_answer(output, option) for option in options)})


def relaxed(output: str, sample: Sample, context: Context) -> Scored:
    """Relaxed accuracy (Methani et al. 2020, ChartQA) for numeric references, ANLS for others.

    Differs from ChartQA's code where that misfires: a target of 0 wants 0 as a number (`0.0` is right), `%` is a unit (`5%` is `5`, and
    0.05 is neither), thousands separators are read. Years fall under the tolerance as well; give such families `accuracy` in the suite.
    """
    if sample.meta.get("choices"):
        return accuracy(output, sample, context)
    options = references(sample)
    best = max(_relaxed_one(output, option) for option in options)
    return Scored(100.0 * best, "relaxed_accuracy", {"exact_match": 100.0 * any(same_answer(output, option) for option in options)})


def _relaxed_one(output: str, option: str, tolerance: float = 0.05) -> float:
    target = parse_number(option)
    if target is None:
        return anls(output, [option])
    value = parse_number(output)
    # The bound is widened by rounding error only: 95 for 100 is inside.
    return float(value is not None and abs(value - target) <= tolerance * abs(target) * (1 + 1e-9))


@dataclass(frozen=True)
class Metric:
    """A metric as suites name it. `version` is raised with every change that can move a figure of it; `source` is what it follows."""

    name: str
    version: str
    source: str
    function: Callable[[str, Sample, Context], Scored]


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "vqa",
            "2",
            "VQA soft accuracy (Antol et al. 2015; the official evaluation code) where the sample has `human_answers`, "
            "else exact match after its normaliser",
            vqa,
        ),
        Metric(
            "accuracy", "2", "own rules for closed answers (yes/no, options, exact match); balanced accuracy as in scikit-learn", accuracy
        ),
        Metric(
            "caption",
            "2",
            "10 x CIDEr-D (Vedantam et al. 2015; pycocoevalcap) with training frequencies, 0..100 (the literature prints 100 x CIDEr-D); "
            "BLEU-4 by sacrebleu, METEOR 1.5 and ROUGE-L beside",
            caption,
        ),
        Metric(
            "description",
            "2",
            "ROUGE-L F (Lin 2004; rouge-score); checklist recall (own) and CHAIR (Rohrbach et al. 2018; the authors' code) beside",
            description,
        ),
        Metric("story", "2", "ROUGE-L F (Lin 2004; rouge-score)", story),
        Metric(
            "checklist",
            "1",
            "(checklist held - falsehoods) x share of the named objects that are there (own); ROUGE-L, CHAIR beside",
            checklist,
        ),
        Metric(
            "beats", "1", "share of the required beats that are told, one a sentence, in order (own); ROUGE-L and METEOR 1.5 beside", beats
        ),
        Metric("rouge_l", "2", "ROUGE-L F (Lin 2004; rouge-score)", _rouge_only),
        Metric("anls", "2", "ANLS (Biten et al. 2019; anls-star), threshold 0.5; `accuracy` for items with `choices`", _anls),
        Metric(
            "relaxed",
            "2",
            "relaxed accuracy (Methani et al. 2020; lmms-eval's ChartQA) for numbers, ANLS for others; `accuracy` for items with `choices`",
            relaxed,
        ),
    )
}


def describe() -> str:
    """The metrics as a Markdown table: name, version, what is computed and after whom."""
    rows = [("metric", "version", "what it computes, and after whom"), ("---",) * 3]
    rows += [(f"`{metric.name}`", metric.version, metric.source) for metric in METRICS.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
