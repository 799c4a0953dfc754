"""Which entries become the test and the training split: by picture, with quotas, in an order that only seed and ids decide."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public.duplicates import NearIndex

TEST_SHARE = 5  # a category gives at most one entry in so many to test


@dataclass(frozen=True, slots=True)
class Candidate:
    """What choosing needs to know of an entry: its rank, where it counts, and numbers of its pictures and of other keys."""

    rank: int
    category: str
    family: str
    held: bool
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Pictures:
    """Perceptual hashes by key number (one key may have several files), and the keys that the LLaVA mix holds or comes near."""

    hashes: Mapping[int, Sequence[int]]
    in_mix: frozenset[int] = frozenset()
    near_mix: frozenset[int] = frozenset()


@dataclass
class Choice:
    """Ranks of both splits, and how many entries were left out of each, by reason."""

    test: set[int] = field(default_factory=set)
    train: set[int] = field(default_factory=set)
    not_test: Counter[str] = field(default_factory=Counter)
    not_train: Counter[str] = field(default_factory=Counter)


def rank_of(seed: int, source: str, entry_id: str) -> int:
    """An entry's place in every order: 64 bits of a hash, the same whatever else is there."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{source}\n{entry_id}".encode()).digest()[:8], "big")


def choose(candidates: Sequence[Candidate], pictures: Pictures, train: int, test: int) -> Choice:
    """Test first, equal shares of the categories; then what shares a picture or a near duplicate with it leaves train.

    What was published as validation or test data never goes to train.
    """
    choice = Choice()
    test_keys = _choose_test(candidates, pictures, test, choice)
    near_keys = _near(test_keys, pictures) - test_keys
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for candidate in candidates:
        if candidate.rank in choice.test:
            continue
        if candidate.held:
            choice.not_train["published for evaluation"] += 1
        elif not test_keys.isdisjoint(candidate.keys):
            choice.not_train["picture in test"] += 1
        elif not near_keys.isdisjoint(candidate.keys):
            choice.not_train["near duplicate in test"] += 1
        else:
            cells[candidate.category, candidate.family].append(candidate.rank)
    quotas = apportion(train, {cell: len(ranks) for cell, ranks in cells.items()})
    for cell, ranks in cells.items():
        choice.train.update(sorted(ranks)[: quotas[cell]])
    choice.not_train["beyond the quota"] += sum(map(len, cells.values())) - len(choice.train)
    return choice


def _choose_test(candidates: Sequence[Candidate], pictures: Pictures, total: int, choice: Choice) -> set[int]:
    """Equal shares of the categories and, inside one, of its families; published validation and test data first. Gives the keys used."""
    queues: dict[str, dict[str, list[Candidate]]] = {name: defaultdict(list) for name in CATEGORIES}
    entries: Counter[str] = Counter()
    for candidate in candidates:
        entries[candidate.category] += 1
        if not pictures.in_mix.isdisjoint(candidate.keys):
            choice.not_test["picture in the LLaVA mix"] += 1
        elif not pictures.near_mix.isdisjoint(candidate.keys):
            choice.not_test["near duplicate in the LLaVA mix"] += 1
        else:
            queues[candidate.category][candidate.family].append(candidate)
    used: set[int] = set()
    for index, category in enumerate(CATEGORIES):
        quota = total // len(CATEGORIES) + (index < total % len(CATEGORIES))
        mine: set[int] = set()  # test entries of one category have pictures of their own
        families = [sorted(queues[category][name], key=lambda c: (not c.held, c.rank)) for name in sorted(queues[category])]
        for candidate in islice(_by_turns(families, mine), min(quota, entries[category] // TEST_SHARE)):
            choice.test.add(candidate.rank)
        used |= mine
    return used


def _by_turns(families: Sequence[Sequence[Candidate]], used: set[int]) -> Iterator[Candidate]:
    """The families one after the other, until all are at their end; entries that share a key with an earlier one are passed over."""
    waiting = {number: iter(family) for number, family in enumerate(families)}
    for number in cycle(range(len(families))):
        if not waiting:
            return
        found = next((c for c in waiting.get(number, ()) if used.isdisjoint(c.keys)), None)
        if found is None:
            waiting.pop(number, None)
            continue
        used.update(found.keys)
        yield found


def _near(keys: set[int], pictures: Pictures) -> set[int]:
    """Keys of pictures whose hash is near that of a picture of `keys`."""
    pairs = [(key, value) for key, values in pictures.hashes.items() for value in values]
    index = NearIndex(value for _, value in pairs)
    wanted = {value for key in keys for value in pictures.hashes.get(key, ())}
    return {pairs[position][0] for value in wanted for position in index.near(value)}


def apportion(total: int, sizes: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """`total` over cells in proportion to their sizes, by largest remainder; all there is where that is less than `total`."""
    there = sum(sizes.values())
    if there <= total:
        return dict(sizes)
    shares = {cell: divmod(total * size, there) for cell, size in sizes.items()}
    left = total - sum(whole for whole, _ in shares.values())
    first = sorted(shares, key=lambda cell: (-shares[cell][1], cell))[:left]
    return {cell: whole + (cell in first) for cell, (whole, _) in shares.items()}
