"""How much padding packed rows save, and how much faster training is for it.

    python benchmarks/packing.py                      writes benchmarks/results/packing.json
    python benchmarks/packing.py --data FILE.json     over conversations of your own

Without --data the conversations are made on the spot: pictures and words in the numbers that CMT-open's training samples have, the words
at random. Padding is that of all steps of an epoch, as the training loop cuts them: grouped by length, and packed. Speed is that of
forward and backward over the same steps, packed and unpacked in turn in one process, each pair one ratio; the median counts. On a CPU
that others use as well, the ratio of CPU seconds, given beside, is the one to believe. Weights are random, pictures are features drawn
at random: neither changes the time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoConfig

from llava_collab.data.collate import Collator
from llava_collab.data.packing import padding_share
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.data.samples import Sample, read_samples
from llava_collab.evaluation.environment import write_results
from llava_collab.models import HyperLlavaForConditionalGeneration, HyperLlavaProcessor
from llava_collab.training.batches import MicroBatches
from llava_collab.training.engines import DataParallel
from llava_collab.training.step import accumulate, count
from llava_collab.types import Turn

ROOT = Path(__file__).resolve().parent.parent
KINDS = (  # of CMT-open's training samples: pictures, fewest and most words of the question, of the answer
    (1, (4, 10), (1, 42)),
    (1, (3, 10), (1, 1)),
    (1, (6, 14), (1, 1)),
    (1, (3, 10), (1, 1)),
    (1, (3, 9), (5, 9)),
    (1, (3, 11), (1, 2)),
    (3, (3, 25), (10, 32)),
)
WORDS = "the a red cat dog tree house is are on under of and two picture where what left right small in his went home saw".split()


@dataclass(frozen=True)
class Args:
    """Measure packed rows against one sample a row."""

    model: Path = ROOT / "checkpoints" / "hyperllava-smol"
    """Model folder: its architecture and its processor are used, not its weights."""
    data: Path | None = None
    """LLaVA JSON or JSONL file (default: conversations made on the spot); the pictures themselves are not read."""
    samples: int = 4000
    """Conversations of an epoch (of a file: at most)."""
    batch_size: int = 32
    """Samples of an optimiser step."""
    micro_batch_sizes: tuple[int, ...] = (8, 16, 32)
    """Samples of a micro-batch; each is measured."""
    longest_row: int = 512
    """Most positions of a packed row (a recipe's data.max_length)."""
    steps: int = 3
    """Steps that are timed; 0 measures padding alone."""
    rounds: int = 3
    """How often each step is timed in both ways."""
    out: Path = ROOT / "benchmarks" / "results" / "packing.json"
    """Result file."""


@dataclass(frozen=True)
class Speed:
    """Packed over unpacked."""

    wall: float
    """Ratio of tokens per second, median over pairs."""
    cpu: float
    """The same of CPU seconds."""
    tokens_per_second: dict[str, float]
    """Median by way."""


def invented(number: int) -> list[Sample]:
    """Conversations of the kinds above, all kinds alike; always the same ones."""
    rng = random.Random(0)  # noqa: S311 - lengths, not secrets

    def words(between: tuple[int, int]) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(*between)))

    made = []
    for index in range(number):
        pictures, asked, answered = KINDS[index % len(KINDS)]
        turns = (Turn("user", "<image>\n" * pictures + words(asked) + "?"), Turn("assistant", words(answered) + "."))
        made.append(Sample(f"made-{index}", (Path("none"),) * pictures, turns))
    return made


class Encoded:
    """Conversations as the collator takes them."""

    def __init__(self, samples: Sequence[Sample], processor: HyperLlavaProcessor, width: int) -> None:
        self._samples, self._width, self._tokens = samples, width, processor.tokens_per_image
        rows = tqdm(samples, desc="encoding", unit="sample")
        self._texts = [processor.encode_text(s.turns, n_images=len(s.images), sample_id=s.id) for s in rows]
        self.lengths = [len(text.input_ids) for text in self._texts]
        self.has_image = [bool(sample.images) for sample in samples]

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, sample = self._texts[index], self._samples[index]
        item: dict[str, Any] = {"sample_id": sample.id, "input_ids": torch.tensor(text.input_ids), "labels": torch.tensor(text.labels)}
        item["guidance_mask"] = torch.tensor(text.guidance_mask)
        if sample.images:
            item["image_features"] = torch.randn(len(sample.images), self._tokens, self._width)
        return item


