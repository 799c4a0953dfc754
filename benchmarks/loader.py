"""How fast training batches come, and what CPU time they cost, beside a plain DataLoader over the same JSON file and pictures.

    python benchmarks/loader.py            writes benchmarks/results/loader.json

Four ways to the same samples, with the same processor (336-pixel CLIP preprocessing) and number of workers: a map-style dataset that
opens, tokenizes and preprocesses at access, as LLaVA's does; ours over the JSON file; over local shards; over shards that come through
the cache of remote ones. All run endlessly; each round takes them in another order, warms each up, then counts samples, wall time and
the CPU time of all its processes. Medians over the rounds. On a CPU that others use as well, CPU seconds are the ones to believe. Ours
tokenizes everything before the first step: `first epoch` is the CPU time a sample with that in it. Linux only (it reads /proc).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from llava_collab.data.collate import Collator
from llava_collab.data.samples import parse_record
from llava_collab.data.shard_writer import write_shards
from llava_collab.evaluation.environment import write_results
from llava_collab.models.build import ModelSpec, build
from llava_collab.training.batches import Batches, open_batches
from llava_collab.training.recipe import DataFile, DataRecipe, OptimRecipe, Recipe, RunRecipe, TuneRecipe

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "plain DataLoader"
LONGEST = 4096  # tokens: 336 pixels are 1,764 of them in the tiny model's patches


@dataclass(frozen=True)
class Args:
    """Compare loaders."""

    file: Path | None = None
    """LLaVA JSON or JSONL file with its pictures beside it (default: 640 x 480 JPEGs of about 60 KB, made on the spot)."""
    pictures: int = 600
    """How many to make."""
    samples: int = 400
    """Samples counted in each round, after as many steps of warming up as workers read ahead."""
    workers: int = 2
    """Processes that load."""
    batch_size: int = 16
    """Samples in a batch."""
    rounds: int = 5
    """How often each way is measured."""
    out: Path = ROOT / "benchmarks" / "results" / "loader.json"
    """Result file."""


def make(folder: Path, count: int) -> Path:
    """Smooth random pictures with some grain, which compress like photographs, and a question about each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in tqdm(range(count), desc="making pictures", unit="picture"):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (480, 640, 1))
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        question, answer = (
            "<image>\nWhat do you see in this picture? " + "Say more. " * (number % 7),
            "colours and more colours " * (1 + number % 11),
        )
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(json.dumps({"id": f"p{number}", "image": f"{number}.jpg", "conversations": turns}) + "\n")
    (folder / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "data.jsonl"


class Plain(Dataset[dict[str, Any]]):
    """Everything at access, as in LLaVA's `LazySupervisedDataset`."""

    def __init__(self, file: Path, processor: Any) -> None:
        text = file.read_text(encoding="utf-8")
        self.records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        self.folder, self.processor = file.parent, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = parse_record(self.records[index], self.folder, str(index))
        opened = [Image.open(path).convert("RGB") for path in sample.images]
        return self.processor.encode(sample.turns, opened, max_length=LONGEST, sample_id=sample.id)


def plain(args: Args, file: Path, processor: Any) -> tuple[Iterator[int], Callable[[], list[int]]]:
    """An endless stream of the sizes of batches, and the process ids of its workers."""
    dataset = Plain(file, processor)
    order = RandomSampler(dataset, replacement=True, num_samples=10**9, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(dataset, args.batch_size, sampler=order, collate_fn=Collator(0), num_workers=args.workers)
    batches = iter(loader)
    return (len(batch["sample_ids"]) for batch in batches), lambda: _workers(batches)


def ours(args: Args, address: str, cache: Path, processor: Any) -> tuple[Iterator[int], Callable[[], list[int]]]:
    """The same of the loader that training uses; a step is one batch."""
    data = DataRecipe((DataFile(address),), max_length=LONGEST, shard_cache=str(cache))
    run = RunRecipe(out=str(cache), steps=1, batch_size=args.batch_size, micro_batch_size=args.batch_size, num_workers=args.workers)
    student: Any = SimpleNamespace(processor=processor)
    batches = open_batches(Recipe(ModelSpec(), data, TuneRecipe(), OptimRecipe(), run), student, Accelerator(cpu=True))
    return (sum(len(batch["sample_ids"]) for batch in step) for step in _steps(batches)), lambda: _workers(batches._steps)


def _steps(batches: Batches) -> Iterator[Sequence[dict[str, Any]]]:
    while True:
        yield batches.next_step()


def _workers(iterator: Any) -> list[int]:
    return [worker.pid for worker in getattr(iterator, "_workers", ())]


def cpu_seconds(workers: list[int]) -> float:
    """CPU time of this process and of its workers so far."""
    ticks = 0
    for pid in workers:
        user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        ticks += int(user) + int(system)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figures:
    """Of one way in one round: samples a second, CPU seconds a sample, CPU seconds a sample of getting ready."""

    speed: float
    cpu: float
    ready: float


def measure(args: Args, open_: Callable[[], tuple[Iterator[int], Callable[[], list[int]]]], total: int) -> Figures:
    """Open a stream, warm it up, count `args.samples`, and let it go."""
    began = time.process_time()
    stream, workers = open_()
    ready = (time.process_time() - began) / total
    for _ in range(4 * max(1, args.workers)):
        next(stream)
    count, start, cpu = 0, time.perf_counter(), cpu_seconds(workers())
    while count < args.samples:
        count += next(stream)
    return Figures(count / (time.perf_counter() - start), (cpu_seconds(workers()) - cpu) / count, ready)


def compare(args: Args, folder: Path) -> dict[str, list[Figures]]:
    """Figures of every round by way."""
    torch.set_num_threads(1)
    file = args.file or make(folder, args.pictures)
    index = write_shards(file, folder / "shards", per_shard=100)
    _, processor = build(ModelSpec(template="chatml"))
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    total = len(Plain(file, processor))
    cache = folder / "cache"
    ways: dict[str, Callable[[], tuple[Iterator[int], Callable[[], list[int]]]]] = {
        PLAIN: lambda: plain(args, file, processor),
        "JSON and pictures": lambda: ours(args, str(file), cache, processor),
        "local shards": lambda: ours(args, str(index), cache, processor),
        "shards through the cache": lambda: ours(args, f"file://{index}", cache, processor),
    }
    names = list(ways)
    figures: dict[str, list[Figures]] = {name: [] for name in names}
    for number in tqdm(range(args.rounds), desc="rounds"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            figures[name].append(measure(args, ways[name], total))
    return figures


def rows(figures: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """Each of our ways over the plain one."""
    median = {
        name: Figures(*(statistics.median(getattr(f, key) for f in found) for key in ("speed", "cpu", "ready")))
        for name, found in figures.items()
    }
    base = median[PLAIN]
    print(f"{'':<26}{'samples/s':>10}{'ratio':>8}{'CPU ms/sample':>15}{'ratio':>8}{'first epoch':>13}{'ratio':>8}")
    out = []
    for name, found in median.items():
        epoch, base_epoch = found.cpu + found.ready, base.cpu + base.ready
        speed, cpu, first = found.speed / base.speed, found.cpu / base.cpu, epoch / base_epoch
        print(f"{name:<26}{found.speed:>10.1f}{speed:>8.2f}{1e3 * found.cpu:>15.2f}{cpu:>8.2f}{1e3 * epoch:>13.2f}{first:>8.2f}")
        if name == PLAIN:
            continue
        for what, value, better, own in (
            ("samples a second", speed, "higher", (found.speed, base.speed)),
            ("CPU seconds a sample", cpu, "lower", (found.cpu, base.cpu)),
            ("CPU seconds a sample in the first epoch, start included", first, "lower", (epoch, base_epoch)),
        ):
            row = {"name": f"{what}: {name} over a {PLAIN}", "value": round(value, 3), "unit": "ratio", "better": better, "target": 1.0}
            out.append(row | {"ours": round(own[0], 5), "plain": round(own[1], 5)})
    return out


def main(args: Args) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        found = rows(compare(args, Path(folder)))
    write_results(args.out, found, samples=args.samples, rounds=args.rounds, workers=args.workers)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
