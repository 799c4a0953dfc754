"""Answers from the truth of the pictures: rules that know what was drawn, and nothing of how the questions were made.

`solve` gets a question's family and slots and what is known of each picture (`truth` of the items; or what an OCR engine read of it).
It shares no code with the families, so that slots and truth that don't lead to the stored answer are found out. It does not read the
wording: whether a sentence asks what its slots mean is for people to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava_collab.cmt.catalogue import stamps

Truth = Mapping[str, Any]
Slots = Mapping[str, str]

_GROUPS = {name: group for group, name in stamps().values()}
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_ORDINALS = ("first", "second", "third", "fourth")
_MIDDLE = 112  # pixels: half of a picture


class Unsolved(ValueError):
    """What is known of the pictures doesn't say the answer."""


def solve(family: str, slots: Slots, truths: Sequence[Truth]) -> str:
    """The answer. Raises Unsolved where the truth lacks what it needs, KeyError for an unknown family."""
    try:
        return _RULES[family](slots, truths)
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        if family not in _RULES:
            raise
        raise Unsolved(f"{family}: {type(error).__name__} {error}") from error


def _bare(text: str) -> str:
    """ "a camel", "the camel" -> "camel"."""
    return text.split(" ", 1)[1] if text.split(" ", 1)[0] in ("a", "an", "the") else text


def _article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _objects(truths: Sequence[Truth]) -> list[Truth]:
    return list(truths[0]["objects"])


