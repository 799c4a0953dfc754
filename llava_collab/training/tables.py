"""The paper's tables as recipes (`train/tables.yaml`): each row is a base recipe with a few keys changed, beside the paper's numbers.

A row names what it changes by the keys of train.py's command line, and every run of a table is such a command line: what is tested,
estimated and swept is what anyone can type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llava_collab.files import keyed
from llava_collab.models.blueprint import configuration
from llava_collab.models.build import ModelSpec
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.recipe_file import load_recipe, parse_command

_keyed = partial(keyed, error=RecipeError)


@dataclass(frozen=True)
class TableRow:
    """One row of one of the paper's tables."""

    name: str
    """Ours; rows of one name are one run, in whichever tables they stand."""
    paper: str
    """As the paper calls it."""
    numbers: tuple[float, ...] | None
    """The paper's, one a column; None where it prints none that can be read."""
    overrides: Mapping[str, Any] | None
    """Keys of the base recipe that differ; None: the row can be run on the bases of `also` alone; if it has none, `note` says why."""
    also: Mapping[str, Mapping[str, Any]]
    """By name of a base recipe: further keys that differ on it."""
    note: str

    def runs_on(self, base: Path) -> bool:
        """Whether it means something on a base recipe."""
        return self.overrides is not None or base.stem in self.also

    def flags(self, base: Path, prefix: str = "") -> list[str]:
        """The overrides on a base as options of train.py; only those whose key starts with `prefix`. RecipeError where it can't be run."""
        if not self.runs_on(base):
            why = self.note or f"only on {', '.join(self.also)}"
            raise RecipeError(f"row {self.name} can't be run on {base.stem}: {why}")
        chosen = dict(self.overrides or {}) | dict(self.also.get(base.stem, {}))
        return [word for key, value in chosen.items() if key.startswith(prefix) for word in _flag(key, value)]


@dataclass(frozen=True)
class PaperTable:
    """A table: its title, what it means here, the paper's columns, its rows. `baseline` is the row that differences are taken from."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    baseline: str
    rows: tuple[TableRow, ...]

    def row(self, name: str) -> TableRow:
        """A row by name; RecipeError naming those that are there."""
        for row in self.rows:
            if row.name == name:
                return row
        raise RecipeError(f"table {self.name} has no row {name!r}; there are {', '.join(row.name for row in self.rows)}")


@dataclass(frozen=True)
class Training:
    """One run of train.py: its command line after the program, and what that parses to."""

    command: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.out)

    @property
    def makes(self) -> dict[str, ModelSpec]:
        """The model folder it writes and what that is built from, for `configuration` and `estimate` of a later stage."""
        return {str(self.folder / "model"): self.recipe.model}


def load_tables(path: Path) -> dict[str, PaperTable]:
    """All tables of a file. Raises RecipeError naming the file, the place and what is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: can't be read ({error})") from error
    keys = {"title", "note", "columns", "baseline", "rows"}
    sections = _keyed(raw, str(path))
    return {name: _table(name, _keyed(value, f"{path}: {name}", keys), f"{path}: {name}") for name, value in sections.items()}


def earlier_stages(recipes: Path) -> dict[str, ModelSpec]:
    """What the models that the recipes of a folder train are built from, by the model folder they write."""
    return {f"{recipe.run.out}/model": recipe.model for _, recipe in _recipes(recipes)}


def earlier_stage(recipe: Recipe, recipes: Path) -> Path | None:
    """The recipe in a folder whose run writes what `recipe` starts from; None where it starts from bases, or from a model of no recipe."""
    return next((path for path, other in _recipes(recipes) if recipe.model.init_from == f"{other.run.out}/model"), None)


def trainings(row: TableRow, base: Path, out: Path, seed: int = 0, start: Path | None = None) -> list[Training]:
    """The one or two trainings of a row on a base recipe, in order, in folders below `out`.

    Stage 1 is the recipe beside `base` that writes its `model.init_from`. What the row changes of the visual expert changes there
    too, if that recipe has one. Rows and tables that agree on a stage 1 share its folder. `start`: a model that is there already, in place
    of a stage 1. Raises RecipeError for a row that can't be run or whose model would keep an expert that the row leaves out; SystemExit
    (by the command line's parser) for unknown keys.
    """
    command = [str(base), "--run.out", str(out / row.name / f"seed-{seed}"), "--run.seed", str(seed), *row.flags(base)]
    if start is not None:
        only = _training([*command, "--model.init-from", str(start)])
        _check_experts(row, only.recipe, {})
        return [only]
    first = earlier_stage(load_recipe(base), base.parent)
    done: list[Training] = []
    if first is not None:
        own = row.flags(base, "model.visual_expert") if load_recipe(first).model.visual_expert is not None else []
        name = f"align-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}" if own else "align"
        done.append(_training([str(first), "--run.out", str(out / name / f"seed-{seed}"), "--run.seed", str(seed), *own]))
        command += ["--model.init-from", str(done[0].folder / "model")]
    done.append(_training(command))
    _check_experts(row, done[-1].recipe, done[0].makes if first is not None else {})
    return done


def _training(command: list[str]) -> Training:
    return Training(tuple(command), parse_command(command, ""))


def _check_experts(row: TableRow, recipe: Recipe, earlier: Mapping[str, ModelSpec]) -> None:
    """An expert of the starting model stays unless it is replaced; null in a recipe does not take it off."""
    config = configuration(recipe.model, earlier)
    for name in ("visual_expert", "language_expert"):
        if getattr(recipe.model, name) is None and getattr(config, name) is not None:
            raise RecipeError(
                f"row {row.name}: {recipe.model.init_from} has a {name}, which the row leaves out; start from a stage 1 without it"
            )


def _recipes(folder: Path) -> list[tuple[Path, Recipe]]:
    """Every recipe of a folder; other YAML files in it are passed over."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            found.append((path, load_recipe(path)))
        except RecipeError:
            continue
    return found


def _flag(key: str, value: Any) -> list[str]:
    section, _, name = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{name}"]
    return [f"--{section}.{name}", json.dumps(value) if value is None or isinstance(value, dict) else str(value)]


def _table(name: str, raw: dict[str, Any], where: str) -> PaperTable:
    columns = tuple(raw.get("columns") or ())
    rows = tuple(_row(row, value, columns, f"{where}: {row}") for row, value in _keyed(raw.get("rows"), f"{where}: rows").items())
    table = PaperTable(name, str(raw.get("title")), str(raw.get("note", "")), columns, str(raw.get("baseline")), rows)
    table.row(table.baseline)
    return table


def _row(name: str, value: Any, columns: tuple[str, ...], where: str) -> TableRow:
    raw = _keyed(value, where, {"paper", "numbers", "set", "also", "note"})
    numbers = raw.get("numbers")
    if numbers is not None and len(numbers) != len(columns):
        raise RecipeError(f"{where}: {len(numbers)} numbers for {len(columns)} columns")
    note = str(raw.get("note", ""))
    if "set" not in raw and "also" not in raw and not note:
        raise RecipeError(f"{where}: without `set` it can't be run; say in `note` why, or write `set: {{}}` for the base recipe as it is")
    overrides = _keyed(raw["set"], f"{where}: set") if "set" in raw else None
    return TableRow(name, str(raw.get("paper", name)), None if numbers is None else tuple(numbers), overrides, raw.get("also", {}), note)
