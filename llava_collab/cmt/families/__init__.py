"""The seven categories: each module says how often its families lead a group and makes a `Group` from a `Pool` and a random source."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from llava_collab.cmt.families import captioning, description, ocr, spatial, storytelling, text_rich, visual_qa
from llava_collab.cmt.items import Group, Pool

Make = Callable[[Pool, random.Random, int], Group]


@dataclass(frozen=True)
class Category:
    """`make(pool, rng, count)` gives `count` questions; train asks `per_group` of them about the same pictures, other splits one."""

    name: str
    slug: str
    per_group: int
    make: Make


_ALL = (
    Category("Visual QA", "vqa", 3, visual_qa.make),
    Category("Visual Captioning", "caption", 4, captioning.make),
    Category("Spatial Inference", "spatial", 3, spatial.make),
    Category("Detailed Description", "detail", 2, description.make),
    Category("Visual Storytelling", "story", 8, storytelling.make),
    Category("Knowledge OCR", "ocr", 3, ocr.make),
    Category("Text-Rich Images QA", "text", 3, text_rich.make),
)
BY_NAME: dict[str, Category] = {category.name: category for category in _ALL}
CATEGORIES: tuple[str, ...] = tuple(BY_NAME)
