"""Recipes as files: strict YAML in (an unknown key is an error that suggests the right one), command-line overrides, resolved YAML out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from llava_collab.files import write_text
from llava_collab.training.recipe import Recipe, RecipeError

NEUTRAL_KEYS = frozenset(
    {
        "run.out", "run.save_every", "run.save_first", "run.keep_last", "run.log_every", "run.threads", "run.num_workers",
        "run.deadline_minutes", "run.micro_batch_size", "run.gradient_checkpointing", "run.engine", "run.engine_config",
        "run.compile", "run.checkpoint", "run.stall_minutes", "run.timeout_minutes", "run.peak_tflops", "data.packing",
        "data.shard_cache", "data.shard_cache_gib", "data.max_bad_fraction",
    }
)  # fmt: skip
"""Keys that may change between two starts of one run: they do not change what a step computes (but for rounding)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise RecipeError(f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}: key {key!r} is given twice.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError naming file, key and cure."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as stream:
            raw = yaml.load(stream, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe. Recipes are in train/recipes/.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    try:
        return _convert(raw, Recipe, "")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_command(argv: Sequence[str], description: str) -> Recipe:
    """`RECIPE.yaml [--section.key value ...]` to a recipe; `--help` after the file shows every key with its value in that file."""
    if not argv or argv[0].startswith("-"):
        sys.stderr.write(f"{description}\n`train.py RECIPE.yaml --help` explains every key and shows its value in that recipe.\n")
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    try:
        default = load_recipe(argv[0])
        return tyro.cli(Recipe, default=default, args=list(argv[1:]), description=description, registry=_dict_flags())
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain lists, dicts and scalars, as in the YAML form."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, atomically; `load_recipe` reads it back equal."""
    write_text(path, yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lines `key: old -> new` of the keys that change what a step computes."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    keys = sorted((before.keys() | after.keys()) - NEUTRAL_KEYS)
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted keys."""
    if not isinstance(value, dict | list) or not value:  # an empty dict is a value: {} asks for an expert, null for none
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, child in items for key, leaf in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()}


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` (from YAML) as an instance of the annotation `kind`, or a RecipeError that names the key `where`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(value, kind, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if type(value) is bool and "on" in args:  # YAML 1.1 reads on and off as true and false
            value = "on" if value else "off"
        if value not in args:
            raise RecipeError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}.{_closest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise RecipeError(f"{where} must be a list{'' if args[-1] is Ellipsis else f' of {len(args)}'}, not {value!r}.")
        return tuple(_convert(v, args[0] if args[-1] is Ellipsis else args[i], f"{where}[{i}]") for i, v in enumerate(value))
    wanted: Any = origin or kind
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:  # exact: a bool is no int
        raise RecipeError(f"{where} must be {wanted.__name__}, not {value!r} ({type(value).__name__}).")
    return value


def _convert_dataclass(value: Any, kind: Any, where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    place = where or "the recipe"
    if not isinstance(value, dict):
        raise RecipeError(f"{place} must be a mapping with the keys {', '.join(known)}, not {value!r}.")
    for key in value:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} in {place}.{_closest(str(key), known)} Valid keys: {', '.join(known)}.")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [name for name, f in known.items() if (f.default, f.default_factory) == absent and name not in value]
    if missing:
        raise RecipeError(f"{place} lacks the key {missing[0]!r}.")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _convert(item, hints[key], f"{where}.{key}" if where else key) for key, item in value.items()})


def _closest(word: str, choices: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _dict_flags() -> tyro.constructors.ConstructorRegistry:
    """Lets the dict-valued keys (model.visual_expert, model.language_expert) be given as JSON on the command line."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def json_dict(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        choices = typing.get_args(info.type) or (info.type,)
        if not any(choice is dict or typing.get_origin(choice) is dict for choice in choices):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: value is None or isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def refuse_other_recipe(run: Path, recipe: Recipe) -> None:
    """Raise RecipeError, naming what differs, where the folder `run` holds a run of another recipe."""
    saved = run / "recipe.yaml"
    if saved.is_file() and (changed := differences(load_recipe(saved), recipe)):
        lines = "\n  ".join(changed)
        raise RecipeError(f"{run} holds a run of another recipe:\n  {lines}\nGive another folder (run.out) or the old values.")
