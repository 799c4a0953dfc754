"""Detailed Description: inventories of composed scenes, and photographs with an expert's text (laboratory tools, monuments, animals)."""

from __future__ import annotations

import io
import random

from PIL import Image

from llava_collab.cmt import scenes, splits
from llava_collab.cmt.items import SIZE, Group, Pool, Question
from llava_collab.cmt.photos import key_words, view
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.scenes import Placed

_WEIGHTS = {"inventory": 0.45, "inventory_part": 0.15, "fact": 0.3, "photo_name": 0.1}
_NUMBERS = {2: "two", 3: "three", 4: "four"}


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """Train asks for the whole and for a part (or the name) of the same picture; elsewhere one question."""
    lead = rng.choices(tuple(_WEIGHTS), weights=tuple(_WEIGHTS.values()))[0]
    if lead.startswith("inventory"):
        return _inventory(pool, rng, [lead, "inventory_part" if lead == "inventory" else "inventory"][:count])
    return _photo(pool, rng, [lead, "photo_name" if lead == "fact" else "fact"][:count])


def _sized(placed: Placed) -> str:
    return f"{'large' if placed.large else 'small'} {placed.thing.name}"


def _inventory(pool: Pool, rng: random.Random, families: list[str]) -> Group:
    scene = scenes.grid(pool, rng, pool.things_apart(rng, rng.choice((2, 2, 3, 4))))
    placed = sorted(scene.placed, key=lambda one: (one.row != "top", one.column != "left"))  # reading order
    questions = []
    for family in families:
        if family == "inventory":
            sentences = [f"There are {_NUMBERS[len(placed)]} objects."]
            sentences += [f"A {_sized(one)} is at the {one.corner}." for one in placed]
            checklist = [part for one in placed for part in (one.thing.name, f"{_sized(one)} is at the {one.corner}")]
            template, prompt = pool.ask(rng, family)
            answer = " ".join(sentences)
        else:
            target = rng.choice(placed)
            template, prompt = pool.ask(rng, family, x=target.corner)
            answer, checklist = f"A {_sized(target)}.", [target.thing.name, _sized(target)]
        questions.append(Question(family, template, prompt, (answer,), scene.names, checklist=tuple(checklist)))
    return Group((scene.image,), tuple(questions))


def _photo(pool: Pool, rng: random.Random, families: list[str]) -> Group:
    photo = rng.choice(pool.photos)
    with Image.open(io.BytesIO(photo.data)) as opened:
        rgba = opened.convert("RGBA")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, (0, 0), rgba)
    image = view(flat, rng, SIZE, train=splits.uses_train_backgrounds(pool.split))
    questions = []
    for family in families:
        template, prompt = pool.ask(rng, family)
        if family == "fact":
            questions.append(Question(family, template, prompt, (photo.text,), (photo.name,), checklist=key_words(photo.name, photo.text)))
        else:
            answers = (photo.name, with_article(photo.name.lower()))
            questions.append(Question(family, template, prompt, answers, (photo.name,), checklist=(photo.name.lower(),)))
    return Group((image,), tuple(questions))
