"""Measure systems of models: quality, cost and latency of every model and composite of a recipe, on the same requests.

    python eval/system.py eval/suites/systems/ds-r52.yaml --seeds 0 1 2 --out runs/systems/ds-r52
    python eval/system.py eval/suites/systems/cmt-open.yaml --out runs/systems/cmt-open --only HyperLLaVA Shunt

Prints the table (with PGR, APGR, CPT, cost advantage), writes table.md, .csv, .tex and a plot of quality against cost into --out.
Killed? Run the same command again: answers of every model are kept, composites are made of them anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from llava_collab.collab.builder import Builder
from llava_collab.collab.recipe import CollabError, Recipe, load_recipe
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.report import csv_text
from llava_collab.evaluation.system import (
    advantage_table,
    asked_table,
    domain_table,
    measure,
    measure_latency,
    plot_systems,
    read_systems,
    system_table,
)
from llava_collab.evaluation.tasks import read_task
from llava_collab.evaluation.tools import TOOLS, make_tool
from llava_collab.files import write_json, write_text
from llava_collab.types import Model


@dataclass(frozen=True)
class Args:
    """Measure the systems of a recipe, resumably."""

    recipe: tyro.conf.Positional[Path]
    """File that says which models there are, how they work together, and on which data: eval/suites/systems/ds-*.yaml, cmt-open.yaml."""

    out: Path
    """Folder for answers, records, thresholds, tables and the plot."""

    seeds: tuple[int, ...] = (0,)
    """One measurement a seed: it deals out training texts, fits models, and draws what is drawn."""

    only: tuple[str, ...] = ()
    """Only these models and systems (default: all)."""

    data_root: Path | None = None
    """Folder of the data, in place of the suite's own."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    batch_size: int = 16
    """Requests put to a network at once."""

    latency: int = 0
    """Ask every system so many requests again, one by one: p50 and p95 are theirs. Else they are of what batches took, divided."""

    report_only: bool = False
    """Compute tables and plot from the records that are there."""


def main(args: Args) -> None:
    """Measure and print. Raises CollabError and other ValueErrors, or FileNotFoundError, with the cure."""
    recipe = load_recipe(args.recipe, TOOLS)
    names = tuple(dict.fromkeys((*args.only, *(recipe.pair or ())))) if args.only else (*recipe.models, *recipe.systems)
    if unknown := [name for name in names if name not in recipe.models and name not in recipe.systems]:
        raise CollabError(f"{args.recipe}: no model or system {unknown[0]!r}; there are {', '.join([*recipe.models, *recipe.systems])}")
    if not args.report_only:
        for seed in args.seeds:
            _measure(args, recipe, names, seed)
    systems = read_systems(args.out, names, args.seeds)
    for system in systems:
        if system.about[0]["spec"] != (recipe.models.get(system.name) or recipe.systems.get(system.name)):
            raise CollabError(f"{args.out}: {system.name!r} was measured with other settings than {args.recipe} has; measure it again")
    tables = [system_table(systems, recipe.pair), advantage_table(systems, recipe.pair), asked_table(systems)]
    if recipe.pair and (domain := domain_table(systems, recipe.pair[0])) is not None:
        tables.append(domain)
    tables = [table for table in tables if table.lines]
    text = "\n\n".join(table.markdown() for table in tables)
    write_text(args.out / "table.md", f"{text}\n")
    write_text(args.out / "table.csv", csv_text(tables))
    write_text(args.out / "table.tex", "\n".join(table.latex() for table in tables))
    print(text)
    plot_systems(systems, args.out / "plot.png", title=recipe.name)
    print(f"{args.out / 'plot.png'}: quality against cost")


def _measure(args: Args, recipe: Recipe, names: tuple[str, ...], seed: int) -> None:
    from llava_collab.models.build import pick_device

    task, suited = read_task(recipe.data, seed, args.data_root)
    folder = args.out / f"seed-{seed}"
    made: dict[str, Model] = {}  # a tool learns once

    def tool(kind: str, name: str, settings: Mapping[str, Any]) -> Model:
        return made[name] if name in made else made.setdefault(name, make_tool(kind, suited, name, settings))

    tools = {kind: partial(tool, kind) for kind in TOOLS}
    builder = Builder(recipe, task=task, folder=folder, tools=tools, device=pick_device(args.device), batch_size=args.batch_size)
    print(f"{task.name}: {len(task.test)} requests, {len(task.tuning)} for gates, {len(task.validation)} for thresholds", flush=True)
    measure(builder, task, names, folder, suited.samples if suited else {})
    if args.latency:
        del builder  # and its networks
        live = Builder(recipe, folder=folder, keep_answers=False, tools=tools, device=pick_device(args.device), seed=seed)
        measure_latency(live, task, names, folder, args.latency)
    write_json(folder / "environment.json", environment(arguments={key: str(value) for key, value in asdict(args).items()}))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
