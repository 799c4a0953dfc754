"""What a family of questions works with (a `Pool` of one split) and gives back (a `Group`: pictures and questions about them)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from llava_collab.cmt import elements, splits
from llava_collab.cmt.photos import Photo
from llava_collab.cmt.phrases import Asked, phrase
from llava_collab.cmt.sources import Background, Country, RegionMap, Thing, World
from llava_collab.cmt.tables import Table
from llava_collab.cmt.words import GOODS, SIGN_WORDS

SIZE = 224  # pixels: what the small vision towers see, so that nothing is lost to resizing


@dataclass(frozen=True)
class Question:
    """One item about the pictures `images` (indices into the group's); `answers` are all accepted references, the first is taught.

    `checklist` maps a kind (objects, attributes, relations, counts, facts) to the phrases that a description has to hold; `beats` are
    what a story has to tell, in order, each by the words that one sentence must hold.
    """

    asked: Asked
    answers: tuple[str, ...]
    objects: tuple[str, ...] = ()
    images: tuple[int, ...] = (0,)
    choices: tuple[str, ...] = ()
    checklist: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beats: tuple[tuple[str, ...], ...] = ()

    @property
    def family(self) -> str:
        return self.asked.family

    @property
    def prompt(self) -> str:
        return self.asked.prompt


@dataclass(frozen=True)
class Group:
    """Pictures, the questions that share them, and for each picture what is known to be in it (JSON values)."""

    images: tuple[Image.Image, ...]
    questions: tuple[Question, ...]
    truths: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Pool:
    """The part of the world that one split may use."""

    split: str
    things: tuple[Thing, ...]
    backgrounds: tuple[Background, ...]
    countries: tuple[Country, ...]
    maps: tuple[RegionMap, ...]
    photos: tuple[Photo, ...]
    tables: tuple[Table, ...]
    elements: tuple[tuple[str, str, int], ...]
    sign_words: tuple[str, ...]
    goods: tuple[str, ...]
    fonts: tuple[str, ...]

    def ask(self, rng: random.Random, family: str, **slots: str) -> Asked:
        """The question in a wording of this split."""
        return phrase(family, splits.uses_held_out_phrases(self.split), rng, **slots)

    def things_apart(self, rng: random.Random, count: int, *, avoid: frozenset[str] = frozenset(), group: str = "") -> list[Thing]:
        """`count` random things that can not be taken for each other, nor for a thing of a sense in `avoid`."""
        chosen: list[Thing] = []
        senses = set(avoid)
        candidates = [thing for thing in self.things if not group or thing.group == group]
        for thing in rng.sample(candidates, len(candidates)):
            if len(chosen) < count and thing.sense not in senses:
                chosen.append(thing)
                senses.add(thing.sense)
        if len(chosen) < count:
            raise ValueError(f"split {self.split!r} has only {len(chosen)} distinct things of group {group or 'any'!r}, {count} are needed")
        return chosen


def pool_of(world: World, split: str) -> Pool:
    """Filter the world by the rules of `splits`. Raises ValueError, naming the source, if nothing is left of one."""
    known = splits.uses_known_things(split)
    train = splits.uses_train_backgrounds(split)

    def keep(kind: str, name: str) -> bool:
        return splits.is_known(kind, name) == known

    def keep_photo(name: str) -> bool:
        """A photograph of a thing that is also a cutout goes with the cutout: train must show no giraffe at all, or may show both."""
        sense = senses.get(name.lower())
        return keep("object", sense) if sense else keep("photo", name)

    senses = {thing.name: thing.sense for thing in world.things}
    pool = Pool(
        split=split,
        things=tuple(thing for thing in world.things if keep("object", thing.sense)),
        backgrounds=tuple(b for b in world.backgrounds if splits.is_train_background(b.name) == train),
        countries=tuple(country for country in world.countries if keep("country", country.name)),
        maps=tuple(m for m in world.maps if keep("map", m.name)),
        photos=tuple(photo for photo in world.photos if keep_photo(photo.name)),
        tables=tuple(table for table in world.tables if keep("table", table.family)),
        elements=tuple(element for element in elements.ELEMENTS if keep("element", element[1])),
        sign_words=tuple(word for word in SIGN_WORDS if keep("sign", word)),
        goods=tuple(word for word in GOODS if keep("good", word)),
        fonts=world.fonts,
    )
    for name, least in (("things", 4), ("backgrounds", 1), ("countries", 1), ("maps", 1), ("photos", 1), ("tables", 1)):
        if len(getattr(pool, name)) < least:
            raise ValueError(f"split {split!r} is left with {len(getattr(pool, name))} {name}, needs {least}: the assets are incomplete")
    return pool
