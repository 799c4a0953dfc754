"""The nine real sets (photos, charts, receipts, picture books), read by name from a folder that the user has.

The pack lies outside the repository: one folder a set, with `images/` and one JSONL a split. Its place is an argument or the
environment variable LLAVA_COLLAB_REAL_DATA. Licences differ: only four sets may be trained on by anybody for anything, the others
serve research and tests (`REAL_SETS[name].training`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llava_collab.data.samples import Sample, read_samples

ROOT_VARIABLE = "LLAVA_COLLAB_REAL_DATA"


@dataclass(frozen=True)
class RealSet:
    """One set: categories of CMT that it serves, items a split, licence, and whether that licence lets everybody train on it."""

    name: str
    categories: tuple[str, ...]
    items: Mapping[str, int]
    licence: str
    training: bool


def _set(name: str, categories: str, train: int, val: int, test: int, licence: str, training: bool = False) -> RealSet:
    items = {split: n for split, n in (("train", train), ("val", val), ("test", test)) if n}
    return RealSet(name, tuple(categories.split(", ")), items, licence, training)


REAL_SETS: dict[str, RealSet] = {
    real.name: real
    for real in (
        _set("flickr8k_photos", "Visual Captioning", 1380, 60, 120, "Flickr8k terms: non-commercial research and education"),
        _set("imagenet_objects", "Visual QA", 1560, 180, 360, "ImageNet terms of access: non-commercial research and education"),
        _set("easy_vqa", "Visual QA", 1173, 100, 200, "MIT", training=True),
        _set("mathvision", "Spatial Inference, Visual QA", 0, 0, 120, "MIT (a benchmark: test only)"),
        _set("nlvr", "Spatial Inference", 2553, 134, 347, "CC BY 4.0", training=True),
        _set("bird_book", "Detailed Description", 181, 15, 30, "public domain in the USA (Project Gutenberg)", training=True),
        _set(
            "opencqa_charts", "Text-Rich Images QA, Detailed Description", 1175, 188, 391,
            "GPL-3.0 repository; charts by Pew Research Center, research use",
        ),
        _set("african_storybooks", "Visual Storytelling", 554, 56, 116, "CC BY", training=True),
        _set(
            "sroie_receipts", "Knowledge OCR, Text-Rich Images QA", 1096, 200, 349,
            "MIT repository; scans of the ICDAR 2019 SROIE competition, research use",
        ),
    )
}  # fmt: skip


def training_sets() -> list[str]:
    """Names of the sets whose licences (MIT, CC BY, public domain) let everybody train and share the result."""
    return [name for name, real in REAL_SETS.items() if real.training]


def real_root(root: Path | str | None = None) -> Path:
    """The pack's folder: the argument, else the environment variable. Raises `FileNotFoundError` that says what to set."""
    place = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not place:
        raise FileNotFoundError(f"where are the real sets? Pass root= or set {ROOT_VARIABLE} to the folder of {', '.join(REAL_SETS)}")
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; {ROOT_VARIABLE} (or root=) has to name the one that holds {', '.join(REAL_SETS)}")
    return folder


def real_file(name: str, split: str, root: Path | str | None = None) -> Path:
    """The JSONL file of a split. Raises `ValueError` for an unknown set or split, `FileNotFoundError` where the file isn't there."""
    if name not in REAL_SETS:
        raise ValueError(f"no real set {name!r}; there are {', '.join(REAL_SETS)}")
    if split not in REAL_SETS[name].items:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(REAL_SETS[name].items)}")
    file = real_root(root) / name / f"{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; is {file.parent.parent} the folder of the real sets, and complete?")
    return file


def read_real(name: str, split: str, root: Path | str | None = None) -> list[Sample]:
    """The samples of one split. Where a line has no family, it is the set's name, so that results can be told apart.

    Raises as `real_file` and `read_samples` do.
    """
    return [replace(sample, family=sample.family or name) for sample in read_samples(real_file(name, split, root))]
