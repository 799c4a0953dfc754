"""How questions are worded: a book (`phrases.yaml` for CMT-open) holds, per family, the usual wordings and those held out for tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Asked:
    """A worded question: its family, template ("exists/0" or, held out, "exists/h0"), text, and what stands in the template's slots."""

    family: str
    template: str
    prompt: str
    slots: dict[str, str] = field(default_factory=dict)


BOOK = Path(__file__).with_suffix(".yaml")


@cache
def phrases(book: Path = BOOK) -> dict[str, dict[str, list[str]]]:
    """Family -> {"known": wordings, "held_out": wordings}."""
    return yaml.safe_load(book.read_text(encoding="utf-8"))


def phrase(family: str, held_out: bool, rng: random.Random, book: Path = BOOK, /, **slots: str) -> Asked:
    """The question in a random wording of the book, with a capital at its start."""
    options = phrases(book)[family]["held_out" if held_out else "known"]
    index = rng.randrange(len(options))
    worded = options[index].format(**slots)
    return Asked(family, f"{family}/{'h' if held_out else ''}{index}", worded[0].upper() + worded[1:], slots)


def with_article(name: str) -> str:
    """ "camel" -> "a camel", "owl" -> "an owl"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
