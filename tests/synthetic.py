"""A training set made on the spot: small pictures of one coloured shape each, with questions about them, the same for the same seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("square", "circle")


def draw_shape(path: Path, colour: str, shape: str, corner: tuple[int, int], size: int = 12) -> None:
    """A 32 x 32 PNG with one shape on grey."""
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    box = (*corner, corner[0] + size, corner[1] + size)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=COLOURS[colour])
    image.save(path)


def write_shapes(folder: Path, count: int = 32, seed: int = 0) -> Path:
    """Write `count` samples as `folder/shapes.jsonl` with PNGs beside it; every eighth sample has no image, every fifth two turns."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        row: dict[str, Any] = {"id": f"shape-{number}"}
        if number % 8 == 7:
            row["conversations"] = _turn(f"Spell {colour}.", " ".join(colour))
        else:
            row["image"] = f"{number}.png"
            draw_shape(folder / row["image"], colour, shape, (rng.randrange(18), rng.randrange(18)))
            row["conversations"] = _turn("<image>\nWhat is in the picture?", f"a {colour} {shape}")
            if number % 5 == 4:
                row["conversations"] += _turn("Which colour?", colour)
        rows.append(row)
    path = folder / "shapes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
