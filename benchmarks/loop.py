"""Our training loop beside transformers' `Trainer` with stock LLaVA: tokens a second and peak memory for the same work.

    python benchmarks/loop.py                       writes benchmarks/results/loop.json and loop.png
    python benchmarks/loop.py --data FILE.json --language-model smollm2-135m --vision-tower dinov2-s --sizes.max-length 2048

On a GPU: a decoder of LLaMA-7B's width with 8 of its 32 blocks behind a tower of CLIP-L/336's shape, in bf16; decoder and projector learn.
On a CPU the same in small. Both sides start from one folder of random weights and get the same dataset object's items (texts tokenized
beforehand), the same attention, autocast, frozen weights in the same type, fused AdamW, and as many samples a step and a forward pass. What
differs is what a user of either gets: ours is train/train.py's own loop with its checks and log; the Trainer has the settings that make it
fastest here (grouped by length, no look at each loss, copies that need not be waited for) or, in rows of their own, its default ones.

Before anything is timed, the loss of the first step must be the same on both sides for the same samples. A run warms up for some steps,
then takes every sample once, and is timed from when the first of these steps has its data to the end of the last. Real tokens count,
padding does not. The Trainer's order, grouped by length or shuffled, is made beforehand and replayed, so that a short run has the order of
a long one. The ways take turns, in another order each round; a ratio is taken within a round, the median over rounds counts. On a CPU that
others use as well, the ratio of CPU seconds, given beside, is the one to believe; peak memory is left out there, because the small model's
is lost in that of the interpreter.

Conversations made on the spot are mixed as LLaVA-1.5's 665 K samples; their lengths are lognormal, an assumption (`made.py`).
"""

from __future__ import annotations

import gc
import io
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from loop_sides import ROOT, Figures, Watch, best_settings, our_loop, trainer_loop
from made import LIKE_7B, Sizes, make_base, make_data
from torch.utils.data import Subset
from tqdm import tqdm
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.data.samples import iter_records
from llava_collab.data.skips import SkipList, TooManyBadSamples
from llava_collab.evaluation.environment import write_results
from llava_collab.models import HyperLlavaProcessor
from llava_collab.models.build import ModelSpec, build
from llava_collab.training.data_files import read_all
from llava_collab.training.recipe import DataFile, DataRecipe, OptimRecipe, Recipe, RunRecipe, TuneRecipe

SAME = 1e-4  # relative difference of first losses
POOL = 200  # steps' worth of samples that an epoch's are taken from


@dataclass(frozen=True)
class Args:
    """Measure both loops. The defaults shown are those of this machine: on a GPU a decoder of 7B's width, on a CPU a small one."""

    data: Path | None = None
    """LLaVA JSON or JSONL file (default: conversations made on the spot); as many of its samples as an epoch takes, at random."""
    image_root: Path | None = None
    """Folder that the image paths in it start from (default: the file's own)."""
    language_model: str | None = None
    """A base by name, a folder or a hub id (default: random weights of the sizes)."""
    vision_tower: str | None = None
    """The same of the tower. One with batch statistics is refused: the Trainer learns them, ours does not."""
    sizes: Sizes = field(default_factory=Sizes)
    """What is made where no base is named; the longest sample."""
    batch_size: int = 16
    """Samples of an optimiser step."""
    micro_batch_size: int = 4
    """Samples of a forward pass."""
    steps: int = 16
    """Steps of an epoch. With fewer than that, samples of the Trainer's grouped steps fit each other in our steps better than chance."""
    warmup: int = 4
    """Steps before those that count."""
    rounds: int = 6
    """How often each way is measured."""
    workers: int = 0
    """Processes that load data, on both sides (the Trainer's own default is none)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast over fp32 weights; the frozen tower is stored in bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations, on both sides."""
    out: Path = ROOT / "benchmarks" / "results" / "loop.json"
    """Result file; the plot goes beside it."""

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return self.steps * self.batch_size


