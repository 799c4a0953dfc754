"""Visual Captioning: one thing, two things, or the thing on one side of the picture."""

from __future__ import annotations

import random

from llava_collab.cmt import scenes
from llava_collab.cmt.items import Group, Pool, Question
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.scenes import Scene

_WEIGHTS = {"caption_one": 0.45, "caption_two": 0.35, "caption_part": 0.2}
_TRAIN = ("caption_one", "caption_two", "caption_part", "caption_part")


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """Train asks for four captions of two pictures (the two parts are those of both sides); elsewhere one caption of one picture."""
    families = _TRAIN[:count] if count > 1 else tuple(rng.choices(tuple(_WEIGHTS), weights=tuple(_WEIGHTS.values())))
    sides = rng.sample((0, 1), 2)
    images, truths, questions = [], [], []
    pair: Scene | None = None
    for family in families:
        if family == "caption_one":
            scene = scenes.single(pool, rng, pool.things_apart(rng, 1)[0])
            images.append(scene.image)
            truths.append(scene.truth)
        elif pair is None:
            scene = pair = _pair(pool, rng)
            images.append(scene.image)
            truths.append(scene.truth)
        else:
            scene = pair
        questions.append(_question(pool, rng, scene, family, len(images) - 1, sides[len(questions) % 2]))
    return Group(tuple(images), tuple(questions), tuple(truths))


def _pair(pool: Pool, rng: random.Random) -> Scene:
    """Two things of equal size, the first in the left half, the second in the right half."""
    size = rng.random() < 0.7
    scene = scenes.grid(pool, rng, pool.things_apart(rng, 2), large=[size, size])
    while scene.placed[0].column == scene.placed[1].column:
        scene = scenes.grid(pool, rng, [placed.thing for placed in scene.placed], large=[size, size])
    return Scene(scene.image, tuple(sorted(scene.placed, key=lambda placed: placed.centre[0])))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _question(pool: Pool, rng: random.Random, scene: Scene, family: str, image: int, side: int) -> Question:
    articled = [with_article(name) for name in scene.names]
    if family == "caption_part":
        target = scene.placed[side]
        asked = pool.ask(rng, family, x=f"on the {target.column}")
        return Question(asked, (_sentence(with_article(target.thing.name)),), scene.names, images=(image,))
    answers = [_sentence(articled[0])]
    if family == "caption_two":
        left, right = articled
        answers = [_sentence(f"{left} and {right}"), _sentence(f"{right} and {left}"), _sentence(f"{left} next to {right}")]
    return Question(pool.ask(rng, family), tuple(answers), scene.names, images=(image,))
