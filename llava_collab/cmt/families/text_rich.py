"""Text-Rich Images QA: bar charts of real tables and receipts, with numbers that are drawn large enough to be read at 224 px."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from llava_collab.cmt import draw
from llava_collab.cmt.items import SIZE, Group, Pool, Question

LEADS = {
    **{"chart_top": 0.24, "chart_value": 0.12, "chart_compare": 0.16, "chart_count": 0.08},
    **{"receipt_price": 0.14, "receipt_total": 0.1, "receipt_top": 0.12, "receipt_count": 0.06},
}
_CHART_EXTRAS = ("chart_compare", "chart_value", "chart_count")
_LARGE_TABLE = 6  # rows; of three carmakers everybody knows which has the strongest cars
_RECEIPT_EXTRAS = ("receipt_price", "receipt_top", "receipt_total")
_BARS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17808f")
_EXTREMES = ("largest", "smallest")
_INK = "#111111"
Row = tuple[str, int]  # label, value; of receipts in cents


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """A chart or a receipt with the leading question and others of the same picture."""
    lead = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    chart = lead.startswith("chart")
    extras = [family for family in (_CHART_EXTRAS if chart else _RECEIPT_EXTRAS) if family != lead]
    families = [lead, *extras][:count]
    if chart:
        top = rng.choice(_EXTREMES) if lead == "chart_top" else ""
        rows, title = _top_rows(pool, rng, top) if top else _chart_rows(pool, rng, 5 if lead == "chart_count" else 3)
        narrow = len(rows) <= 4 and max(len(label) for label, _ in rows) <= 5  # so that print below the bars stays apart
        drawn = (_vertical if narrow and rng.random() < 0.5 else _horizontal)(pool, rng, rows, title)
        questions = tuple(_chart_question(pool, rng, rows, family, top) for family in families)
    else:
        rows = _receipt_rows(pool, rng)
        drawn = _receipt(pool, rng, rows)
        questions = tuple(_receipt_question(pool, rng, rows, family) for family in families)
    return Group((drawn.image,), questions, ({"rows": [list(row) for row in rows], "text": drawn.text},))


@dataclass
class _Page:
    """A page that remembers what was written on it, and how large: [text, pixels of the face]."""

    image: Image.Image
    text: list[list[str | int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.image)

    def centred(self, box: draw.Box, text: str, face: str, largest: int) -> None:
        self.text.append([text, draw.centred_text(self.pen, box, text, face, _INK, largest)])

    def write(self, at: tuple[float, float], text: str, font: draw.Font, anchor: str) -> None:
        self.pen.text(at, text, font=font, fill=_INK, anchor=anchor)
        self.text.append([text, round(font.size)])


def _top_rows(pool: Pool, rng: random.Random, word: str) -> tuple[list[Row], str]:
    """3-5 rows of a large table around a random row that is clearly the `word` one of them: a name alone does not tell."""
    tables = [table for table in pool.tables if len(table.values) >= _LARGE_TABLE]
    family = rng.choice(sorted({table.family for table in tables}))
    table = rng.choice([table for table in tables if table.family == family])
    target = rng.choice(table.values)
    gap = max(1.0, 0.06 * target[1])
    others = [row for row in table.values if (target[1] - row[1] if word == "largest" else row[1] - target[1]) >= gap]
    if len(others) < 2:  # the other end of the table: another row, so that every row but these is asked for alike
        return _top_rows(pool, rng, word)
    rows = [target, *rng.sample(others, min(rng.randint(2, 4), len(others)))]
    rng.shuffle(rows)
    return rows, table.title


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


def _horizontal(pool: Pool, rng: random.Random, rows: list[Row], title: str) -> _Page:
    page = _Page(draw.paper(rng))
    face, colour = rng.choice(pool.fonts[:4]), rng.choice(_BARS)
    page.centred((4, 4, SIZE - 4, 28), title, face, largest=18)
    label_width = min(96, max(round(draw.font(face, 16).getlength(label)) for label, _ in rows) + 6)
    pitch, longest = (SIZE - 36) / len(rows), max(value for _, value in rows)
    room = SIZE - label_width - 54
    for index, (label, value) in enumerate(rows):
        top = 34 + index * pitch
        middle, bar = top + pitch / 2, max(8, room * value / longest)
        page.write((label_width - 2, middle), label, draw.fitting_font(face, label, label_width - 4, 30, largest=18), "rm")
        page.pen.rectangle((label_width + 2, top + 0.16 * pitch, label_width + 2 + bar, top + 0.84 * pitch), fill=colour)
        page.write((label_width + bar + 14, middle), str(value), draw.font(face, 18), "lm")
    return page


def _vertical(pool: Pool, rng: random.Random, rows: list[Row], title: str) -> _Page:
    page = _Page(draw.paper(rng))
    face, colour = rng.choice(pool.fonts[:4]), rng.choice(_BARS)
    page.centred((4, 4, SIZE - 4, 28), title, face, largest=18)
    pitch, highest, floor = (SIZE - 8) / len(rows), max(value for _, value in rows), SIZE - 26
    page.pen.line((4, floor, SIZE - 4, floor), fill=_INK, width=2)
    for index, (label, value) in enumerate(rows):
        left = 4 + index * pitch
        top = floor - max(4, (floor - 62) * value / highest)
        page.pen.rectangle((left + 0.16 * pitch, top, left + 0.84 * pitch, floor - 1), fill=colour)
        page.write((left + pitch / 2, floor + 13), label, draw.fitting_font(face, label, pitch - 8, 22, largest=17), "mm")
        page.write((left + pitch / 2, top - 14), str(value), draw.font(face, 20), "mm")
    return page


def _ordinal(place: int, rows: list[Row]) -> str:
    """Bars are named by their place, from the top or from the left: what is known of GOOG and AMZN must not answer for the picture."""
    return "last" if place == len(rows) - 1 else ("first", "second", "third", "fourth")[place]


def _chart_question(pool: Pool, rng: random.Random, rows: list[Row], family: str, top: str) -> Question:
    labels = tuple(label for label, _ in rows)
    if family == "chart_top":
        answer = (max if top == "largest" else min)(rows, key=lambda row: row[1])[0]
        asked = pool.ask(rng, family, x=top)
        return Question(asked, (answer,), labels, choices=labels)
    if family == "chart_value":
        place = rng.randrange(len(rows))
        asked = pool.ask(rng, family, x=_ordinal(place, rows))
        return Question(asked, (str(rows[place][1]),), labels)
    if family == "chart_count":
        return Question(pool.ask(rng, family), (str(len(rows)),), labels, choices=("3", "4", "5"))
    low, high = sorted(rng.sample(rows, 2), key=lambda row: row[1])
    while high[1] - low[1] < max(1.0, 0.06 * high[1]):
        low, high = sorted(rng.sample(rows, 2), key=lambda row: row[1])
    holds = rng.random() < 0.5
    first, second = (high, low) if holds else (low, high)
    asked = pool.ask(rng, family, a=_ordinal(rows.index(first), rows), b=_ordinal(rows.index(second), rows))
    return Question(asked, ("yes" if holds else "no",), labels, choices=("yes", "no"))


def money(cents: int) -> str:
    """435 -> "4.35"."""
    return f"{cents / 100:.2f}"


def _receipt_rows(pool: Pool, rng: random.Random) -> list[Row]:
    """2-4 goods with different prices of 0.25 to 9.95: so many that none can be guessed."""
    goods = rng.sample(pool.goods, rng.randint(2, 4))
    return list(zip(goods, rng.sample(range(25, 1000, 5), len(goods)), strict=True))


def _receipt(pool: Pool, rng: random.Random, rows: list[Row]) -> _Page:
    page = _Page(draw.paper(rng))
    face = rng.choice(pool.fonts[:4])
    shop = rng.choice(("CORNER SHOP", "CITY MARKET", "GREEN STORE", "THE KIOSK"))
    page.centred((10, 8, SIZE - 10, 36), shop, face, largest=22)
    pitch = 146 / (len(rows) + 1)
    lines = [*rows, ("TOTAL", sum(price for _, price in rows))]
    for index, (label, price) in enumerate(lines):
        y = 48 + (index + 0.5) * pitch + (10 if label == "TOTAL" else 0)
        if label == "TOTAL":
            page.pen.line((10, y - pitch / 2 - 2, SIZE - 10, y - pitch / 2 - 2), fill=_INK, width=2)
        page.write((12, y), label, draw.font(face, 20), "lm")
        page.write((SIZE - 12, y), money(price), draw.font(face, 20), "rm")
    return page


def _receipt_question(pool: Pool, rng: random.Random, rows: list[Row], family: str) -> Question:
    goods = tuple(label for label, _ in rows)
    if family == "receipt_price":
        label, price = rng.choice(rows)
        asked = pool.ask(rng, family, x=label)
        return Question(asked, (money(price),), goods)
    if family == "receipt_total":
        return Question(pool.ask(rng, family), (money(sum(price for _, price in rows)),), goods)
    if family == "receipt_count":
        return Question(pool.ask(rng, family), (str(len(rows)),), goods, choices=("2", "3", "4"))
    word = rng.choice(("most", "least"))
    answer = (max if word == "most" else min)(rows, key=lambda row: row[1])[0]
    asked = pool.ask(rng, family, x=word)
    return Question(asked, (answer,), goods, choices=goods)