GPU = Args(sizes=LIKE_7B, rounds=3, workers=8, precision="bf16")


EXPERTS = {"visual_expert": {}, "language_expert": {}}  # the paper's sizes
OURS: dict[str, tuple[Literal["auto", "on", "off"], dict[str, Any]]] = {
    "ours, packing auto": ("auto", {}),
    "ours, packing off": ("off", {}),
    "ours, packing on": ("on", {}),
    "ours, packing auto, experts on": ("auto", EXPERTS),
}
OURS_FIRST = next(iter(OURS))
BEST, DEFAULT = "Trainer, best settings", "Trainer, default settings"
WAYS = (*OURS, BEST, DEFAULT)


@dataclass(frozen=True)
class Job:
    """What all ways share: a folder with the model that they start from (`model`), and the samples of an epoch."""

    args: Args
    place: Path
    data: DataRecipe

    @classmethod
    def open(cls, args: Args, place: Path) -> Job:
        """Make the model and the data. Raises SystemExit where a file has too few samples."""
        model, processor = build(make_base(args.sizes, place, args.language_model, args.vision_tower))
        model.save_pretrained(place / "model")
        processor.save_pretrained(place / "model")
        pool = max(POOL, args.steps) * args.batch_size
        records = list(iter_records(args.data or make_data(args.sizes, place, pool)))
        random.Random(0).shuffle(records)  # noqa: S311 - samples, not secrets
        records = records[:pool]
        root = place if args.data is None else args.image_root or args.data.parent
        file = DataFile(str(place / "epoch.jsonl"), str(root))
        job = cls(args, place, DataRecipe((file,), args.sizes.max_length, max_bad_fraction=0.5))  # an epoch is made of the good ones
        job._write(records)
        try:
            dataset, _ = job.dataset()
        except TooManyBadSamples as error:
            raise SystemExit(str(error)) from None
        if len(dataset.skips):
            print(dataset.skips.text())
        good = [number for number in range(len(records)) if dataset.skips.get(number) is None]
        chosen = evenly([dataset.lengths[number] for number in good], args.batch_size, args.steps)
        job._write([records[good[number]] for number in chosen])
        return job

    def _write(self, records: Sequence[Any]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.place / "epoch.jsonl").write_text(text, encoding="utf-8")

    def recipe(self, way: str, seed: int, steps: int) -> Recipe:
        """The recipe of `steps` steps and one that is never taken, because the last step of a run saves."""
        args, (packing, experts) = self.args, OURS.get(way, ("off", {}))
        run = RunRecipe(
            out=tempfile.mkdtemp(dir=self.place, prefix="run-"),
            steps=steps + 1,
            batch_size=args.batch_size,
            micro_batch_size=args.micro_batch_size,
            seed=seed,
            precision=args.precision,
            gradient_checkpointing=args.gradient_checkpointing,
            save_every=10**9,
            num_workers=args.workers,
        )
        model = ModelSpec(init_from=str(self.place / "model"), template="chatml", **experts)
        return Recipe(model, replace(self.data, packing=packing), TuneRecipe(), OptimRecipe(), run)

    def dataset(self) -> tuple[ConversationDataset, int]:
        """What our loop opens for itself, for the Trainer; and the id of padding."""
        processor: Any = HyperLlavaProcessor.from_pretrained(self.place / "model", backend="pil")
        samples = read_all(self.data)
        skips = SkipList(len(samples), self.data.max_bad_fraction)
        return ConversationDataset(samples, processor, max_length=self.data.max_length, skips=skips), processor.tokenizer.pad_token_id

    def measure(self, way: str, seed: int) -> Figures:
        """Some steps of warming up, then an epoch, which counts."""
        warm = self.args.warmup
        return self._run(way, seed, Watch(warm + 1, warm + self.args.steps))[0]

    def first_loss(self, way: str) -> float:
        """The loss of the first step; the Trainer gets the samples that our loop takes first."""
        return self._run(way, 0, Watch(1, 1))[1]

    def _run(self, way: str, seed: int, watch: Watch) -> tuple[Figures, float]:
        gc.collect()
        held = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        recipe = self.recipe(way, seed, watch.last)
        with silence():
            if way in OURS:
                loss = our_loop(recipe, watch, (self.args.steps - watch.first + 1) % self.args.steps)
            else:
                dataset, pad = self.dataset()
                settings = best_settings(self.args.workers) if way == BEST else {}
                loss = trainer_loop(recipe, settings, Subset(dataset, self._order(way, dataset, seed, watch)), pad, watch)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if torch.cuda.is_available() else None
        return Figures(watch.seconds, watch.cpu_seconds, watch.tokens, watch.positions, peak), loss

    def _order(self, way: str, dataset: ConversationDataset, seed: int, watch: Watch) -> list[int]:
        """Samples in the order in which the Trainer takes them: grouped by length as they lie in the file, or shuffled."""
        if watch.last == 1:
            return GroupedBatchSampler(dataset.lengths, dataset.has_image, self.args.batch_size, seed).batches(0)[0]
        epoch = list(range(len(dataset)))
        if way == DEFAULT:
            random.Random(seed).shuffle(epoch)  # noqa: S311
        return epoch[: self.args.batch_size * self.args.warmup] + epoch


