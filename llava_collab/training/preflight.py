"""What all ranks check together before the first step: do they hear each other, and do they run the same thing on the same data?

A run on many nodes fails in a few ways again and again: a node with another commit or version, an edited recipe, half-copied data, a run
folder that is not shared, a full disk, the wrong network. Each is one error here, the same on every rank: ranks, values and cure.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from llava_collab.files import write_text
from llava_collab.models.build import ModelSpec
from llava_collab.training.estimate import count, student
from llava_collab.training.fingerprint import commit, data_hash, recipe_hash, source_hash, versions
from llava_collab.training.opening import start
from llava_collab.training.recipe import Recipe
from llava_collab.training.recipe_file import flat, parse_command, to_dict
from llava_collab.training.tables import earlier_stages

ELEMENTS = 4 * 2**20
"""Length of the vector of float32 that is summed over all ranks: 16 MiB."""
PATIENCE = 60.0
"""Seconds after which a rank that waits for the others says what to look at."""
_CURES = {
    "data": "Copy the data anew, or read them from a shared folder.",
    "code": "Bring all nodes to the same commit (git pull), or start them from one shared folder.",
    "recipe": "Start all ranks with the same recipe and options.",
    "run folder": "Give a run.out that lies on a file system which all nodes share.",
    "version": "Install the same versions on all nodes.",
}


class PreflightError(RuntimeError):
    """The ranks can't train together, or would train on different things."""


@dataclass(frozen=True)
class Finding:
    """What one rank knows: `facts` have to be the same on all ranks ("kind: name" -> value), `problems` stop the run, `notes` do not."""

    host: str
    facts: Mapping[str, str]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def preflight(recipe: Recipe, accelerator: Accelerator, earlier: Mapping[str, ModelSpec] | None = None) -> None:
    """Check, and let the main process print what was found. Called by all ranks; on one rank there is little to compare, and it is quick.

    Args:
        earlier: what `model.init_from` may name before it is there (`tables.earlier_stages`).
    Raises:
        PreflightError: the same on every rank.
    """
    say = print if accelerator.is_main_process else _nobody
    if accelerator.num_processes > 1:
        milliseconds, bandwidth = all_reduce(accelerator)
        say(f"preflight: all-reduce of {4 * ELEMENTS / 2**20:.0f} MiB in {milliseconds:.1f} ms, {bandwidth / 1e9:.2f} GB/s a rank")
    token = _announce(Path(recipe.run.out), accelerator)
    found: list[Finding] = _gather(look(recipe, token, accelerator, earlier), accelerator)
    if accelerator.is_main_process:
        token.unlink(missing_ok=True)
    problems = [*compare(found), *(f"{finding.host}: {problem}" for finding in found for problem in finding.problems)]
    if any(problem.startswith("recipe:") for problem in problems):
        problems += compare([Finding(f.host, f.facts) for f in _gather(_keys(recipe), accelerator)])
    if problems:
        raise PreflightError("before training, put this right:\n  " + "\n  ".join(dict.fromkeys(problems)))
    hosts = sorted({finding.host for finding in found})
    say(f"preflight: {len(found)} rank{'s' * (len(found) > 1)} on {', '.join(hosts)}: {_brief(found[0].facts)}")
    for note in dict.fromkeys(note for finding in found for note in finding.notes):
        say(f"preflight: {note}")


def check(command: list[str], description: str) -> int:
    """`preflight` alone, for a command line of train.py (recipe, then keys); returns the exit code."""
    recipe = parse_command(command, description)
    with meeting("all ranks to join"):
        accelerator = start(recipe)
    try:
        preflight(recipe, accelerator, earlier_stages(Path(command[0]).parent))
    except PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        with suppress(OSError):  # not empty: the folder of a run
            Path(recipe.run.out).rmdir()
        accelerator.end_training()
    return 0


