"""Knowledge OCR: read a country card, an element tile or a sign, and answer what can be known from the reading."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from PIL import Image, ImageDraw

from llava_collab.cmt import draw
from llava_collab.cmt.items import SIZE, Group, Pool, Question
from llava_collab.cmt.sources import Country

LEADS = {
    **{"card_read": 0.14, "card_flag": 0.1, "capital": 0.14, "continent": 0.14},
    **{"element_name": 0.1, "element_number": 0.1, "element_symbol": 0.08, "sign": 0.2},
}
_CARD = ("card_read", "capital", "continent", "card_flag")
_CONTINENTS = {"Africa": "Africa", "Americas": "the Americas", "Asia": "Asia", "Europe": "Europe", "Oceania": "Oceania"}
_TWIN_FLAGS = frozenset(("Chad", "Romania", "Indonesia", "Monaco", "Netherlands", "Luxembourg"))  # never asked from the flag alone
_INK = ("#111111", "#0b2a6b", "#6b0b0b", "#0b4a1e")
_SIGNS = (("#c01818", "#ffffff"), ("#0b4fa0", "#ffffff"), ("#147a30", "#ffffff"), ("#ffd21a", "#111111"), ("#f7f7f7", "#111111"))


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """A card, a tile, or (one per question) signs."""
    lead = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    if lead == "sign":
        images, questions, truths = zip(*(_sign(pool, rng, index) for index in range(count)), strict=True)
        return Group(images, questions, truths)
    if lead in _CARD:
        return _card(pool, rng, lead, count)
    return _tile(pool, rng, lead, count)


@cache
def _flag(path: str) -> Image.Image:
    with Image.open(path) as opened:
        flag = opened.convert("RGBA")
    flag.thumbnail((160, 110), Image.Resampling.LANCZOS)
    return flag


def _country(pool: Pool, rng: random.Random, lead: str) -> Country:
    """Uniform over countries, but uniform over continents where those are asked for (Africa alone has 28 %)."""
    if lead == "card_flag":
        return rng.choice([country for country in pool.countries if country.name not in _TWIN_FLAGS])
    if lead != "continent":
        return rng.choice(pool.countries)
    region = rng.choice(sorted({country.region for country in pool.countries}))
    return rng.choice([country for country in pool.countries if country.region == region])


def _card(pool: Pool, rng: random.Random, lead: str, count: int) -> Group:
    country = _country(pool, rng, lead)
    flag_only = lead == "card_flag"
    image = draw.paper(rng)
    pen = ImageDraw.Draw(image)
    flag = _flag(country.flag)
    x = rng.randint(8, SIZE - 8 - flag.width)
    top = rng.randint(20, 90) if flag_only else rng.randint(6, 18)
    name_above = not flag_only and rng.random() < 0.4
    truth: dict[str, Any] = {"country": country.name, "capital": country.capital, "region": country.region, "text": []}
    image.paste(flag, (x, SIZE - flag.height - top if name_above else top), flag)
    if not flag_only:
        box = (8, 10, SIZE - 8, SIZE - flag.height - top - 12) if name_above else (8, flag.height + top + 12, SIZE - 8, SIZE - 10)
        centred_face = rng.choice(pool.fonts)
        size = draw.centred_text(pen, box, country.name, centred_face, rng.choice(_INK), largest=52)
        truth["text"] = [[country.name, size]]
    extras = ["capital"] if flag_only else [family for family in ("capital", "card_read") if family != lead]
    families = [lead, *extras, extras[0]][:count]
    return Group((image,), tuple(_card_question(pool, rng, country, family) for family in families), (truth,))


def _card_question(pool: Pool, rng: random.Random, country: Country, family: str) -> Question:
    asked = pool.ask(rng, family)
    if family == "continent":
        answer = _CONTINENTS[country.region]
        answers = tuple(dict.fromkeys((answer.removeprefix("the "), answer)))
        return Question(asked, answers, (country.name,), choices=tuple(sorted(_CONTINENTS)))
    return Question(asked, (country.capital if family == "capital" else country.name,), (country.name,))


def _tile(pool: Pool, rng: random.Random, lead: str, count: int) -> Group:
    """Symbol in large print; the number is shown only where it is not what could be asked for."""
    symbol, name, number = rng.choice(pool.elements)
    image = draw.paper(rng)
    pen = ImageDraw.Draw(image)
    ink, face = rng.choice(_INK), rng.choice(pool.fonts[:5])
    inset = rng.randint(4, 16)
    pen.rectangle((inset, inset, SIZE - 1 - inset, SIZE - 1 - inset), outline=ink, width=rng.randint(3, 6))
    show_number = lead == "element_name"
    show_name = lead == "element_number" and rng.random() < 0.5
    middle = (40, 60, SIZE - 40, SIZE - (60 if show_name else 30))
    text = [[symbol, draw.centred_text(pen, middle, symbol, face, ink, largest=rng.randint(84, 120))]]
    if show_number:
        text.append([str(number), draw.centred_text(pen, (20, 20, 84, 60), str(number), face, ink, largest=34)])
    if show_name:
        text.append([name, draw.centred_text(pen, (20, SIZE - 62, SIZE - 20, SIZE - 20), name, face, ink, largest=34)])
    extras = ["element_symbol"] if show_name or show_number else ["element_name", "element_number", "element_symbol"]
    families = [lead, *(family for family in extras if family != lead)]
    questions = []
    for index in range(count):
        family = families[index % len(families)]
        answers = {
            "element_name": (name, name.lower()),
            "element_number": (str(number),),
            "element_symbol": (symbol,),
        }[family]
        questions.append(Question(pool.ask(rng, family), answers, (name,)))
    truth = {"symbol": symbol, "name": name, "number": number, "text": text}
    return Group((image,), tuple(questions), (truth,))


def _sign(pool: Pool, rng: random.Random, index: int) -> tuple[Image.Image, Question, dict[str, Any]]:
    word = rng.choice(pool.sign_words)
    image = draw.background(rng, rng.choice(pool.backgrounds))
    pen = ImageDraw.Draw(image)
    plate, ink = rng.choice(_SIGNS)
    width, height = rng.randint(170, 212), rng.randint(70, 120)
    x, y = rng.randint(2, SIZE - width - 2), rng.randint(10, SIZE - height - 10)
    pen.rounded_rectangle((x, y, x + width, y + height), radius=12, fill=plate, outline=ink, width=4)
    size = draw.centred_text(pen, (x + 12, y + 12, x + width - 12, y + height - 12), word, rng.choice(pool.fonts), ink)
    question = Question(pool.ask(rng, "sign"), (word, word.lower()), (word,), images=(index,))
    return image, question, {"word": word, "text": [[word, size]]}