def evenly(lengths: Sequence[int], batch_size: int, steps: int) -> list[int]:
    """Samples of `steps` steps, spread evenly over those that the Trainer's grouping by length makes of all, the longest first.

    Its grouping needs 200 steps to work as it does on a large set: it sorts 50 at a time. So samples and order are those of its steps.
    """
    if len(lengths) < steps * batch_size:
        raise SystemExit(f"{len(lengths)} usable samples are too few for {steps} steps of {batch_size}: lower --steps or --batch-size.")
    order = list(LengthGroupedSampler(batch_size, lengths=list(lengths), generator=torch.Generator().manual_seed(0)))
    whole = [order[k : k + batch_size] for k in range(0, len(order) - batch_size + 1, batch_size)]
    whole.sort(key=lambda step: -sum(lengths[number] for number in step))
    return [number for k in range(steps) for number in whole[(2 * k + 1) * len(whole) // (2 * steps)]]


@contextmanager
def silence() -> Iterator[None]:
    """Both sides' own progress and notes, unseen; what goes wrong is an exception."""
    set_verbosity_error()
    disable_progress_bar()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def check_losses(job: Job) -> float:
    """Largest relative difference of our first losses from the Trainer's. Raises SystemExit where they are not the same."""
    expected = job.first_loss(BEST)
    found = {way: job.first_loss(way) for way in tqdm(OURS, desc="first losses", unit="run")}
    gap = max(abs(loss / expected - 1) for loss in found.values())
    if not gap <= SAME:
        raise SystemExit(f"the two sides do not do the same work: first losses {found}, the Trainer's {expected}")
    return gap


def alternate(job: Job) -> dict[str, list[Figures]]:
    """Figures of every round by way. Raises SystemExit where ways saw different numbers of tokens."""
    figures: dict[str, list[Figures]] = {way: [] for way in WAYS}
    turns = [(seed, way) for seed in range(job.args.rounds) for way in WAYS[seed % len(WAYS) :] + WAYS[: seed % len(WAYS)]]
    for seed, way in tqdm(turns, desc="runs in turn", unit="run"):
        figures[way].append(job.measure(way, seed))
    if len(counts := {own.tokens for found in figures.values() for own in found}) > 1:
        raise SystemExit(f"the ways were given different numbers of tokens in an epoch: {sorted(counts)}")
    return figures


def results(args: Args, figures: Mapping[str, Sequence[Figures]]) -> list[dict[str, Any]]:
    """Rows: speed of each of our ways over the Trainer at its best, of the first over its defaults, and the same of memory on a GPU."""
    device = "" if torch.cuda.is_available() else "cpu: "
    rows = []
    for way, other in [*((way, BEST) for way in OURS), (OURS_FIRST, DEFAULT), (DEFAULT, BEST)]:
        pairs = list(zip(figures[way], figures[other], strict=True))
        ratios = [a.rate / b.rate for a, b in pairs]
        row: dict[str, Any] = {"name": f"{device}tokens per second, {way}, over {other}", "value": round(statistics.median(ratios), 3)}
        row |= {"unit": "ratio", "better": "higher", "target": 1.3 if not device and (way, other) == (OURS_FIRST, BEST) else None}
        row |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
        if device and not args.workers:
            row["cpu_time_ratio"] = round(statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs), 3)
        row["tokens_per_second"] = {name: round(statistics.median(own.rate for own in figures[name]), 1) for name in (way, other)}
        row["padding"] = {name: round(1 - statistics.mean(own.tokens / own.positions for own in figures[name]), 4) for name in (way, other)}
        rows.append(row)
    for way in OURS if not device else ():
        gib = {name: max(own.memory or 0.0 for own in figures[name]) for name in (way, BEST)}
        row = {"name": f"peak memory, {way}, over {BEST}", "value": round(gib[way] / gib[BEST], 3), "unit": "ratio", "better": "lower"}
        rows.append(row | {"target": None, "gib": {name: round(most, 2) for name, most in gib.items()}})
    return rows


def plot(figures: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Tokens a second by way: a bar for the median, a dot for each round. Needs matplotlib (pip install 'llava_collab[eval]')."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from llava_collab.evaluation.plot import COLOURS

    drawing, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for place, (way, found) in enumerate(figures.items()):
        rates = [own.rate for own in found]
        axes.barh(place, statistics.median(rates), color=COLOURS[0 if way in OURS else 1], alpha=0.6)
        axes.plot(rates, [place] * len(rates), "o", color="black", markersize=3)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.set_xlabel("real tokens a second (bar: median, dots: rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def describe(args: Args) -> str:
    """The model in words."""
    sizes = args.sizes
    made = f"random, {sizes.layers} blocks of {sizes.width} channels, {sizes.vocabulary:,} tokens"
    return f"decoder: {args.language_model or made}; tower: {args.vision_tower or f'random, {sizes.image_tokens} image tokens'}"


def main(args: Args) -> None:
    """Check, measure, print, write."""
    if torch.cuda.device_count() > 1:
        raise SystemExit("the Trainer would spread its batches over all GPUs of this process: set CUDA_VISIBLE_DEVICES to one of them.")
    if args.batch_size % args.micro_batch_size:
        raise SystemExit("--batch-size has to be a multiple of --micro-batch-size, or the Trainer's steps would be others than ours.")
    if args.warmup > args.steps:
        raise SystemExit("--warmup may be at most --steps: a run warms up with samples of the epoch that counts.")
    with tempfile.TemporaryDirectory() as place:
        job = Job.open(args, Path(place))
        gap = check_losses(job)
        print(f"first losses agree to {gap:.1e}", flush=True)
        figures = alternate(job)
        rows = results(args, figures)
    for row in rows:
        print(f"{row['value']:>7.3f}  {row['name']}")
    about = {
        "model": describe(args),
        "trained": f"decoder and projector, {args.precision}" + (", gradient checkpointing" if args.gradient_checkpointing else ""),
        "data": "LLaVA-1.5's mix, made on the spot" if args.data is None else args.data.name,
        "tokens_a_sample": round(figures[BEST][0].tokens / args.samples, 1),
        "first_loss_difference": gap,
    }
    write_results(args.out, rows, **about, rounds=args.rounds)
    plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, default=GPU if torch.cuda.is_available() else Args(), description=__doc__))
