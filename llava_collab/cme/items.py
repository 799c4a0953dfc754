"""What a family of questions works with (`Sources`, read once) and gives back (`Item`s), and who may see what.

A text is known by its first 60 words: what starts alike (a mail that was sent twice, a report whose figures alone differ) is one text.
It belongs to one split only: to test where the package has it there, else to train or decision, by a hash. A text that the package has
under two labels is left out, since no answer to it would be exact.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from llava_collab.assets import AssetError
from llava_collab.cme.wordnet import PACKAGE as WORDNET
from llava_collab.cme.wordnet import WordNet
from llava_collab.data.chance import unit_interval
from llava_collab.data.texts import TEXT_SETS, labelled_texts

SPLITS = ("train", "decision", "test")
DECISION_SHARE = 0.1
"""Of what a package has for training."""
TEST_SHARE = 0.3
"""Of words and facts, which no package splits."""
KEY_WORDS = 60
LETTERS = 7
COUNTRIES = "world-countries"
# Sets that hold the same texts: what is in the test of one is in the train of none.
_TOGETHER = (("20ng",), ("r8", "r52"), ("spam", "hard-ham"), ("movie-reviews",), ("product-reviews",))

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    """A text of a set with its label, and the key that it is known by."""

    text: str
    label: str
    key: str


@dataclass(frozen=True)
class Item:
    """One question: the slots of its wording, what is shown below the wording, all accepted answers (the first is taught).

    `keys` name the texts, words or facts that it shows; no key is in two splits.
    """

    answers: tuple[str, ...]
    keys: tuple[str, ...]
    shown: str = ""
    choices: tuple[str, ...] = ()
    slots: Mapping[str, str] = field(default_factory=dict)


class Sources:
    """The packages, each read at its first use. `unpacked(package)` gives a package's folder."""

    def __init__(self, unpacked: Callable[[str], Path]) -> None:
        self.unpacked = unpacked
        self.left_out: dict[str, dict[str, int]] = {}
        self._passages: dict[tuple[str, str], list[Passage]] = {}

    def passages(self, name: str, split: str) -> list[Passage]:
        """Texts of a set in one split, each once."""
        if (name, split) not in self._passages:
            self._read(next(names for names in _TOGETHER if name in names))
        return self._passages[name, split]

    def _read(self, names: Sequence[str]) -> None:
        sides = {(name, side): _known(labelled_texts(name, side, self.unpacked)) for name in names for side in ("test", "train")}
        labels: dict[str, set[str]] = {}
        for passage in (passage for found in sides.values() for passage in found):
            labels.setdefault(passage.key, set()).add(passage.label)
        tested = {passage.key for (_, side), found in sides.items() if side == "test" for passage in found}
        for name in names:
            gone: Counter[str] = Counter()
            kept: dict[str, Passage] = {}
            for side in ("test", "train"):
                for passage in sides[name, side]:
                    reasons = {
                        "two labels": len(labels[passage.key]) > 1,
                        "in train and test": side == "train" and passage.key in tested,
                        "repeated": passage.key in kept,
                    }
                    if reason := next((reason for reason, holds in reasons.items() if holds), None):
                        gone[reason] += 1
                        continue
                    kept[passage.key] = passage
            self.left_out[name] = dict(sorted(gone.items()))
            for split in SPLITS:
                self._passages[name, split] = [p for p in kept.values() if self._split(p.key, tested) == split]

    @staticmethod
    def _split(key: str, tested: set[str]) -> str:
        return "test" if key in tested else "decision" if unit_interval(f"decision|{key}") < DECISION_SHARE else "train"

    @cached_property
    def wordnet(self) -> WordNet:
        return WordNet(self.unpacked(WORDNET))

    @cached_property
    def countries(self) -> list[dict[str, Any]]:
        """Independent countries of world-countries that have a capital, by name. Raises AssetError for a file that holds something else."""
        path = self.unpacked(COUNTRIES) / "countries.json"
        try:
            rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["independent"] and any(row["capital"])]
            return sorted(rows, key=lambda row: row["name"]["common"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            cure = f"delete {path.parent} and run `llava-collab assets --only {COUNTRIES}` for a fresh copy"
            raise AssetError(f"{path} is no list of countries ({type(error).__name__}: {error}); {cure}") from error


def split_of(key: str) -> str:
    """The split of a word or fact, by its name alone."""
    place = unit_interval(f"cme-open|{key}")
    return "test" if place < TEST_SHARE else "decision" if place < TEST_SHARE + DECISION_SHARE else "train"


def key_of(text: str) -> str:
    """What a text is known by: a hash of its first 60 words, whatever their case and marks."""
    words = islice(re.finditer(r"[^\W_]+", text), KEY_WORDS)
    return sha256(" ".join(word[0].lower() for word in words).encode()).hexdigest()[:16]


def cut(text: str, words: int) -> str:
    """The first so many words, in one line, and at most seven letters a word: rows of figures and marks have many tokens."""
    return " ".join(text.split()[:words])[: LETTERS * words].rstrip()


def balanced(rng: random.Random, groups: Mapping[str, Iterable[T]], *, even: bool) -> list[T]:
    """Members of the groups in random order, one of each group in turn. `even`: only as many of each as the smallest has."""
    columns = [rng.sample(members, len(members)) for members in (list(groups[name]) for name in sorted(groups))]
    depth = (min if even else max)(map(len, columns), default=0)
    rows = ([column[level] for column in columns if level < len(column)] for level in range(depth))
    return [one for row in rows for one in rng.sample(row, len(row))]


def by_label(passages: Iterable[Passage]) -> dict[str, list[Passage]]:
    """Label -> its passages, in their order."""
    groups: dict[str, list[Passage]] = {}
    for passage in passages:
        groups.setdefault(passage.label, []).append(passage)
    return groups


def lettered(options: Sequence[str]) -> str:
    """ "A. first\\nB. second ..." """
    return "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))


def packages() -> list[str]:
    """Names of all packages that the benchmark is made of."""
    return sorted({texts.package for texts in TEXT_SETS.values()} | {WORDNET, COUNTRIES})


def _known(texts: Iterable[tuple[str, str]]) -> list[Passage]:
    """A mail is known by its body: spam is sent under many subjects."""
    return [Passage(text, label, key_of(text.split("\n", 1)[-1])) for text, label in texts]
