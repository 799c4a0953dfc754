"""Visual Captioning: one thing and where it is, two things, or the thing on one side of the picture beside the other."""

from __future__ import annotations

import random

from llava_collab.cmt import scenes
from llava_collab.cmt.items import Group, Pool, Question
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.scenes import Scene
from llava_collab.cmt.sources import Background

LEADS = {"caption_one": 0.45, "caption_two": 0.35, "caption_part": 0.2}
_TRAIN = ("caption_one", "caption_two", "caption_part", "caption_part")
_PLACES = {"forest": "in the forest", "sea": "at the sea", "rocks": "on the rocks"}
_PLACES |= {"mountains": "in the mountains", "grass": "on the grass", "sky": "in the sky"}


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """Train asks for four captions of two pictures (the two parts are those of both sides); elsewhere one caption of one picture."""
    families = _TRAIN[:count] if count > 1 else tuple(rng.choices(tuple(LEADS), weights=tuple(LEADS.values())))
    sides = rng.sample((0, 1), 2)
    drawn: list[Scene] = []
    questions = []
    pair: Scene | None = None
    for family in families:
        if family == "caption_one":
            drawn.append(scene := scenes.single(pool, rng, pool.things_apart(rng, 1)[0], _ground(pool, rng)))
        elif pair is None:
            drawn.append(scene := (pair := _pair(pool, rng)))
        else:
            scene = pair
        questions.append(_question(pool, rng, scene, family, len(drawn) - 1, sides[len(questions) % 2]))
    return Group(tuple(scene.image for scene in drawn), tuple(questions), tuple(scene.truth for scene in drawn))


def _ground(pool: Pool, rng: random.Random) -> Background:
    """A background that has a word for itself, all such words alike."""
    place = rng.choice(sorted({background.place for background in pool.backgrounds} & set(_PLACES)))
    return rng.choice([background for background in pool.backgrounds if background.place == place])


def _pair(pool: Pool, rng: random.Random) -> Scene:
    """Two things of equal size, the first in the left half, the second in the right half."""
    size = rng.random() < 0.7
    things, ground = pool.things_apart(rng, 2), _ground(pool, rng)
    while True:
        scene = scenes.grid(pool, rng, things, large=[size, size], chosen=ground)
        left, right = sorted(scene.placed, key=lambda placed: placed.centre[0])
        if left.column != right.column:
            return Scene(scene.image, (left, right), scene.place)


def _question(pool: Pool, rng: random.Random, scene: Scene, family: str, image: int, side: int) -> Question:
    """One reference of five words or more, the left thing first: CIDEr-D counts up to four words in a row, and averages over references."""
    articled = [with_article(name) for name in scene.names]
    if family == "caption_part":
        asked = pool.ask(rng, family, x=f"on the {scene.placed[side].column}")
        text = f"{articled[side]} beside {articled[1 - side]}"
    else:
        asked = pool.ask(rng, family)
        text = f"{' and '.join(articled)} {_PLACES[scene.place]}"
    return Question(asked, (f"{text[0].upper()}{text[1:]}.",), scene.names, images=(image,))
