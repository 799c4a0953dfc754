"""Small tables of real numbers (vega-datasets) that fit into a chart of 3-5 bars: a title, and a whole number for each label."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class Table:
    """`family` is what the splits hold out (all years of one statistic together); values are at least 1 and at most 999."""

    family: str
    title: str
    values: tuple[tuple[str, int], ...]


def vega_tables(root: Path, use: Callable[[str], Path]) -> tuple[Table, ...]:
    """Every table below that its file exists for; `use(relative)` records the file and gives its path."""
    found: list[Table] = []
    for relative, reader in _READERS.items():
        if (root / relative).is_file():
            for family, title, values in reader(_rows(use(relative))):
                kept = tuple((label, round(value)) for label, value in values.items() if 1 <= round(value) <= 999 and len(label) <= 11)
                if len({value for _, value in kept}) >= 3:
                    found.append(Table(family, title, kept))
    return tuple(found)


Rows = list[dict[str, Any]]
Found = Iterable[tuple[str, str, dict[str, float]]]


def _rows(path: Path) -> Rows:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf8"))
    with path.open(encoding="utf8", newline="") as handle:
        return list(csv.DictReader(handle))


def _means(rows: Rows, label: str, value: str) -> dict[str, float]:
    grouped: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[label] not in (None, "") and row[value] not in (None, ""):
            grouped[str(row[label])].append(float(row[value]))
    return {key: fmean(grouped[key]) for key in sorted(grouped)}


def _where(rows: Rows, **wanted: str | int) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _countries(rows: Rows) -> Found:
    for year in range(1955, 2001, 5):
        some = _where(rows, year=year)
        yield "life expectancy", f"Life span {year}", _means(some, "country", "life_expect")


def _barley(rows: Rows) -> Found:
    for year in (1931, 1932):
        for variety in sorted({row["variety"] for row in rows}):
            yield "barley", f"Barley {year}", _means(_where(rows, year=year, variety=variety), "site", "yield")
        yield "barley", f"Mean barley {year}", _means(_where(rows, year=year), "site", "yield")


def _cars(rows: Rows) -> Found:
    for year in range(70, 83):
        some = [row for row in rows if str(row["Year"]).startswith(f"19{year}")]
        yield "horsepower", f"Horsepower 19{year}", _means(some, "Origin", "Horsepower")
        yield "miles per gallon", f"Miles per gallon 19{year}", _means(some, "Origin", "Miles_per_Gallon")


def _hurricanes(rows: Rows) -> Found:
    yield "hurricanes", "Hurricanes", {row["state"]: float(row["hurricanes"]) for row in rows}


def _obesity(rows: Rows) -> Found:
    yield "obesity", "Obesity percent", {row["state"]: 100 * row["rate"] for row in rows}


def _weather(rows: Rows) -> Found:
    for place in ("Seattle", "New York"):
        for year in range(2012, 2016):
            some = [row for row in rows if row["location"] == place and row["date"].startswith(str(year))]
            months = [{**row, "month": _MONTHS[int(row["date"][5:7]) - 1]} for row in some]
            yield "temperature", f"{place} {year}", _means(months, "month", "temp_max")
            kinds: dict[str, float] = defaultdict(float)
            for row in some:
                kinds[row["weather"]] += 1
            yield "weather days", f"{place} days {year}", dict(kinds)


def _stocks(rows: Rows) -> Found:
    for date in sorted({row["date"] for row in rows}, key=lambda day: (day[-4:], _MONTHS.index(day[:3]))):
        yield "stocks", f"Stocks {date[:3]} {date[-4:]}", {row["symbol"]: float(row["price"]) for row in rows if row["date"] == date}


def _electricity(rows: Rows) -> Found:
    short = {"Fossil Fuels": "fossil", "Nuclear Energy": "nuclear", "Renewables": "renewable"}
    for year in range(2001, 2018):
        some = [row for row in rows if row["year"].startswith(str(year))]
        yield "electricity", f"Iowa power {year}", {short[row["source"]]: float(row["net_generation"]) / 100 for row in some}


def _wheat(rows: Rows) -> Found:
    yield "wheat", "Price of wheat", {str(row["year"]): float(row["wheat"]) for row in rows}


def _penguins(rows: Rows) -> Found:
    for island in ("Biscoe", "Dream", "Torgersen"):
        yield "penguins", f"Flippers {island}", _means(_where(rows, Island=island), "Species", "Flipper Length (mm)")
    yield "penguins", "Flipper length", _means(rows, "Species", "Flipper Length (mm)")


_READERS: dict[str, Callable[[Rows], Found]] = {
    "data/barley.json": _barley,
    "data/cars.json": _cars,
    "data/countries.json": _countries,
    "data/iowa-electricity.csv": _electricity,
    "data/obesity.json": _obesity,
    "data/penguins.json": _penguins,
    "data/population_engineers_hurricanes.csv": _hurricanes,
    "data/stocks.csv": _stocks,
    "data/weather.csv": _weather,
    "data/wheat.json": _wheat,
}
