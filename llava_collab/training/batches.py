"""From the recipe's files to steps: each item of the loader is this rank's share of one optimiser step, cut into micro-batches.

Loading a whole step at once keeps the resume simple (the position is the number of steps taken, however far workers read ahead) and
lets the tokens of a step be counted before its first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from llava_collab.data.collate import Collator
from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.places import ShardError
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.data.skips import Skip, SkipList
from llava_collab.models.build import feature_cache
from llava_collab.training.data_files import read_all, window
from llava_collab.training.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from llava_collab.training.opening import Student

SKIPPED = "skipped.jsonl"
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


@dataclass(frozen=True)
class WithSkips:
    """What `collate` makes of a share, and the bad samples that its items stand for."""

    collate: MicroBatches

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[list[Skip], list[dict[str, Any]]]:
        return [skip for sample in samples for skip in sample["skipped"]], self.collate(samples)


class Batches:
    """The endless steps of a run, resumable to the step."""

    def __init__(self, dataset: ConversationDataset, collate: MicroBatches, recipe: Recipe, accelerator: Accelerator) -> None:
        """Raises RecipeError, on all ranks, where they do not all have the same samples."""
        self._dataset = dataset
        self._accelerator = accelerator
        self._sampler = GroupedBatchSampler(
            dataset.lengths, dataset.has_image, recipe.run.batch_size, recipe.run.seed, window(recipe.data, dataset.samples)
        )
        _same_everywhere(self._sampler.fingerprint, accelerator)
        workers = recipe.run.num_workers
        self._loader = DataLoader(
            dataset,
            batch_sampler=Share(self._sampler, accelerator.process_index, accelerator.num_processes),  # pyright: ignore[reportArgumentType]
            collate_fn=WithSkips(collate),
            num_workers=workers,
            timeout=LOADER_TIMEOUT if workers else 0,
            generator=torch.Generator().manual_seed(recipe.run.seed),  # else each start draws from the generator that dropout uses
        )
        self._steps: Iterator[tuple[list[Skip], list[dict[str, Any]]]] | None = None
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
    def skips(self) -> SkipList:
        """The samples found bad so far, on all ranks."""
        return self._dataset.skips

    def next_step(self) -> list[dict[str, Any]]:
        """This rank's micro-batches of the next optimiser step (an empty list where a last, small step leaves it nothing).

        Raises TooManyBadSamples, on all ranks, where the step's bad samples are more than the limit leaves; ShardError.
        """
        if self._steps is None:
            self._steps = iter(self._loader)
        try:
            found, micro_batches = next(self._steps)
        except ShardError as error:  # from a worker it comes wrapped in the worker's traceback
            raise ShardError(str(error).rsplit("ShardError: ", 1)[-1].strip()) from error
        self._taken += 1
        self.skips.add(self._of_all_ranks(found), self._taken)
        return micro_batches

    def _of_all_ranks(self, found: list[Skip]) -> list[Skip]:
        if self._accelerator.num_processes == 1:
            return found
        new = [skip for skip in found if self.skips.get(skip.index) is None]
        anywhere = torch.tensor(len(new), device=self._accelerator.device)
        torch.distributed.all_reduce(anywhere)
        return gather_object(new) if anywhere else []

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data (not how far workers have read)."""
        return self._sampler.state_dict(taken=self._taken) | {"skipped": self.skips.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the steps taken; called before the first `next_step`. Raises ValueError where the data are others."""
        self._sampler.load_state_dict(state)
        self.skips.load(state.get("skipped", []))
        self._taken = self._sampler.step


def open_batches(recipe: Recipe, student: Student, accelerator: Accelerator) -> Batches:
    """Read the recipe's files, fill the feature cache if asked for, and stand before the first step."""
    samples = read_all(recipe.data)
    quiet = not accelerator.is_main_process
    skips = SkipList(len(samples), recipe.data.max_bad_fraction, None if quiet else Path(recipe.run.out) / SKIPPED, quiet)
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
        skips=skips,
    )
    tokenizer = student.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = MicroBatches(Collator(pad), recipe.run.micro_batch_size)
    return Batches(dataset, collate, recipe, accelerator)


def _same_everywhere(fingerprint: str, accelerator: Accelerator) -> None:
    """Ranks that see other samples would train on other steps without a word."""
    prints = gather_object([fingerprint]) if accelerator.num_processes > 1 else [fingerprint]
    if others := [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]:
        raise RecipeError(
            f"ranks {others} have other samples than rank 0 ({prints[others[0]]}, {prints[0]}): data files or pictures differ between "
            "nodes; llava-collab data check shows what is missing where."
        )
