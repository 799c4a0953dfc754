"""A photograph with an expert's text (Kalzium, GCompris), and the views of it that the splits may show.

There are only about a hundred such photographs, so they are split by *view*, not by fact: train sees wide crops, the test splits see
closer crops of other places. A model may therefore know the fact from train; what is new in the test is the picture. The facts of
unseen photographs are in `test-object` only.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from PIL import Image, ImageEnhance

_STOP = frozenset(
    "about after another because before being could itself other should their there these those through usually where which while".split()
)


@dataclass(frozen=True)
class Photo:
    """One photograph: a stable key, what it shows, one or two sentences about it, and the encoded file."""

    key: str
    name: str
    text: str
    data: bytes


def first_words(text: str, limit: int = 40) -> str:
    """The first sentences of `text` that stay within `limit` words (at least one, cut hard if it alone is longer)."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))
    kept = sentences[0].split()
    if len(kept) > limit:
        return " ".join(kept[:limit]).rstrip(",;:") + " ..."
    for sentence in sentences[1:]:
        if len(kept) + len(sentence.split()) > limit:
            break
        kept += sentence.split()
    return " ".join(kept)


def key_words(name: str, text: str, count: int = 6) -> tuple[str, ...]:
    """The checklist of a fact: its name and the first long words of its text, lower case, in order and without repeats."""
    words = [
        word for word in re.findall(r"\w+(?:['-]\w+)*", text.lower()) if len(word) > 4 and word not in _STOP and word not in name.lower()
    ]
    return (name.lower(), *list(dict.fromkeys(words))[:count])


def view(image: Image.Image, rng: random.Random, size: int, *, train: bool) -> Image.Image:
    """A crop in the photograph's own proportions on a plain square: 88-100 % of each side (train, val) or 72-85 % (tests)."""
    share = rng.uniform(0.88, 1.0) if train else rng.uniform(0.72, 0.85)
    width, height = share * image.width, share * image.height
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    scale = size / max(width, height)
    drawn = (max(1, round(width * scale)), max(1, round(height * scale)))
    cropped = image.resize(drawn, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height), reducing_gap=2.0)
    grey = rng.randint(90, 240)
    page = Image.new("RGB", (size, size), (grey, grey, grey))
    page.paste(ImageEnhance.Brightness(cropped).enhance(rng.uniform(0.8, 1.2)), ((size - drawn[0]) // 2, (size - drawn[1]) // 2))
    return page
