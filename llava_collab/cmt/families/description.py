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
_CORNERS = tuple(f"{row} {column}" for row in scenes.VERTICAL for column in scenes.HORIZONTAL)
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
            asked = pool.ask(rng, family)
            count, relation = f"{_NUMBERS[len(placed)]} objects", _relation(placed[0], placed[-1])
            places = [f"{_sized(one)} is at the {one.corner}" for one in placed]
            answer = " ".join([f"There are {count}.", *(f"A {place}." for place in places), f"The {relation}."])
            checklist = {
                "objects": scene.names,
                "attributes": tuple(_sized(one) for one in placed),
                "relations": (*(f"{one.thing.name} is at the {one.corner}" for one in placed), relation),
                "counts": (count,),
                "false": (
                    *(f"{number} objects" for number in _NUMBERS.values() if number != _NUMBERS[len(placed)]),
                    *(f"{'small' if one.large else 'large'} {one.thing.name}" for one in placed),
                    *(f"{one.thing.name} is at the {corner}" for one in placed for corner in _CORNERS if corner != one.corner),
                ),
            }
        else:
            target = rng.choice(placed)
            asked = pool.ask(rng, family, x=target.corner)
            answer, checklist = (
                f"A {_sized(target)}.",
                {
                    "objects": (target.thing.name,),
                    "attributes": (_sized(target),),
                    "false": (f"{'small' if target.large else 'large'} {target.thing.name}",),
                },
            )
        questions.append(Question(asked, (answer,), scene.names, checklist=checklist))
    return Group((scene.image,), tuple(questions), (scene.truth,))


def _relation(first: Placed, second: Placed) -> str:
    """Of two things in reading order: "camel is above the drum", or "to the left of" where they stand in one row."""
    return f"{first.thing.name} is {'above' if first.row != second.row else 'to the left of'} the {second.thing.name}"


def _photo(pool: Pool, rng: random.Random, families: list[str]) -> Group:
    photo = rng.choice(pool.photos)
    with Image.open(io.BytesIO(photo.data)) as opened:
        rgba = opened.convert("RGBA")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, (0, 0), rgba)
    image = view(flat, rng, SIZE, train=splits.uses_train_backgrounds(pool.split))
    questions = []
    for family in families:
        asked = pool.ask(rng, family)
        if family == "fact":
            name, *words = key_words(photo.name, photo.text)
            questions.append(
                Question(asked, (f"{photo.name}. {photo.text}",), (photo.name,), checklist={"objects": (name,), "facts": tuple(words)})
            )
        else:
            answers = (photo.name, with_article(photo.name.lower()))
            questions.append(Question(asked, answers, (photo.name,), checklist={"objects": (photo.name.lower(),)}))
    return Group((image,), tuple(questions), ({"photo": photo.name, "text": photo.text},))