def _centre(one: Truth) -> tuple[float, float]:
    x0, y0, x1, y1 = one["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


def _corner(one: Truth) -> str:
    x, y = _centre(one)
    return f"{'top' if y < _MIDDLE else 'bottom'} {'left' if x < _MIDDLE else 'right'}"


def _find(name: str, truths: Sequence[Truth]) -> Truth:
    return next(one for one in _objects(truths) if one["name"] == _bare(name))


def _at(place: str, truths: Sequence[Truth]) -> Truth:
    """The object in a half or corner, of which there is only one."""
    (found,) = [one for one in _objects(truths) if all(word in _corner(one) for word in place.split() if word not in ("on", "at", "the"))]
    return found


def _holds(first: Truth, relation: str, second: Truth) -> bool:
    (x, y), (u, v) = _centre(first), _centre(second)
    return {"to the left of": x < u, "to the right of": x > u, "above": y < v, "below": y > v}[relation]


def _which(slots: Slots, truths: Sequence[Truth]) -> str:
    (found,) = {_bare(slots[key]) for key in ("a", "b")} & {one["name"] for one in _objects(truths)}
    return found


def _kind(slots: Slots, truths: Sequence[Truth]) -> str:
    return _GROUPS[_objects(truths)[0]["name"]]


def _caption(slots: Slots, truths: Sequence[Truth]) -> str:
    names = [_article(one["name"]) for one in sorted(_objects(truths), key=_centre)]
    preposition = {"sea": "at", "rocks": "on", "grass": "on"}.get(truths[0]["place"], "in")
    return f"{' and '.join(names).capitalize()} {preposition} the {truths[0]['place']}."


def _caption_part(slots: Slots, truths: Sequence[Truth]) -> str:
    target = _at(slots["x"], truths)
    (other,) = [one for one in _objects(truths) if one is not target]
    return f"{_article(target['name']).capitalize()} beside {_article(other['name'])}."


def _side(slots: Slots, truths: Sequence[Truth]) -> str:
    words = _corner(_objects(truths)[0]).split()
    return next(slots[key] for key in ("a", "b") if slots[key].split()[-1] in words)


def _relation(slots: Slots, truths: Sequence[Truth]) -> str:
    first, second = _find(slots["a"], truths), _find(slots["b"], truths)
    (found,) = [relation for relation in slots["x"].split(" or ") if _holds(first, relation, second)]
    return found


def _relation_yesno(slots: Slots, truths: Sequence[Truth]) -> str:
    return "yes" if _holds(_find(slots["a"], truths), slots["x"], _find(slots["b"], truths)) else "no"


def _neighbour(slots: Slots, truths: Sequence[Truth]) -> str:
    known = _find(slots["a"], truths)
    (found,) = [one["name"] for one in _objects(truths) if one is not known and _holds(one, slots["x"], known)]
    return found


def _larger(slots: Slots, truths: Sequence[Truth]) -> str:
    def area(name: str) -> int:
        x0, y0, x1, y1 = _find(name, truths)["box"]
        return (x1 - x0) * (y1 - y0)

    return _bare((max if slots["x"] == "larger" else min)((slots["a"], slots["b"]), key=area))


def _map(slots: Slots, truths: Sequence[Truth]) -> str:
    axis, sign = {
        "north": ("y", -1),
        "south": ("y", 1),
        "east": ("x", 1),
        "west": ("x", -1),
        "larger": ("pixels", 1),
        "smaller": ("pixels", -1),
    }[slots["x"]]
    return max((slots["a"], slots["b"]), key=lambda colour: sign * truths[0]["regions"][colour][axis])


def _sized(one: Truth) -> str:
    return f"{'large' if one['large'] else 'small'} {one['name']}"


def _inventory(slots: Slots, truths: Sequence[Truth]) -> str:
    found = sorted(_objects(truths), key=lambda one: (_corner(one).split()[0] != "top", "left" not in _corner(one)))
    first, last = found[0], found[-1]
    relation = "above" if _corner(first).split()[0] != _corner(last).split()[0] else "to the left of"
    places = " ".join(f"A {_sized(one)} is at the {_corner(one)}." for one in found)
    return f"There are {_NUMBERS[len(found)]} objects. {places} The {first['name']} is {relation} the {last['name']}."


def _tell(truths: Sequence[Truth], index: int) -> str:
    frame = truths[index]
    subject = _article(frame["hero"]).capitalize() if index == 0 else "It"
    verb = ("started at the {} and met", "then came to the {} and saw", "at last reached the {} and found")[index]
    return f"{subject} {verb.format(frame['place'])} {_article(frame['met'])}."


def _top(slots: Slots, truths: Sequence[Truth]) -> str:
    best = max if slots["x"] in ("largest", "most") else min
    return best(truths[0]["rows"], key=lambda row: row[1])[0]


def _bar(place: str, truths: Sequence[Truth]) -> Sequence[Any]:
    return truths[0]["rows"][-1 if place == "last" else _ORDINALS.index(place)]


def _cents(value: int) -> str:
    return f"{value // 100}.{value % 100:02d}"


_RULES: dict[str, Callable[[Slots, Sequence[Truth]], str]] = {
    "exists": lambda s, t: "yes" if _bare(s["a"]) in {one["name"] for one in _objects(t)} else "no",
    "which": _which,
    "count": lambda s, t: str(len(_objects(t))),
    "kind": _kind,
    "name": lambda s, t: _objects(t)[0]["name"],
    "caption_one": _caption,
    "caption_two": _caption,
    "caption_part": _caption_part,
    "side": _side,
    "relation": _relation,
    "relation_yesno": _relation_yesno,
    "neighbour": _neighbour,
    "larger": _larger,
    "map_direction": _map,
    "map_size": _map,
    "inventory": _inventory,
    "inventory_part": lambda s, t: f"A {_sized(_at(s['x'], t))}.",
    "fact": lambda s, t: f"{t[0]['photo']}. {t[0]['text']}",
    "photo_name": lambda s, t: t[0]["photo"],
    "story": lambda s, t: " ".join(_tell(t, index) for index in range(len(t))),
    "ending": lambda s, t: _tell(t, 2),
    "frame": lambda s, t: _tell(t, _ORDINALS.index(s["x"])),
    "card_read": lambda s, t: t[0]["country"],
    "card_flag": lambda s, t: t[0]["country"],
    "capital": lambda s, t: t[0]["capital"],
    "continent": lambda s, t: t[0]["region"],
    "element_name": lambda s, t: t[0]["name"],
    "element_number": lambda s, t: str(t[0]["number"]),
    "element_symbol": lambda s, t: t[0]["symbol"],
    "sign": lambda s, t: t[0]["word"],
    "chart_top": _top,
    "chart_value": lambda s, t: str(_bar(s["x"], t)[1]),
    "chart_compare": lambda s, t: "yes" if _bar(s["a"], t)[1] > _bar(s["b"], t)[1] else "no",
    "chart_count": lambda s, t: str(len(t[0]["rows"])),
    "receipt_price": lambda s, t: _cents(next(price for good, price in t[0]["rows"] if good == s["x"])),
    "receipt_total": lambda s, t: _cents(sum(price for _, price in t[0]["rows"])),
    "receipt_top": _top,
    "receipt_count": lambda s, t: str(len(t[0]["rows"])),
}
