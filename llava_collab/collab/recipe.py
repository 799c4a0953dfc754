"""Recipes: YAML files that say which models there are and how they work together. A paper's setting is such a file.

    models:                                  leaves, by name
      small: {kind: naive-bayes}             fitted to the task's labelled texts (also tfidf-lr)
      large: {kind: network, path: runs/x/model}
    systems:                                 composites of models and of each other, by name
      shunt: {shunt: {small: small, large: large, gate: max, hint: soft, threshold: {share: 0.35}}}

`collab.builder` makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..files import keyed
from ..types import Answer, Request
from .asking import Verb
from .linear_text import KINDS


class CollabError(ValueError):
    """A recipe that says something impossible; the message names file, system and cure."""


keys_of = partial(keyed, error=CollabError)
_PAIR = {"small", "large", "gate", "threshold", "degrade"}
_KINDS: Mapping[str, set[str]] = {
    "network": {"path", "dtype", "template", "feature_cache"},
    "classifier": {"path", "bf16"},
    "remote": {"endpoint", "model", "price_in", "price_out", "timeout", "attempts", "parallel"},
    **dict.fromkeys(KINDS, {"words", "smoothing", "strength", "hinted_by", "folds"}),
    "two-stage": {"student", "teacher", "small_sure", "large_sure", "rehearsal", "steps", "lr"},
    "distilled": {"teacher", "alpha", "warmup", "words", "steps", "lr"},
}
_SYSTEMS: Mapping[str, set[str]] = {
    "shunt": _PAIR | {"hint"},
    "route": _PAIR,
    "ensemble": {"models"},
    "proxy": {"base", "expert", "anti", "alpha"},
}
_REQUIRED: Mapping[str, set[str]] = {
    "network": {"path"}, "classifier": {"path"}, "remote": {"endpoint", "model"}, "two-stage": {"student", "teacher"},
    "shunt": {"small", "large"}, "route": {"small", "large"}, "ensemble": {"models"}, "proxy": {"base", "expert", "anti"},
}  # fmt: skip
_GATES: Mapping[str, set[str]] = {
    **dict.fromkeys(("max", "margin", "entropy"), {"calibrate"}),
    **dict.fromkeys(("deterministic", "probabilistic", "transformed"), {"features", "path", "epochs"}),
    "random": {"seed"}, "oracle": set(),
}  # fmt: skip
_HINTS: Mapping[str, set[str]] = {
    "none": set(), "soft": {"top"}, "hard": {"sure", "share"}, "prior": {"weight"}, "transfer": {"model", "question", "template"}
}  # fmt: skip
_PARTS = {"small", "large", "base", "expert", "anti", "models", "model", "hinted_by", "student", "teacher", "features"}


@dataclass(frozen=True)
class Recipe:
    """A recipe file, checked: names that exist, kinds that exist, no key that nobody reads."""

    name: str
    models: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[str, str] | None = None
    """The small and the large model that every system is measured against."""
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What models are fitted, tuned and measured on. `quality(id, answer)` is in [0, 1]; a failed answer's is 0."""

    name: str
    verb: Verb
    fit: Sequence[tuple[Request, str]]
    """Labelled requests that leaves are fitted to."""
    unlabelled: Sequence[Request]
    """Requests that a teacher may label."""
    tuning: Sequence[Request]
    """Requests that temperatures, strong choices and routers are found on."""
    validation: Sequence[Request]
    """Other requests, that thresholds are chosen on."""
    test: Sequence[Request]
    quality: Callable[[str, Answer], float]
    right: Mapping[str, str] = field(default_factory=dict)
    """Of a classification: the right choice by request id."""
    seed: int = 0
    learnt_from: str = ""
    """A digest of all that tools are told, where the task has such data."""


