"""Spatial Inference: halves of the picture, relations of two things, sizes, and directions on real maps."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import numpy as np
from PIL import Image

from llava_collab.cmt import scenes
from llava_collab.cmt.items import SIZE, Group, Pool, Question
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.scenes import Placed, Scene
from llava_collab.cmt.sources import RegionMap, colour_codes

LEADS = {
    **{"side": 0.17, "relation": 0.17, "relation_yesno": 0.15, "neighbour": 0.13, "larger": 0.14},
    **{"map_direction": 0.13, "map_size": 0.11},
}
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 150, 40), "orange": (255, 150, 0)}
_AXES = {("left", "right"): ("to the left of", "to the right of"), ("top", "bottom"): ("above", "below")}


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """One scene or map for the leading question and the others that fit it."""
    lead = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    if lead.startswith("map"):
        return _map_group(pool, rng, count, lead)
    if lead == "side":
        scene = scenes.single(pool, rng, pool.things_apart(rng, 1)[0])
        axes = rng.sample([scenes.HORIZONTAL, scenes.VERTICAL], 2)
        sides = tuple(_side(pool, rng, scene, axes[index % 2]) for index in range(count))
        return Group((scene.image,), sides, (scene.truth,))
    pair = _pair(pool, rng)
    extras = [name for name in ("relation", "relation_yesno", "larger", "neighbour") if name != lead]
    rng.shuffle(extras)
    questions = tuple(_pair_question(pool, rng, pair, family) for family in [lead, *extras][:count])
    return Group((pair.image,), questions, (pair.truth,))


def _fill(placed: Placed) -> float:
    """Share of the square on the longest side that the box covers: 1 for a ball, 0.15 for a flute."""
    return placed.area / max(placed.box[2] - placed.box[0], placed.box[3] - placed.box[1]) ** 2


def _pair(pool: Pool, rng: random.Random) -> Scene:
    """A large and a small thing of similar shape. Either may be the large one, so a name alone does not tell which."""
    while True:
        scene = scenes.grid(pool, rng, pool.things_apart(rng, 2), large=rng.sample([True, False], 2))
        if 0.75 < _fill(scene.placed[0]) / _fill(scene.placed[1]) < 1 / 0.75:
            return scene


def _side(pool: Pool, rng: random.Random, scene: Scene, axis: tuple[str, str]) -> Question:
    placed = scene.placed[0]
    words = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    options = rng.sample(axis, 2)
    asked = pool.ask(rng, "side", a=words[options[0]], b=words[options[1]])
    answer = placed.column if axis == scenes.HORIZONTAL else placed.row
    return Question(asked, (answer, words[answer]), scene.names, choices=tuple(options))


def _pair_question(pool: Pool, rng: random.Random, scene: Scene, family: str) -> Question:
    first, second = rng.sample(scene.placed, 2)
    axes = [axis for axis, apart in zip(_AXES, (first.column != second.column, first.row != second.row), strict=True) if apart]
    axis = rng.choice(axes)
    half = first.column if axis == scenes.HORIZONTAL else first.row
    true, false = _AXES[axis] if half == axis[0] else _AXES[axis][::-1]  # what `first` is and is not, seen from `second`
    a, b = with_article(first.thing.name).split(" ", 1)[1], with_article(second.thing.name).split(" ", 1)[1]
    if family == "relation":
        options = rng.sample(_AXES[axis], 2)
        short = {"to the left of": "left", "to the right of": "right"}
        asked = pool.ask(rng, family, a=f"the {a}", x=" or ".join(options), b=f"the {b}")
        answer = short.get(true, true)
        return Question(asked, (answer, true), scene.names, choices=tuple(short.get(o, o) for o in options))
    if family == "relation_yesno":
        holds = rng.random() < 0.5
        asked = pool.ask(rng, family, a=f"the {a}", x=true if holds else false, b=f"the {b}")
        return Question(asked, ("yes" if holds else "no",), scene.names, choices=("yes", "no"))
    if family == "neighbour":
        asked = pool.ask(rng, family, x=false, a=f"the {a}")  # `second` is on the side where `first` is not
        return Question(asked, (b, with_article(b)), scene.names)
    word = rng.choice(("larger", "smaller"))
    answer = a if first.large == (word == "larger") else b
    asked = pool.ask(rng, "larger", x=word, a=f"the {a}", b=f"the {b}")
    return Question(asked, (answer, f"the {answer}"), scene.names, choices=(a, b))


@cache
def _labels(region_map: RegionMap) -> np.ndarray:
    """[H, W] uint8, at most 212 px long: 0 sea and frontiers, 1 tiny regions, 2 + i region i (nearest pixel, so colours stay exact)."""
    with Image.open(region_map.path) as opened:
        scale = (SIZE - 12) / max(opened.size)
        size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
        codes_HW = colour_codes(opened.convert("RGB").resize(size, Image.Resampling.NEAREST))
    labels_HW = np.isin(codes_HW, region_map.land).astype(np.uint8)
    for index, code in enumerate(region_map.regions):  # at most 166: each covers 0.6 % of the map
        labels_HW[codes_HW == code] = 2 + index
    return labels_HW


@cache
def _measures(region_map: RegionMap) -> tuple[tuple[float, float, int], ...]:
    """(x, y, pixels) of the centroid and area of every region, at the size it is drawn."""
    labels_HW = _labels(region_map)
    found = []
    for index in range(len(region_map.regions)):
        ys, xs = np.nonzero(labels_HW == 2 + index)
        found.append((float(xs.mean()), float(ys.mean()), len(xs)) if len(xs) else (0.0, 0.0, 0))
    return tuple(found)


@cache
def _pairs(region_map: RegionMap) -> dict[str, list[tuple[int, int]]]:
    """Family -> regions that differ clearly: by 25 px in a direction, or by twice the area."""
    measures = _measures(region_map)
    seen = [index for index, measure in enumerate(measures) if measure[2] >= 150]
    found: dict[str, list[tuple[int, int]]] = {"map_direction": [], "map_size": []}
    for pair in combinations(seen, 2):
        for family in {_asked_by(word) for word in _contrasts(measures[pair[0]], measures[pair[1]])}:
            found[family].append(pair)
    return found


def _asked_by(word: str) -> str:
    return "map_size" if word in ("larger", "smaller") else "map_direction"


def _contrasts(first: tuple[float, float, int], second: tuple[float, float, int]) -> list[str]:
    """Words that are true of `first` against `second`."""
    words = []
    if abs(first[0] - second[0]) >= 25:
        words.append("east" if first[0] > second[0] else "west")
    if abs(first[1] - second[1]) >= 25:
        words.append("south" if first[1] > second[1] else "north")
    if max(first[2], second[2]) >= 2 * min(first[2], second[2]):
        words.append("larger" if first[2] > second[2] else "smaller")
    return words


_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east", "larger": "smaller", "smaller": "larger"}


def _map_group(pool: Pool, rng: random.Random, count: int, lead: str) -> Group:
    """Two regions of a map that differ in what the leading question asks for; the others ask what else they differ in."""
    chosen, pairs = next(
        ((region_map, found) for region_map in rng.sample(pool.maps, len(pool.maps)) if (found := _pairs(region_map)[lead])), (None, ())
    )
    if chosen is None:
        raise ValueError(f"no map of split {pool.split!r} has two regions that differ clearly ({lead})")
    regions = rng.sample(rng.choice(pairs), 2)
    colours = rng.sample(sorted(COLOURS), 2)
    contrasts = _contrasts(*(_measures(chosen)[region] for region in regions))
    rng.shuffle(contrasts)
    contrasts.sort(key=lambda word: _asked_by(word) != lead)
    questions = []
    for index in range(count):
        true_of_first = contrasts[index % len(contrasts)]
        asks_first = rng.random() < 0.5
        word = true_of_first if asks_first else _OPPOSITE[true_of_first]
        family = _asked_by(word)
        options = rng.sample(colours, 2)
        asked = pool.ask(rng, family, x=word, a=options[0], b=options[1])
        answer = colours[0] if asks_first else colours[1]
        questions.append(Question(asked, (answer,), (f"map of {chosen.name}",), choices=tuple(options)))
    return Group(
        (_draw_map(rng, chosen, regions, colours),), tuple(questions), ({"map": chosen.name, "regions": _truth(chosen, regions, colours)},)
    )


def _truth(chosen: RegionMap, regions: list[int], colours: list[str]) -> dict[str, dict[str, float]]:
    """Colour -> centroid (pixels of the map, x to the east, y to the south) and area in pixels."""
    measured = [_measures(chosen)[region] for region in regions]
    return {
        colour: {"x": round(x, 1), "y": round(y, 1), "pixels": pixels} for colour, (x, y, pixels) in zip(colours, measured, strict=True)
    }


def _draw_map(rng: random.Random, chosen: RegionMap, regions: list[int], colours: list[str]) -> Image.Image:
    labels_HW = _labels(chosen)
    palette = np.full((256, 3), rng.randint(200, 238), np.uint8)  # all land in one light grey
    palette[0] = [rng.randint(150, 175), rng.randint(190, 210), rng.randint(215, 235)]
    for region, colour in zip(regions, colours, strict=True):
        palette[2 + region] = COLOURS[colour]
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(value) for value in palette[0]))
    left, top = rng.randint(0, SIZE - labels_HW.shape[1]), rng.randint(0, SIZE - labels_HW.shape[0])
    image.paste(Image.fromarray(palette[labels_HW]), (left, top))
    return image
