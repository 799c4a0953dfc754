"""Families about countries: capital, continent, shared borders. Closed book: the answer is in no text that is shown."""

from __future__ import annotations

import random
import unicodedata
from itertools import combinations
from typing import Any

from llava_collab.cme.items import Item, Sources, balanced, split_of


def capital(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """The capital of a country; all capitals that it has are accepted, with and without accents."""
    rows = _of(sources, split)
    return [
        Item(tuple(_spelt(row["capital"])), (f"country:{_name(row)}",), slots={"country": _name(row)})
        for row in rng.sample(rows, len(rows))
    ]


def continent(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """The continent of a country, as the United Nations divide the world."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _of(sources, split):
        groups.setdefault(row["region"], []).append(row)
    choices = tuple(sorted({row["region"] for row in sources.countries}))
    slots = {"choices": ", ".join(choices)}
    return [
        Item((row["region"],), (f"country:{_name(row)}",), choices=choices, slots={**slots, "country": _name(row)})
        for row in balanced(rng, groups, even=False)
    ]


def border(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Do two countries share a land border, half yes, half no; both of one continent, and neither of them an island state."""
    pairs: dict[str, list[tuple[str, str]]] = {"yes": [], "no": []}
    for one, other in combinations((row for row in sources.countries if row["borders"]), 2):
        if one["region"] == other["region"] and split_of(_pair_key(_name(one), _name(other))) == split:
            pairs["yes" if other["cca3"] in one["borders"] else "no"].append((_name(one), _name(other)))
    answers = {pair: answer for answer, found in pairs.items() for pair in found}
    return [
        Item(
            (answers[pair],),
            (_pair_key(*pair),),
            choices=("yes", "no"),
            slots=dict(zip(("first", "second"), rng.sample(pair, 2), strict=True)),
        )
        for pair in balanced(rng, pairs, even=True)
    ]


def _of(sources: Sources, split: str) -> list[dict[str, Any]]:
    return [row for row in sources.countries if split_of(f"country|{_name(row)}") == split]


def _name(row: dict[str, Any]) -> str:
    return row["name"]["common"]


def _pair_key(one: str, other: str) -> str:
    return f"border:{one}|{other}"


def _spelt(names: list[str]) -> list[str]:
    plain = ["".join(mark for mark in unicodedata.normalize("NFKD", name) if not unicodedata.combining(mark)) for name in names]
    return list(dict.fromkeys((*names, *plain)))
