"""From the recipe's files to steps: each item of the loader is this rank's share of one optimiser step, cut into micro-batches.

Loading a whole step at once keeps the resume simple (the position is the number of steps taken, however far workers read ahead) and
lets the tokens of a step be counted before its first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from llava_collab.data.collate import Collator
from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.data.samples import Sample, read_samples
from llava_collab.models.build import feature_cache
from llava_collab.training.recipe import DataRecipe, Recipe, RecipeError
from llava_collab.training.stop import outlive_signals

if TYPE_CHECKING:
    from llava_collab.training.opening import Student

LOADER_TIMEOUT = 1800  # seconds: a worker that gives nothing for so long is stuck


@dataclass(frozen=True)
class MicroBatches:
    """Collates a rank's share of a step: sorted by length (less padding), cut into micro-batches. Picklable, for workers."""

    collator: Collator
    size: int

    def __call__(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Batches of at most `size` samples; none for an empty share."""
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        return [self.collator(samples[k : k + self.size]) for k in range(0, len(samples), self.size)]


@dataclass(frozen=True)
class Share:
    """Every `ranks`-th index of each step, starting at `rank`."""

    sampler: GroupedBatchSampler
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.sampler:
            yield indices[self.rank :: self.ranks]


class Batches:
    """The endless steps of a run, resumable to the step."""

    def __init__(self, dataset: ConversationDataset, collate: MicroBatches, recipe: Recipe, rank: int, ranks: int) -> None:
        self._dataset = dataset
        self._sampler = GroupedBatchSampler(dataset.lengths, dataset.has_image, recipe.run.batch_size, recipe.run.seed)
        workers = recipe.run.num_workers
        self._loader = DataLoader(
            dataset,
            batch_sampler=Share(self._sampler, rank, ranks),  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=workers,
            timeout=LOADER_TIMEOUT if workers else 0,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(recipe.run.seed),  # else each start draws from the generator that dropout uses
        )
        self._steps: Iterator[list[dict[str, Any]]] | None = None
        self._taken = 0

    @property
    def samples(self) -> int:
        """Samples in one epoch."""
        return len(self._dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return len(self._sampler)

    @property
    def skipped(self) -> int:
        """Samples found bad so far, on this rank."""
        return sum(len(ids) for ids in self._dataset.skipped.values())

    def next_step(self) -> list[dict[str, Any]]:
        """This rank's micro-batches of the next optimiser step (an empty list where a last, small step leaves it nothing)."""
        if self._steps is None:
            self._steps = iter(self._loader)
        self._taken += 1
        return next(self._steps)

    def close(self) -> None:
        """End the loader's processes now; a rank that dies of an error would else wait 5 s for each."""
        self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data (not how far workers have read)."""
        return self._sampler.state_dict(taken=self._taken)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the steps taken; called before the first `next_step`. Raises ValueError where the data are others."""
        self._sampler.load_state_dict(state)
        self._taken = self._sampler.step


def open_batches(recipe: Recipe, student: Student, accelerator: Accelerator) -> Batches:
    """Read the recipe's files, fill the feature cache if asked for, and stand before the first step."""
    samples = read_all(recipe.data)
    cache = None
    if recipe.data.feature_cache and not recipe.data.blind:
        images = dict.fromkeys(path for sample in samples for path in sample.images) if accelerator.is_main_process else ()
        cache = feature_cache(student.model, student.processor, images, recipe.run.micro_batch_size)
        accelerator.wait_for_everyone()
    dataset = ConversationDataset(
        samples,
        student.processor,
        max_length=recipe.data.max_length,
        blind=recipe.data.blind,
        feature_cache=cache,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    tokenizer = student.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = MicroBatches(Collator(pad), recipe.run.micro_batch_size)
    return Batches(dataset, collate, recipe, accelerator.process_index, accelerator.num_processes)


def read_all(data: DataRecipe) -> list[Sample]:
    """All samples of all files, each file `repeat` times. Raises RecipeError for a file, a category or a family that is not there."""
    samples: list[Sample] = []
    for number, file in enumerate(data.files):
        try:
            found = read_samples(file.path, file.image_root)
        except FileNotFoundError as error:
            raise RecipeError(f"data.files[{number}]: no file {file.path}; paths are relative to the current directory.") from error
        for kind, wanted in (("category", file.categories), ("family", file.families)):
            if unknown := set(wanted) - {getattr(sample, kind) for sample in found}:
                raise RecipeError(f"data.files[{number}]: {file.path} has no sample of {kind} {sorted(unknown)}.")
            found = [sample for sample in found if not wanted or getattr(sample, kind) in wanted]
        samples += found * file.repeat
    return samples
