"""Composed scenes: photo cutouts on a photo background, with every name, place and size known exactly.

Coordinates are pixels of the 224 x 224 picture, x to the right and y downwards. Objects stand in different cells of a 2 x 2 grid, so
they never overlap and "left of" or "above" is true of whole objects, not only of their centres.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_collab.cmt import draw
from llava_collab.cmt.items import SIZE, Pool
from llava_collab.cmt.sources import Background, Thing

_CELL = SIZE // 2
LARGE, SMALL = (94.0, 108.0), (52.0, 62.0)  # longest side in pixels
HORIZONTAL, VERTICAL = ("left", "right"), ("top", "bottom")


@dataclass(frozen=True)
class Placed:
    """A thing drawn into the box (x0, y0, x1, y1); `large` is what a description calls it."""

    thing: Thing
    box: tuple[int, int, int, int]
    large: bool

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        """Square pixels of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def column(self) -> str:
        """ "left" or "right" half."""
        return HORIZONTAL[self.centre[0] >= SIZE / 2]

    @property
    def row(self) -> str:
        """ "top" or "bottom" half."""
        return VERTICAL[self.centre[1] >= SIZE / 2]

    @property
    def corner(self) -> str:
        """ "top left" and so on."""
        return f"{self.row} {self.column}"


@dataclass(frozen=True)
class Scene:
    """A picture and what was drawn into it."""

    image: Image.Image
    placed: tuple[Placed, ...]
    place: str

    @property
    def truth(self) -> dict[str, Any]:
        """What was drawn, as JSON values: boxes are (x0, y0, x1, y1) in pixels."""
        return {"place": self.place, "objects": [{"name": one.thing.name, "box": list(one.box), "large": one.large} for one in self.placed]}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the things, in drawing order."""
        return tuple(placed.thing.name for placed in self.placed)

    @property
    def senses(self) -> frozenset[str]:
        """What a further, absent thing must not be taken for."""
        return frozenset(placed.thing.sense for placed in self.placed)


def paste(
    image: Image.Image, rng: random.Random, thing: Thing, centre: tuple[float, float], longest: float, *, large: bool = True
) -> Placed:
    """Draw one of the thing's cutouts, maybe mirrored, with its longest side at `longest` px, inside of the picture."""
    cutout = draw.cutout(rng.choice(thing.paths))
    scale = longest / max(cutout.size)
    size = (max(4, round(cutout.width * scale)), max(4, round(cutout.height * scale)))
    cutout = cutout.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x = min(max(0, round(centre[0] - size[0] / 2)), SIZE - size[0])
    y = min(max(0, round(centre[1] - size[1] / 2)), SIZE - size[1])
    draw.paste_visibly(image, cutout, (x, y))
    return Placed(thing, (x, y, x + size[0], y + size[1]), large)


def single(pool: Pool, rng: random.Random, thing: Thing, chosen: Background | None = None) -> Scene:
    """One thing, 80-140 px long, clearly in one corner of the picture's four."""
    ground = chosen or rng.choice(pool.backgrounds)
    image = draw.background(rng, ground)
    longest = rng.uniform(80, 140)
    low, high = SIZE * 0.12, SIZE * 0.34
    centre = tuple(value if rng.random() < 0.5 else SIZE - value for value in (rng.uniform(low, high), rng.uniform(low, high)))
    return Scene(image, (paste(image, rng, thing, (centre[0], centre[1]), longest),), ground.place)


def grid(pool: Pool, rng: random.Random, things: list[Thing], large: list[bool] | None = None, chosen: Background | None = None) -> Scene:
    """Up to four things in different cells; `large` says which of them are about twice as long as the others (default: any)."""
    ground = chosen or rng.choice(pool.backgrounds)
    image = draw.background(rng, ground)
    placed = []
    for index, (thing, cell) in enumerate(zip(things, rng.sample(range(4), len(things)), strict=True)):
        is_large = large[index] if large else rng.random() < 0.5
        longest = rng.uniform(*(LARGE if is_large else SMALL))
        middle = (_CELL * (cell % 2 + 0.5), _CELL * (cell // 2 + 0.5))
        slack = (_CELL - longest) / 2 - 1
        centre = (middle[0] + rng.uniform(-slack, slack), middle[1] + rng.uniform(-slack, slack))
        placed.append(paste(image, rng, thing, centre, longest, large=is_large))
    return Scene(image, tuple(placed), ground.place)
