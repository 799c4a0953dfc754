"""Small models that are no networks of ours, as leaves of a recipe: guessers, OCR with rules, the oracle that knows what was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_collab.evaluation.baselines import BASELINES
from llava_collab.evaluation.tasks import Suited
from llava_collab.files import keyed
from llava_collab.types import Model

TOOLS = tuple(BASELINES)
"""Kinds of leaves that a suite's tasks have besides those of `collab.recipe`: majority, blind, ocr, detector, oracle."""


def make_tool(kind: str, suited: Suited | None, name: str, settings: Mapping[str, Any]) -> Model:
    """The leaf `name` of a recipe. Raises ValueError for settings, or a task of texts."""
    keyed(settings, name, set())
    if suited is None:
        raise ValueError(f"{name}: {kind} is told a suite's own questions and answers no others; name a system without it (--system)")
    return BASELINES[kind](
        suited.of("train"), [sample for split in ("tuning", "validation", "test") for sample in suited.of(split)], suited.scorer, name
    )