def look(recipe: Recipe, token: Path, accelerator: Accelerator, earlier: Mapping[str, ModelSpec] | None) -> Finding:
    """What this rank finds."""
    facts = {f"version: {name}": version for name, version in versions().items()}
    facts |= {"code: files": source_hash(), "recipe: hash": recipe_hash(recipe)}
    if (revision := commit()) is not None:
        facts["code: commit"] = revision
    facts["run folder: is shared"] = "yes" if token.exists() else "no"
    problems, notes = [], []
    for file in recipe.data.files:
        try:
            facts[f"data: {file.path}"] = data_hash(file.path)
        except OSError as error:
            facts[f"data: {file.path}"] = str(error.strerror)
            problems.append(f"data.files: no file {file.path} to read ({error.strerror}); paths are relative to the current directory.")
    if accelerator.is_main_process:
        (problem, note) = room(recipe, earlier)
        problems += [problem] if problem else []
        notes += [note]
    notes += crowded(recipe.run.num_workers)
    return Finding(socket.gethostname(), facts, tuple(problems), tuple(notes))


def all_reduce(accelerator: Accelerator) -> tuple[float, float]:
    """Milliseconds of a sum over all ranks, and bytes that each rank sends in a second (a ring sends 2 (n - 1) / n of the vector).

    Raises PreflightError, on all ranks, where the sum is wrong on any.
    """
    ranks = accelerator.num_processes
    seconds, right = 0.0, True
    with meeting("the first all-reduce", accelerator):
        for _ in range(2):  # the first makes the connections
            vector = torch.full((ELEMENTS,), accelerator.process_index + 1.0, device=accelerator.device)
            accelerator.wait_for_everyone()
            began = time.perf_counter()
            torch.distributed.all_reduce(vector)
            right = bool((vector == ranks * (ranks + 1) / 2).all()) and right  # and waits for a GPU
            seconds = time.perf_counter() - began
        wrong = [rank for rank, fine in enumerate(gather_object([right])) if not fine]
    if wrong:
        raise PreflightError(
            f"a sum over all ranks is wrong on rank {', '.join(map(str, wrong))}: memory, link or driver of its node fail."
        )
    return 1000 * seconds, 4 * ELEMENTS * 2 * (ranks - 1) / ranks / seconds


def compare(found: list[Finding]) -> list[str]:
    """A line for each fact that is not the same on all ranks that know it."""
    lines = []
    for name in dict.fromkeys(name for finding in found for name in finding.facts):
        values: dict[str, list[int]] = {}
        for rank, finding in enumerate(found):
            if name in finding.facts:
                values.setdefault(finding.facts[name], []).append(rank)
        if len(values) > 1:
            told = "; ".join(f"{value} on {_ranks(ranks, found)}" for value, ranks in values.items())
            lines.append(f"{name}: {told}. {_CURES[name.partition(':')[0]]}")
    return lines


