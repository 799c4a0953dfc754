"""What an OCR engine reads of a picture, put in the form of CMT-open's `truth`, so that the rules of `cmt.oracle` can answer from it.

Engine: PP-OCR by RapidOCR (extra `ocr`). What a country card or an element tile is about is looked up among the training items.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample

_PRICE = re.compile(r"\d+[.,]\d\d")
_WIDENED = 32  # pixels of margin: PP-OCR's detector misses print at the very edge


@dataclass(frozen=True)
class Line:
    """A piece of print and its box in pixels."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def x(self) -> float:
        return (self.x0 + self.x1) / 2

    @property
    def y(self) -> float:
        return (self.y0 + self.y1) / 2


@cache
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading pictures needs an OCR engine: pip install 'llava_collab[ocr]'") from error
    return RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False})  # nothing stands upside down


def read_lines(path: Path) -> list[Line]:
    """The print of a picture, from top to bottom. Raises ModuleNotFoundError without RapidOCR."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.expand(opened.convert("RGB"), _WIDENED, "white")
    found = _engine()(np.asarray(image)[:, :, ::-1])
    lines = []
    for text, corners_42 in zip(found.txts or (), [] if found.boxes is None else found.boxes, strict=True):
        corners_42 = np.asarray(corners_42) - _WIDENED
        lines.append(Line(text.strip(), *map(float, (*corners_42.min(0), *corners_42.max(0)))))
    return sorted(lines, key=lambda line: (line.y, line.x))


def reads(family: str) -> bool:
    """Is there a rule for the print in this family's pictures?"""
    return family.startswith(tuple(_READERS))


class Reader:
    """Print -> `truth`, by the question's family; facts come from the training items."""

    def __init__(self, train: Iterable[Sample]) -> None:
        self._countries: dict[str, Mapping[str, Any]] = {}
        self._elements: dict[str, Mapping[str, Any]] = {}
        for sample in train:
            for truth in sample.meta.get("truth") or ():
                if "country" in truth:
                    self._countries[truth["country"].lower()] = truth
                if "symbol" in truth:
                    self._elements[truth["symbol"]] = truth

    def truth(self, family: str, lines: Sequence[Line]) -> dict[str, Any]:
        """What can be said of the picture. Raises ValueError where nothing of use was read."""
        if not lines:
            raise ValueError(f"{family}: no print found")
        return next(read for kind, read in _READERS.items() if family.startswith(kind))(self, lines)

    def _card(self, lines: Sequence[Line]) -> dict[str, Any]:
        names = [" ".join(line.text for line in lines), *(line.text for line in lines)]  # a coat of arms may look like print
        known = [match for name in names for match in difflib.get_close_matches(name.lower(), self._countries, 1, 0.75)]
        return dict(self._countries[known[0]]) if known else {"country": names[0]}

    def _tile(self, lines: Sequence[Line]) -> dict[str, Any]:
        symbol = max(lines, key=lambda line: line.y1 - line.y0).text
        known = self._elements.get(symbol, {})
        numbers = [line.text for line in lines if line.text.isdigit()]
        return (
            {"symbol": symbol, "number": numbers[0] if numbers else known["number"], "name": known["name"]} if known else {"symbol": symbol}
        )

    def _sign(self, lines: Sequence[Line]) -> dict[str, Any]:
        return {"word": " ".join(line.text for line in lines)}

    def _chart(self, lines: Sequence[Line]) -> dict[str, Any]:
        """Rows of label and number. Bars lie where labels stand below each other; they stand where labels share a base line."""
        lines = [word for line in lines[1:] for word in _words(line)]
        numbers = [line for line in lines if _digits(line.text) is not None]
        words = [line for line in lines if line not in numbers]
        if not words:  # labels are years: the lower or the left half of what was read
            spread = max(line.y for line in numbers) - min(line.y for line in numbers)
            half = len(numbers) // 2
            upright = spread and len({round(line.y / 12) for line in numbers[-half:]}) == 1
            words = numbers[-half:] if upright else sorted(numbers, key=lambda line: line.x)[:half]
            numbers = [line for line in numbers if line not in words]
        upright = max(word.y for word in words) - min(word.y for word in words) < 12 and len(words) > 1
        axis: Callable[[Line], float] = (lambda line: line.x) if upright else (lambda line: line.y)
        rows = []
        for word in sorted(words, key=axis):
            nearest = min(numbers, key=lambda number: abs(axis(number) - axis(word)))
            rows.append([word.text, _digits(nearest.text)])
        return {"rows": rows}

    def _receipt(self, lines: Sequence[Line]) -> dict[str, Any]:
        prices = [line for line in lines if _PRICE.fullmatch(line.text)]
        rows = []
        for line in lines:
            beside = [price for price in prices if abs(price.y - line.y) < 10]
            if beside and line not in prices and line.text.upper() != "TOTAL":
                rows.append([line.text, round(100 * float(beside[0].text.replace(",", ".")))])
        return {"rows": rows}


def _words(line: Line) -> list[Line]:
    """Labels of neighbouring bars may come as one line: its words, each with its share of the box."""
    share = (line.x1 - line.x0) / max(1, len(line.text))
    found = []
    for match in re.finditer(r"\S+", line.text):
        found.append(Line(match[0], line.x0 + share * match.start(), line.y0, line.x0 + share * match.end(), line.y1))
    return found if len({_digits(word.text) is None for word in found}) == 1 and line.x1 - line.x0 > 100 else [line]


def _digits(text: str) -> int | None:
    """A whole number as printed; the letters that PP-OCR takes for a 1 or a 0 are read as digits where a digit stands beside them."""
    fixed = text.translate(str.maketrans("lI|O", "1110")) if any(c.isdigit() for c in text) else text
    return int(fixed) if fixed.isdigit() else None


_READERS: dict[str, Callable[[Reader, Sequence[Line]], dict[str, Any]]] = {
    "card_read": Reader._card,
    "capital": Reader._card,
    "continent": Reader._card,
    "element": Reader._tile,
    "sign": Reader._sign,
    "chart": Reader._chart,
    "receipt": Reader._receipt,
}
