"""Contact sheets: items of CMT-open with their question and answer, for looking at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(items: Sequence[dict[str, Any]], out_png: Path, root: Path, *, columns: int = 6) -> Path:
    """Draw JSONL rows whose images lie below `root` as one PNG; the images of a row of several share its cell."""
    cell, lines = 232, 5
    font = ImageFont.load_default(13)
    height = cell + 15 * lines
    page = Image.new("RGB", (columns * cell, -(-len(items) // columns) * height), "white")
    pen = ImageDraw.Draw(page)
    for index, item in enumerate(items):
        x, y = index % columns * cell, index // columns * height
        across = 1 if len(item["image"]) == 1 else 2
        side = (cell - 8) // across
        for number, file in enumerate(item["image"]):
            with Image.open(root / file) as opened:
                page.paste(opened.convert("RGB").resize((side, side)), (x + 2 + number % across * side, y + 2 + number // across * side))
        question, answer = (turn["value"].replace("<image>\n", "") for turn in item["conversations"])
        text = textwrap.wrap(f"Q: {question}", 34)[:3] + textwrap.wrap(f"A: {answer}", 34)
        pen.multiline_text((x + 3, y + cell), "\n".join(text[:lines]), font=font, fill="black", spacing=1)
    page.save(out_png)
    return Path(out_png)