def _ranks(ranks: list[int], found: list[Finding]) -> str:
    """`ranks 0-7 (node1)`"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {told} ({', '.join(sorted({found[rank].host for rank in ranks}))})"


def room(recipe: Recipe, earlier: Mapping[str, ModelSpec] | None = None) -> tuple[str | None, str]:
    """What is wrong with the free disk of the run folder (or None), and a line about it.

    Needed are `run.keep_last` checkpoints, the next one, which is written before an old one goes, and the model at the end: 4 bytes for
    each trained weight and 8 for its AdamW moments, and frozen weights as the run holds them unless they can be built again (adapters).
    """
    run = Path(recipe.run.out)
    place = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    try:
        named = count(student(recipe, earlier), recipe)
    except (ValueError, OSError) as error:  # a model that is not there yet
        return None, f"{_gib(free)} free for {run}; how much a checkpoint takes is not known yet ({str(error).splitlines()[0]})"
    parts, light = named.values(), recipe.tune.light("adapter" in named)
    trained = sum(part.trainable for part in parts)
    one = 8 * trained + (4 * trained if light else sum(part.weight_bytes for part in parts))
    model = sum(part.parameters for part in parts) * (2 if recipe.run.precision == "bf16" else 4)
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and not path.is_symlink()) if run.exists() else 0
    need = one * (recipe.run.keep_last + 1) + model
    line = f"a checkpoint takes {_gib(one)}, the whole run {_gib(need)}; {_gib(free)} are free for {run}"
    if need - there <= free:
        return None, line
    return f"not enough disk: {line}. Make room, lower run.keep_last, or give another run.out.", line


def crowded(workers: int) -> list[str]:
    """A note where this node has fewer CPUs than its ranks and their loader processes (none: the ranks load by themselves)."""
    ranks, cpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), len(os.sched_getaffinity(0))
    if not workers or (wanted := ranks * (1 + workers)) <= cpus:
        return []
    cure = "lower run.num_workers, or ask for more CPUs (SLURM: --cpus-per-task)"
    return [f"{socket.gethostname()}: ranks {ranks}, loader processes of each {workers}, CPUs {cpus} instead of {wanted}; {cure}"]


@contextmanager
def meeting(what: str, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Around what needs all ranks: where it takes long, or ends in an error, say what to look at."""
    rank = os.environ.get("RANK", "0") if accelerator is None else accelerator.process_index
    place = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '?')}"
    networks = ", ".join(name for _, name in socket.if_nameindex())
    hint = (
        f"rank {rank} on {socket.gethostname()} waits for {what}; they meet at {place}. Do all nodes run, and can they reach each other on "
        "every port? Where nodes have several networks, name one that joins them, on all nodes, in GLOO_SOCKET_IFNAME (CPU) and "
        f"NCCL_SOCKET_IFNAME (GPU); here are {networks}. NCCL_DEBUG=INFO shows what NCCL tries; NCCL_IB_DISABLE=1 does without InfiniBand."
    )
    timer = threading.Timer(PATIENCE, print, (f"after {PATIENCE:.0f} s: {hint}",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    except RuntimeError as error:
        if re.search("gloo|nccl|connect|interface|time", str(error), re.IGNORECASE):
            error.add_note(hint)
        raise
    finally:
        timer.cancel()


def _announce(run: Path, accelerator: Accelerator) -> Path:
    """A file that the main process has just written to the run folder, so that all can say whether they see it. Raises PreflightError."""
    said: list[Any] = [None]
    if accelerator.is_main_process:
        token = run / f".preflight-{uuid.uuid4().hex}"
        try:
            write_text(token, "")
            said = [(str(token), None)]
        except OSError as error:
            said = [(str(token), f"{type(error).__name__}: {error}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(said)
    path, error = said[0]
    if error:
        raise PreflightError(f"run.out: nothing can be written to {run}: {error}")
    return Path(path)


def _gather(finding: Finding, accelerator: Accelerator) -> list[Finding]:
    return gather_object([finding]) if accelerator.num_processes > 1 else [finding]


def _keys(recipe: Recipe) -> Finding:
    return Finding(socket.gethostname(), {f"recipe: {key}": repr(value) for key, value in flat(to_dict(recipe)).items()})


def _brief(facts: Mapping[str, str]) -> str:
    """The facts that a reader of the log looks for."""
    shown = {name.partition(": ")[2]: value for name, value in facts.items() if name.startswith("version")}
    data = [f"{name.partition(': ')[2]} ({value})" for name, value in facts.items() if name.startswith("data")]
    versions = [f"{name} {shown[name]}" for name in ("python", "torch", "transformers", "accelerate")]
    code = f"code {facts['code: files']}" + (f" of commit {facts['code: commit']}" if "code: commit" in facts else "")
    return ", ".join([*versions, code, f"recipe {facts['recipe: hash']}", *data])


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _nobody(*words: object) -> None:
    """A rank that is not the first says nothing."""