def speed(args: Args, model: Any, encoded: Encoded, steps: Sequence[Sequence[int]], ways: dict[str, MicroBatches]) -> Speed:
    """Time every step in both ways, in turn."""
    accelerator = Accelerator(cpu=True)
    engine = DataParallel(None, accelerator)  # pyright: ignore[reportArgumentType]  (nothing is updated, so no recipe is read)
    engine.model = model
    made = [{way: collate([encoded[index] for index in step]) for way, collate in ways.items()} for step in steps[: args.steps]]
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(-1, args.rounds * len(made)), desc="steps in both ways", unit="step"):  # the first of a process is slow
        step = made[max(number, 0) % len(made)]
        for way in list(ways) if number % 2 else list(ways)[::-1]:
            counts = count(step[way], accelerator)
            start, cpu_start = time.perf_counter(), time.process_time()
            accumulate(engine, step[way], counts.supervised)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            model.zero_grad(set_to_none=True)
            if number >= 0:
                wall[way].append(seconds)
                cpu[way].append(cpu_seconds)
                rates[way].append(counts.tokens / seconds)
    ratios = [
        statistics.median(plain / packed for plain, packed in zip(took["unpacked"], took["packed"], strict=True)) for took in (wall, cpu)
    ]
    return Speed(ratios[0], ratios[1], {way: statistics.median(found) for way, found in rates.items()})


def main(args: Args) -> None:
    """Measure, print, write."""
    processor = HyperLlavaProcessor.from_pretrained(args.model, backend="pil")
    config: Any = AutoConfig.from_pretrained(args.model)
    model: Any = HyperLlavaForConditionalGeneration(config).train()
    model.requires_grad_(True)
    samples = read_samples(args.data)[: args.samples] if args.data else invented(args.samples)
    encoded = Encoded(samples, processor, model.model.multi_modal_projector.linear_1.in_features)
    sampler = GroupedBatchSampler(encoded.lengths, encoded.has_image, args.batch_size)
    steps = sampler.batches(0)
    shares = [[encoded.lengths[index] for index in step] for step in steps]
    rows: list[dict[str, Any]] = []
    for size in args.micro_batch_sizes:
        collator = Collator(processor.tokenizer.pad_token_id)
        ways = {"unpacked": MicroBatches(collator, size), "packed": MicroBatches(collator, size, args.longest_row)}
        padding = {way: padding_share((lengths, collate.plan(lengths)) for lengths in shares) for way, collate in ways.items()}
        cut = f"micro-batches of {size} of {args.batch_size}"
        line = f"{cut}: padding {padding['unpacked']:.1%} grouped by length, {padding['packed']:.1%} packed"
        name = f"padding in packed rows, {cut}"
        rows.append({"name": name, "value": round(padding["packed"], 4), "unit": "share", "better": "lower", "target": 0.1})
        rows[-1]["grouped_by_length"] = round(padding["unpacked"], 4)
        if args.steps:
            found = speed(args, model, encoded, steps[1:], ways)  # not the first: it has the longest sample
            rates = {way: round(rate, 1) for way, rate in found.tokens_per_second.items()}
            line += f"; tokens/s packed / unpacked {found.wall:.2f} (CPU time: {found.cpu:.2f})"
            rows.append({"name": f"tokens per second of packed over unpacked rows, {cut}", "value": round(found.wall, 3)})
            rows[-1] |= {
                "unit": "ratio",
                "better": "higher",
                "target": 1.0,
                "cpu_time_ratio": round(found.cpu, 3),
                "tokens_per_second": rates,
            }
        print(line, flush=True)
    source = "made on the spot" if args.data is None else args.data.name
    model = f"{args.model.name}'s architecture, fp32, all but the vision tower learns"
    write_results(args.out, rows, data=source, samples=len(samples), model=model)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
