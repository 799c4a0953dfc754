"""Text-Rich Images QA: bar charts of real tables and receipts, with numbers that are drawn large enough to be read at 224 px."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from llava_collab.cmt import draw
from llava_collab.cmt.items import SIZE, Group, Pool, Question

LEADS = {
    **{"chart_top": 0.2, "chart_value": 0.14, "chart_compare": 0.16, "chart_count": 0.08},
    **{"receipt_price": 0.14, "receipt_total": 0.1, "receipt_top": 0.12, "receipt_count": 0.06},
}
_CHART_EXTRAS = ("chart_top", "chart_compare", "chart_value")
_RECEIPT_EXTRAS = ("receipt_price", "receipt_top", "receipt_total")
_BARS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17808f")
Row = tuple[str, int]


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """A chart or a receipt with the leading question and others of the same picture."""
    lead = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    chart = lead.startswith("chart")
    extras = [family for family in (_CHART_EXTRAS if chart else _RECEIPT_EXTRAS) if family != lead]
    families = [lead, *extras][:count]
    if chart:
        rows, title = _chart_rows(pool, rng, 5 if lead == "chart_count" else 3)
        image = (_horizontal if max(len(label) for label, _ in rows) > 5 or rng.random() < 0.5 else _vertical)(pool, rng, rows, title)
        return Group((image,), tuple(_chart_question(pool, rng, rows, family) for family in families))
    rows = _receipt_rows(pool, rng)
    return Group((_receipt(pool, rng, rows),), tuple(_receipt_question(pool, rng, rows, family) for family in families))


def _chart_rows(pool: Pool, rng: random.Random, least: int) -> tuple[list[Row], str]:
    """3-5 rows, of a table of at least `least`, whose highest and lowest values stand clear of the others (by 6 % of the highest)."""
    tables = [table for table in pool.tables if len(table.values) >= least]
    family = rng.choice(sorted({table.family for table in tables}))
    table = rng.choice([table for table in tables if table.family == family])
    wanted = rng.randint(3, 5)
    while True:
        rows = rng.sample(table.values, min(wanted, len(table.values)))
        values = sorted(value for _, value in rows)
        gap = max(1.0, 0.06 * values[-1])
        if values[-1] - values[-2] >= gap and values[1] - values[0] >= gap:
            return rows, table.title
        if rng.random() < 0.05:  # a table of near-equal values: take another
            return _chart_rows(pool, rng, least)


def _horizontal(pool: Pool, rng: random.Random, rows: list[Row], title: str) -> Image.Image:
    image = draw.paper(rng)
    pen = ImageDraw.Draw(image)
    face, colour = rng.choice(pool.fonts[:4]), rng.choice(_BARS)
    draw.centred_text(pen, (4, 4, SIZE - 4, 28), title, face, "#111111", largest=18)
    label_width = min(96, max(round(draw.font(face, 16).getlength(label)) for label, _ in rows) + 6)
    pitch, longest = (SIZE - 36) / len(rows), max(value for _, value in rows)
    room = SIZE - label_width - 48
    for index, (label, value) in enumerate(rows):
        top = 34 + index * pitch
        middle, bar = top + pitch / 2, max(2, room * value / longest)
        fitted = draw.fitting_font(face, label, label_width - 4, 30, largest=18)
        pen.text((label_width - 2, middle), label, font=fitted, fill="#111111", anchor="rm")
        pen.rectangle((label_width + 2, top + 0.16 * pitch, label_width + 2 + bar, top + 0.84 * pitch), fill=colour)
        pen.text((label_width + bar + 6, middle), str(value), font=draw.font(face, 18), fill="#111111", anchor="lm")
    return image


def _vertical(pool: Pool, rng: random.Random, rows: list[Row], title: str) -> Image.Image:
    image = draw.paper(rng)
    pen = ImageDraw.Draw(image)
    face, colour = rng.choice(pool.fonts[:4]), rng.choice(_BARS)
    draw.centred_text(pen, (4, 4, SIZE - 4, 28), title, face, "#111111", largest=18)
    pitch, highest, floor = (SIZE - 8) / len(rows), max(value for _, value in rows), SIZE - 26
    pen.line((4, floor, SIZE - 4, floor), fill="#111111", width=2)
    for index, (label, value) in enumerate(rows):
        left = 4 + index * pitch
        top = floor - max(2, (floor - 58) * value / highest)
        pen.rectangle((left + 0.16 * pitch, top, left + 0.84 * pitch, floor - 1), fill=colour)
        fitted = draw.fitting_font(face, label, pitch - 3, 22, largest=17)
        pen.text((left + pitch / 2, floor + 13), label, font=fitted, fill="#111111", anchor="mm")
        pen.text((left + pitch / 2, top - 11), str(value), font=draw.font(face, 18), fill="#111111", anchor="mm")
    return image


def _ordinal(place: int, rows: list[Row]) -> str:
    """Bars are named by their place, from the top or from the left: what is known of GOOG and AMZN must not answer for the picture."""
    return "last" if place == len(rows) - 1 else ("first", "second", "third", "fourth")[place]


def _chart_question(pool: Pool, rng: random.Random, rows: list[Row], family: str) -> Question:
    labels = tuple(label for label, _ in rows)
    if family == "chart_top":
        word = rng.choice(("highest", "lowest"))
        answer = (max if word == "highest" else min)(rows, key=lambda row: row[1])[0]
        template, prompt = pool.ask(rng, family, x=word)
        return Question(family, template, prompt, (answer,), labels, choices=labels)
    if family == "chart_value":
        place = rng.randrange(len(rows))
        template, prompt = pool.ask(rng, family, x=_ordinal(place, rows))
        return Question(family, template, prompt, (str(rows[place][1]),), labels)
    if family == "chart_count":
        template, prompt = pool.ask(rng, family)
        return Question(family, template, prompt, (str(len(rows)),), labels, choices=("3", "4", "5"))
    low, high = sorted(rng.sample(rows, 2), key=lambda row: row[1])
    while high[1] - low[1] < max(1.0, 0.06 * high[1]):
        low, high = sorted(rng.sample(rows, 2), key=lambda row: row[1])
    holds = rng.random() < 0.5
    first, second = (high, low) if holds else (low, high)
    template, prompt = pool.ask(rng, family, a=_ordinal(rows.index(first), rows), b=_ordinal(rows.index(second), rows))
    return Question(family, template, prompt, ("yes" if holds else "no",), labels, choices=("yes", "no"))


def _money(halves: int) -> str:
    """Prices are whole numbers of half units: 3 -> "1.50"."""
    return f"{halves / 2:.2f}"


def _receipt_rows(pool: Pool, rng: random.Random) -> list[Row]:
    """2-4 goods with different prices of 0.50 to 9.50, in halves."""
    goods = rng.sample(pool.goods, rng.randint(2, 4))
    return list(zip(goods, rng.sample(range(1, 20), len(goods)), strict=True))


def _receipt(pool: Pool, rng: random.Random, rows: list[Row]) -> Image.Image:
    image = draw.paper(rng)
    pen = ImageDraw.Draw(image)
    face = rng.choice(pool.fonts[:4])
    shop = rng.choice(("CORNER SHOP", "CITY MARKET", "GREEN STORE", "THE KIOSK"))
    draw.centred_text(pen, (10, 8, SIZE - 10, 36), shop, face, "#111111", largest=22)
    pitch = 146 / (len(rows) + 1)
    lines = [*rows, ("TOTAL", sum(price for _, price in rows))]
    for index, (label, price) in enumerate(lines):
        y = 48 + (index + 0.5) * pitch + (10 if label == "TOTAL" else 0)
        if label == "TOTAL":
            pen.line((10, y - pitch / 2 - 2, SIZE - 10, y - pitch / 2 - 2), fill="#111111", width=2)
        pen.text((12, y), label, font=draw.font(face, 20), fill="#111111", anchor="lm")
        pen.text((SIZE - 12, y), _money(price), font=draw.font(face, 20), fill="#111111", anchor="rm")
    return image


def _receipt_question(pool: Pool, rng: random.Random, rows: list[Row], family: str) -> Question:
    goods = tuple(label for label, _ in rows)
    if family == "receipt_price":
        label, price = rng.choice(rows)
        template, prompt = pool.ask(rng, family, x=label)
        return Question(family, template, prompt, (_money(price),), goods)
    if family == "receipt_total":
        template, prompt = pool.ask(rng, family)
        return Question(family, template, prompt, (_money(sum(price for _, price in rows)),), goods)
    if family == "receipt_count":
        template, prompt = pool.ask(rng, family)
        return Question(family, template, prompt, (str(len(rows)),), goods, choices=("2", "3", "4"))
    word = rng.choice(("most", "least"))
    answer = (max if word == "most" else min)(rows, key=lambda row: row[1])[0]
    template, prompt = pool.ask(rng, family, x=word)
    return Question(family, template, prompt, (answer,), goods, choices=goods)
