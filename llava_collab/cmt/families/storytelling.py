"""Visual Storytelling: three frames in which one animal comes to three places and meets a thing at each; who, where, what and order count.

A group in train draws four frames and tells several stories of three of them in different orders: the same pictures in another order
are another story, so the order can not be ignored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

from llava_collab.cmt import draw, scenes
from llava_collab.cmt.items import SIZE, Group, Pool, Question
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.sources import Background, Thing

_OPENINGS = ("started at", "then came to", "at last reached")
_MEETINGS = ("met", "saw", "found")
LEADS = {"story": 0.6, "ending": 0.2, "frame": 0.2}
ORDINALS = ("first", "second", "third")
Frame = tuple[str, str]  # place, thing met


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """Three frames and one story, or four frames and `count` stories of three of them."""
    hero = pool.things_apart(rng, 1, group="animal")[0]
    frames = _frames(pool, rng, hero, 3 if count == 1 else 4)
    orders = rng.sample(list(permutations(range(len(frames)), 3)), count)
    told = [frame for _, frame in frames]
    questions = tuple(_question(pool, rng, hero, [told[i] for i in order], order) for order in orders)
    truths = tuple({"hero": hero.name, "place": place, "met": met} for place, met in told)
    return Group(tuple(image for image, _ in frames), questions, truths)


def _frames(pool: Pool, rng: random.Random, hero: Thing, count: int) -> list:
    """[(image, (place, thing met))]: every frame has another place, as far as there are that many, and another thing."""
    by_place: dict[str, list[Background]] = {}
    for background in pool.backgrounds:
        if background.place:
            by_place.setdefault(background.place, []).append(background)
    if not by_place:
        raise ValueError(f"no background of split {pool.split!r} has a place: tuxpaint-data or mate-backgrounds is incomplete")
    places = rng.sample(sorted(by_place), min(count, len(by_place)))
    met = pool.things_apart(rng, count, avoid=frozenset((hero.sense,)))
    path = rng.choice(hero.paths)  # the same individual in every frame
    one = Thing(hero.name, hero.group, hero.sense, (path,))
    frames = []
    for index, thing in enumerate(met):
        place = places[index % len(places)]
        image = draw.background(rng, rng.choice(by_place[place]))
        left, right = (SIZE * 0.27, SIZE * rng.uniform(0.5, 0.7)), (SIZE * 0.75, SIZE * rng.uniform(0.4, 0.7))
        hero_at, thing_at = rng.sample([left, right], 2)
        scenes.paste(image, rng, thing, thing_at, rng.uniform(70, 90))
        scenes.paste(image, rng, one, hero_at, rng.uniform(95, 108))
        frames.append((image, (place, thing.name)))
    return frames


def sentences_of(hero: str, frames: Sequence[Frame]) -> list[str]:
    """The story of three frames, a sentence each."""
    subjects = (f"A {hero}" if hero[0] not in "aeiou" else f"An {hero}", "It", "It")
    return [
        f"{subject} {opening} the {place} and {meeting} {with_article(thing)}."
        for subject, opening, meeting, (place, thing) in zip(subjects, _OPENINGS, _MEETINGS, frames, strict=True)
    ]


def _question(pool: Pool, rng: random.Random, hero: Thing, frames: list[Frame], order: tuple[int, ...]) -> Question:
    sentences = sentences_of(hero.name, frames)
    objects = (hero.name, *(thing for _, thing in frames))
    beats = tuple(((hero.name, *frame) if index == 0 else frame) for index, frame in enumerate(frames))
    family = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    if family == "story":
        return Question(pool.ask(rng, family), (" ".join(sentences),), objects, images=order, beats=beats)
    if family == "ending":
        asked = pool.ask(rng, family, x=" ".join(sentences[:2]))
        return Question(asked, (sentences[2],), objects, images=order, beats=beats[2:])
    index = rng.randrange(3)
    return Question(pool.ask(rng, family, x=ORDINALS[index]), (sentences[index],), objects, images=order, beats=beats[index : index + 1])
