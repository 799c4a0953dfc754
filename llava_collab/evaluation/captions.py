"""Caption metrics: CIDEr-D with document frequencies fixed from training references, and METEOR where Java is.

CIDEr-D: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015), the -D variant of COCO's evaluation:
n-grams of 1 to 4 words, clipped tf-idf cosine, Gaussian length penalty with sigma 6. COCO takes document frequencies from the test
references; with a hundred test items these are unstable, so here they come from the training references, stored in a file of their own.

METEOR 1.5: Denkowski and Lavie, "Meteor Universal" (WMT 2014), by its own program, the jar in pycocoevalcap, with COCO's settings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava_collab.evaluation.text import caption_tokens
from llava_collab.files import write_text

_log = logging.getLogger(__name__)
Ngram = tuple[str, ...]
MAX_N = 4
SIGMA = 6.0


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many training items an n-gram occurs. N-grams of one item only are not kept: log(1) = 0, the same as for an unseen one."""

    items: int
    counts: dict[Ngram, int]

    @classmethod
    def of(cls, references: Iterable[Sequence[str]]) -> DocumentFrequencies:
        """Count over items, each a list of reference captions. Raises ValueError for none."""
        counts: Counter[Ngram] = Counter()
        items = 0
        for captions in references:
            items += 1
            counts.update({ngram for caption in captions for ngram in _ngrams(caption)})
        if items == 0:
            raise ValueError("CIDEr-D needs the references of training items; name the training file in the suite")
        return cls(items, {ngram: count for ngram, count in counts.items() if count > 1})

    def to_json(self) -> str:
        """Canonical JSON text: the same frequencies give the same text, hence the same hash."""
        return json.dumps({"items": self.items, "counts": {" ".join(n): c for n, c in sorted(self.counts.items())}}, ensure_ascii=False)

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> DocumentFrequencies:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(int(raw["items"]), {tuple(ngram.split(" ")): int(count) for ngram, count in raw["counts"].items()})


def cider_d(candidate: str, references: Sequence[str], frequencies: DocumentFrequencies) -> float:
    """CIDEr-D of one caption, 0 to 10 (the literature multiplies its mean by 100). Raises ValueError without references."""
    if not references:
        raise ValueError("CIDEr-D needs at least one reference caption")
    log_items = math.log(frequencies.items)
    candidate_vector = _tf_idf(candidate, frequencies, log_items)
    similarities = [_similarity(candidate_vector, _tf_idf(text, frequencies, log_items)) for text in references]
    return 10.0 * sum(similarities) / len(similarities)


@dataclass(frozen=True)
class _Vector:
    weights: tuple[dict[Ngram, float], ...]  # one map for each n
    norms: tuple[float, ...]
    length: int  # number of bigrams, as the reference code has it


def _ngrams(text: str) -> Counter[Ngram]:
    tokens = caption_tokens(text)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1))


def _tf_idf(text: str, frequencies: DocumentFrequencies, log_items: float) -> _Vector:
    weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(MAX_N))
    length = 0
    for ngram, count in _ngrams(text).items():
        weights[len(ngram) - 1][ngram] = count * (log_items - math.log(frequencies.counts.get(ngram, 1)))
        length += count if len(ngram) == 2 else 0
    return _Vector(weights, tuple(math.sqrt(sum(w * w for w in part.values())) for part in weights), length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosine, times the length penalty; 0 to 1."""
    total = 0.0
    for part, other, norm, other_norm in zip(candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True):
        if norm and other_norm:
            total += sum(min(w, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, w in part.items()) / (norm * other_norm)
    return total / MAX_N * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]] | None:
    """METEOR 1.5 of a corpus and of each of its outputs, 0..100; the corpus figure is no mean, it adds up matches and lengths.

    None, with a line in the log, without Java or pycocoevalcap. One program serves all calls of a process.
    """
    program = _meteor_program()
    if program is None or not outputs:
        return None
    try:
        statistics = []
        for output, texts in zip(outputs, references, strict=True):
            statistics.append(_ask(program, "SCORE", *(" ".join(caption_tokens(text)) for text in (*texts, output))))
        scores = [float(_ask(program, "EVAL", *statistics)), *(float(_line(program)) for _ in statistics)]
    except OSError as error:
        program.kill()
        _log.warning("no METEOR: %s (it takes 1 GB of memory)", error)
        return None
    return 100.0 * scores.pop(), [100.0 * score for score in scores]


@cache
def _meteor_program() -> subprocess.Popen[str] | None:
    java, package = shutil.which("java"), importlib.util.find_spec("pycocoevalcap")
    if java is None or package is None:
        _log.info("no METEOR: it needs Java and `pip install 'llava_collab[meteor]'`")
        return None
    jar = Path(next(iter(package.submodule_search_locations or ()))) / "meteor" / "meteor-1.5.jar"
    command = [java, "-Xmx1G", "-Dfile.encoding=UTF-8", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")


def _ask(program: subprocess.Popen[str], *parts: str) -> str:
    assert program.stdin is not None
    program.stdin.write(" ||| ".join(parts) + "\n")
    program.stdin.flush()
    return _line(program)


def _line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    line = program.stdout.readline()
    if not line:
        raise OSError("its program ended")
    return line.strip()
