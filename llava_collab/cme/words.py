"""Families about words, with WordNet's word for the truth: kinds, definitions, synonyms and antonyms."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from llava_collab.cme.items import Item, Sources, lettered, split_of
from llava_collab.cme.wordnet import Key, Synset, WordNet

LEAST_DEPTH = 3
"""Synsets that a kind must have above it: "entity" and "abstraction" are kinds of everything."""
_TRIES = 20


def kind_of(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Is X a kind of Y, half yes, half no; every Y is asked with yes and with no, so that Y alone says nothing.

    Yes: the usual sense of Y stands above the usual sense of X. No: no sense of Y stands above any sense of X, nor is one of its senses;
    X is of the same field (animals, artefacts, ...) as the noun of the yes where one can be found.
    """
    net = sources.wordnet
    names = {
        s.key: word for (word, pos), s in net.usual.items() if pos == "n" and s.words[0] == word and len(net.above(s.key)) >= LEAST_DEPTH
    }
    nouns = [(word, s) for (word, pos), s in net.usual.items() if pos == "n" and split_of(f"noun|{word}") == split]
    left = dict(rng.sample(nouns, len(nouns)))
    items = []
    while left:
        word, synset = left.popitem()
        kinds = [names[key] for key in sorted(net.above(synset.key)) if key in names and names[key] not in word]
        if not kinds:
            continue
        kind = rng.choice(kinds)
        other = _other(net, left, synset, kind, rng)
        if other is None:
            continue
        del left[other]
        items += [_polar(word, kind, "yes"), _polar(other, kind, "no")]
    return items


def _other(net: WordNet, left: dict[str, Synset], synset: Synset, kind: str, rng: random.Random) -> str | None:
    """A noun that is no kind of `kind` in any sense."""
    near = [word for word, one in left.items() if one.field == synset.field]
    far = list(left)
    for pool in (near, far):
        for word in rng.sample(pool, min(_TRIES, len(pool))):
            if kind not in word and not net.all_above(word, "n").intersection(net.senses[kind, "n"]):
                return word
    return None


def _polar(word: str, kind: str, answer: str) -> Item:
    return Item((answer,), (f"noun:{word}",), choices=("yes", "no"), slots={"word": word, "kind": kind})


def definition(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Which of four words a definition is of. The wrong ones are of the same part of speech, field and split, and not near relatives."""
    net = sources.wordnet
    pools: dict[tuple[str, int], list[tuple[str, Synset]]] = {}
    for (word, pos), synset in net.usual.items():
        if pos in "nv" and split_of(f"definition|{word}") == split:
            pools.setdefault((pos, synset.field), []).append((word, synset))
    asked = [one for pool in pools.values() for one in pool if _askable(net, *one)]
    items = []
    for word, synset in rng.sample(asked, len(asked)):
        pool = pools[synset.key[0], synset.field]
        wrong = list(islice((other for other, one in rng.sample(pool, min(_TRIES, len(pool))) if _apart(net, synset, other, one)), 3))
        if len(wrong) == 3:
            place = len(items) % 4
            options = (*wrong[:place], word, *wrong[place:])
            items.append(Item(("ABCD"[place],), (f"definition:{word}",), f"{synset.definition}\n\n{lettered(options)}", options))
    return items


def _askable(net: WordNet, word: str, synset: Synset) -> bool:
    """The definition is of usual length, does not hold the word or its synonyms, and is asked for one of them only."""
    text = synset.definition.lower()
    first = next((one for one in synset.words if net.usual.get((one, synset.key[0])) == synset), None)
    return word == first and 4 <= len(text.split()) <= 40 and not any(one.lower()[:5] in text for one in synset.words)


def _apart(net: WordNet, synset: Synset, word: str, other: Synset) -> bool:
    """Neither a synonym in any sense, nor above, below or beside it."""
    related = {synset.key, *net.above(synset.key)}
    beside = set(synset.kinds) & set(other.kinds)
    return not beside and synset.key not in net.all_above(word, synset.key[0]) and other.key not in related


def relation(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Synonyms or antonyms, half and half: each word that is asked with an antonym is asked with a synonym as well.

    Pairs of which one holds the other (happy, unhappy) are left out: their letters tell.
    """
    net = sources.wordnet
    items = []
    seen: set[str] = set()  # of all splits: a pair that two antonyms lead to belongs to the first
    for (word, key), antonym in sorted(net.antonyms.items()):
        opposed = _pair_key(key[0], word, antonym)
        if opposed in seen or not _plain(net, word, antonym, key[0]):
            continue
        alike = {_pair_key(key[0], word, other): other for other in _synonyms(net, word, antonym, key)}
        same = next((pair for pair in alike if pair not in seen), None)
        if same is not None:
            seen |= {opposed, same}
            if split_of(opposed) == split:
                items.append([_pair(word, antonym, "antonyms", opposed, rng), _pair(word, alike[same], "synonyms", same, rng)])
    return [item for pair in rng.sample(items, len(items)) for item in pair]


def _pair_key(pos: str, word: str, other: str) -> str:
    return f"relation:{pos}:{'|'.join(sorted((word, other)))}"


def _synonyms(net: WordNet, word: str, antonym: str, key: Key) -> Iterator[str]:
    """Words of the synset that has the antonym, then of the word's usual sense; none that shares a synset with the antonym."""
    for synset in (net.synsets[key], net.usual[word, key[0]]):
        for other in synset.words:
            apart = not set(net.senses.get((other, key[0]), ())) & set(net.senses[antonym, key[0]])
            if apart and other != antonym and _plain(net, word, other, key[0]):
                yield other


def _plain(net: WordNet, word: str, other: str, pos: str) -> bool:
    """Both are usual words, and neither holds the other."""
    return all((one, pos) in net.usual for one in (word, other)) and word not in other and other not in word


def _pair(word: str, other: str, answer: str, key: str, rng: random.Random) -> Item:
    first, second = rng.sample((word, other), 2)
    return Item((answer,), (key,), choices=("synonyms", "antonyms"), slots={"first": first, "second": second})
