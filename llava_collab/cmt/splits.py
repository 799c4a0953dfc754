"""Who may see what: every decision that keeps the splits of CMT-open apart, as pure functions of names.

Nothing here looks at files or sizes, so growing the set, or changing the number of workers, can never move an object, a background
or an item from one split to another.
"""

from __future__ import annotations

import random
from typing import Final

from llava_collab.data.chance import rng_of, unit_interval

SPLITS: Final[tuple[str, ...]] = ("train", "val", "test", "decision", "test-object", "test-template")

UNSEEN_OBJECT_SHARE: Final = 0.2
TEST_BACKGROUND_SHARE: Final = 0.35
# Salts are chosen so that each group of things, and the tables, have unseen members, and so that every place of the stories
# (forest, sea, ...) has a background on both sides.
_KNOWN_SALT: Final = "known-221"
_BACKGROUND_SALT: Final = "background-12"


def is_known(kind: str, name: str) -> bool:
    """True if the thing may occur in training; `kind` ("object", "country", ...) keeps equal names of two kinds independent."""
    return unit_interval(f"{_KNOWN_SALT}|{kind}|{name}") >= UNSEEN_OBJECT_SHARE


def is_train_background(name: str) -> bool:
    """True if the background photograph belongs to train and val, False if it belongs to the four test splits."""
    return unit_interval(f"{_BACKGROUND_SALT}|{name}") >= TEST_BACKGROUND_SHARE


def check_split(split: str) -> None:
    """Raise ValueError for a name that is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")


def uses_known_things(split: str) -> bool:
    """Only `test-object` draws from the things that training never shows."""
    check_split(split)
    return split != "test-object"


def uses_train_backgrounds(split: str) -> bool:
    """`val` looks like train (it picks checkpoints); all test splits have photographs that training never shows."""
    check_split(split)
    return split in ("train", "val")


def uses_held_out_phrases(split: str) -> bool:
    """Only `test-template` words its questions in ways that training never shows."""
    check_split(split)
    return split == "test-template"


def group_rng(category: str, split: str, group: int) -> random.Random:
    """The only source of chance for a group of items that share their pictures (a group is one item outside of train)."""
    check_split(split)
    return rng_of(f"cmt-open|{category}|{split}|{group}")