def load_recipe(path: Path, tools: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. `tools` are kinds of leaves that the caller's builder adds. Raises CollabError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CollabError(f"{path}: can't be read ({error})") from error
    raw = keys_of(raw, f"{path}", {"name", "models", "systems", "data", "pair", "note"})
    models, systems = keys_of(raw.get("models"), f"{path}, models"), keys_of(raw.get("systems") or {}, f"{path}, systems")
    if both := sorted(models.keys() & systems.keys()):
        raise CollabError(f"{path}: {both[0]!r} is a model and a system; give it one name")
    names = models.keys() | systems.keys()
    for name, spec in models.items():
        where = f"{path}, model {name!r}"
        kind = keys_of(spec, where).get("kind")
        if kind not in _KINDS and kind not in tools:
            raise CollabError(f"{where}: no kind {kind!r}; there are {', '.join([*_KINDS, *tools])}")
        _required(where, str(kind), keys_of(spec, where, {"kind", *_KINDS.get(str(kind), set())}))
        check_names(where, [spec[key] for key in ("hinted_by", "student", "teacher") if key in spec], names)
        if "hinted_by" in spec and models.get(spec["hinted_by"], {}).get("kind") not in KINDS:
            raise CollabError(
                f"{where}: hinted_by has to be a leaf that is fitted in folds ({', '.join(KINDS)}), not {spec['hinted_by']!r}"
            )
    for name, spec in systems.items():
        where = f"{path}, system {name!r}"
        if len(keys_of(spec, where)) != 1 or next(iter(spec)) not in _SYSTEMS:
            raise CollabError(f"{where}: has to be one of {', '.join(_SYSTEMS)}, with its settings")
        kind, settings = next(iter(spec.items()))
        settings = _required(where, kind, keys_of(settings, where, _SYSTEMS[kind]))
        parts = settings.get("models") or [
            settings.get(key) for key in ("small", "large", "base", "expert", "anti") if key in _SYSTEMS[kind]
        ]
        check_names(where, parts, names)
        _check_pair(where, settings, names)
    pair = keys_of(raw["pair"], f"{path}, pair", {"small", "large"}) if raw.get("pair") else None
    if pair:
        check_names(f"{path}, pair", [pair.get("small"), pair.get("large")], names)
    return Recipe(
        str(raw.get("name") or path.stem), models, systems, dict(raw.get("data") or {}),
        (pair["small"], pair["large"]) if pair else None, str(raw.get("note") or ""),
    )  # fmt: skip


def gate_of(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A pair's gate with its `kind` and settings. Raises CollabError for a kind or setting that there is not."""
    return _kinded(f"{where}, gate", settings.get("gate", "max"), _GATES)


def hint_of(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A shunt's hint, as `gate_of`."""
    return _kinded(f"{where}, hint", settings.get("hint") or "none", _HINTS)


def budget_of(where: str, settings: Mapping[str, Any]) -> float | str | dict[str, float]:
    """A pair's threshold: a number, a file, or one budget. Raises CollabError."""
    spec = settings.get("threshold", {"drop": 0.01})
    if isinstance(spec, int | float | str):
        return spec
    budget = keys_of(spec, f"{where}, threshold", {"drop", "share", "traffic"})
    if len(budget) != 1 or not isinstance(next(iter(budget.values())), int | float):
        raise CollabError(f"{where}, threshold: one budget, drop, share or traffic, as a number; found {budget}")
    return budget


def _kinded(where: str, spec: Any, kinds: Mapping[str, set[str]]) -> dict[str, Any]:
    spec = {"kind": spec} if isinstance(spec, str) else keys_of(spec, where)
    if spec.get("kind") not in kinds:
        raise CollabError(f"{where}: no kind {spec.get('kind')!r}; there are {', '.join(kinds)}")
    return keys_of(spec, where, {"kind", *kinds[spec["kind"]]})


def _check_pair(where: str, settings: Mapping[str, Any], names: Any) -> None:
    features = gate_of(where, settings).get("features", [])
    check_names(f"{where}, features", features if isinstance(features, list) else [features], names | {"text", "draft"})
    hint = hint_of(where, settings)
    check_names(f"{where}, hint", [hint.get("model")] if hint["kind"] == "transfer" else [], names)
    budget_of(where, settings)


def _required(where: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    if missing := sorted(_REQUIRED.get(kind, set()) - settings.keys()):
        raise CollabError(f"{where}: {kind} needs {', '.join(missing)}")
    return settings


def check_names(where: str, wanted: Sequence[Any], names: Any) -> None:
    """Raises CollabError for a wanted name that is not among `names`."""
    for name in wanted:
        if name not in names:
            raise CollabError(f"{where}: names {name!r}, and there is no such model or system; there are {', '.join(sorted(names))}")


def parts_of(spec: Any) -> list[str]:
    """The names that a setting builds on, in order."""
    found: list[str] = []
    for key, value in spec.items() if isinstance(spec, Mapping) else []:
        if key in _PARTS:
            found += value if isinstance(value, list) else [value]
        else:
            found += parts_of(value)
    return [name for name in found if isinstance(name, str)]


def file_name(name: str) -> str:
    """A name as a file's: readable, and different for different names."""
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
