"""From the recipe's files to steps: each item of the loader is this rank's share of one optimiser step, cut into micro-batches.

Loading a whole step at once keeps the resume simple (the position is the number of steps taken, however far workers read ahead) and
lets the tokens of a step be counted before its first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader

from llava_collab.data.collate import Batch, Collator
from llava_collab.data.conversation import IGNORE_INDEX, IMAGE_MARK
from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.packing import Plan, one_a_row, packed
from llava_collab.data.places import ShardError
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.data.skips import Skip, SkipList
from llava_collab.models.build import feature_cache
from llava_collab.training.data_files import read_all, window
from llava_collab.training.packing import decide
from llava_collab.training.recipe import DataRecipe, Recipe, RecipeError
from llava_collab.training.stop import outlive_signals
from llava_collab.types import Turn

if TYPE_CHECKING:
    from llava_collab.training.opening import Student

IMAGES = ("pixel_values", "image_features")
SKIPPED = "skipped.jsonl"
LOADER_TIMEOUT = 1800  # seconds: a worker that gives nothing for so long is stuck


class LoaderError(RuntimeError):
    """A process that reads data died or hung."""


@dataclass(frozen=True)
class MicroBatches:
    """Collates a rank's share of a step: grouped by length (less padding), cut into micro-batches. Picklable, for workers."""

    collator: Collator
    size: int
    """Most samples in a micro-batch."""
    longest_row: int | None = None
    """Most positions in a row of several samples; None: one sample a row."""
    idle: dict[str, Any] | None = None
    """Where ranks have to keep step: a sample that teaches nothing, with an image, for batches without one."""

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Which samples go where, by their lengths."""
        return one_a_row(lengths, self.size) if self.longest_row is None else packed(lengths, self.size, self.longest_row)

    def __call__(self, samples: list[dict[str, Any]]) -> list[Batch]:
        """Batches of at most `size` samples; none for an empty share."""
        plan = self.plan([len(sample["input_ids"]) for sample in samples])
        return [self._batch([[samples[index] for index in row] for row in rows]) for rows in plan]

    def idle_batch(self) -> Batch | None:
        """A batch that runs every module and adds nothing to loss or gradient; None where ranks need not keep step."""
        return None if self.idle is None else self._collate([[self.idle]])

    def _batch(self, rows: list[list[dict[str, Any]]]) -> Batch:
        seen = any(key in sample for row in rows for sample in row for key in IMAGES)
        if self.idle is None or seen or not any(key in self.idle for key in IMAGES):
            return self._collate(rows)
        batch = self._collate([*rows, [self.idle]])
        batch["idle_rows"] = 1
        batch["sample_ids"].pop()
        return batch

    def _collate(self, rows: list[list[dict[str, Any]]]) -> Batch:
        return self.collator([sample for row in rows for sample in row]) if self.longest_row is None else self.collator.pack(rows)


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

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[list[Skip], list[Batch]]:
        return [skip for sample in samples for skip in sample["skipped"]], self.collate(samples)


class Batches:
    """The endless steps of a run, resumable to the step."""

    def __init__(self, dataset: ConversationDataset, collate: MicroBatches, recipe: Recipe, accelerator: Accelerator) -> None:
        """Raises RecipeError, on all ranks, where they do not all have the same samples."""
        self._dataset = dataset
        self._accelerator = accelerator
        self._sampler = _sampler(dataset, recipe)
        _same_everywhere(self._sampler.fingerprint, accelerator)
        workers = recipe.run.num_workers
        self._loader = DataLoader(
            dataset,
            batch_sampler=Share(self._sampler, accelerator.process_index, accelerator.num_processes),  # pyright: ignore[reportArgumentType]
            collate_fn=WithSkips(collate),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),  # copies to the device then need not be waited for
            timeout=LOADER_TIMEOUT if workers else 0,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(recipe.run.seed),  # else each start draws from the generator that dropout uses
        )
        self.idle = collate.idle_batch()
        self._steps: Iterator[tuple[list[Skip], list[Batch]]] | None = None
        self._found: list[Skip] = []
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

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step (an empty list where a last, small step leaves it nothing).

        Raises ShardError; LoaderError where a worker died.
        """
        if self._steps is None:
            self._steps = iter(self._loader)
        self._taken += 1
        try:
            self._found, micro_batches = next(self._steps)
            return micro_batches
        except ShardError as error:  # from a worker it comes wrapped in the worker's traceback
            raise ShardError(str(error).rsplit("ShardError: ", 1)[-1].strip()) from error
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise LoaderError(
                f"step {self._taken}: a process that reads data ended or hung ({error}). If the machine ran out of memory, lower "
                "run.num_workers; the same command goes on from the last checkpoint."
            ) from error

    def agree_on_skips(self) -> None:
        """Add the step's bad samples of all ranks to the list. Raises TooManyBadSamples, on all ranks, where they are more than allowed."""
        self.skips.add(self._of_all_ranks(self._found), self._taken)

    def _of_all_ranks(self, found: list[Skip]) -> list[Skip]:
        if self._accelerator.num_processes == 1:
            return found
        new = [skip for skip in found if self.skips.get(skip.index) is None]
        anywhere = torch.tensor(len(new), device=self._accelerator.device)
        torch.distributed.all_reduce(anywhere)
        return gather_object(new) if anywhere else []

    def close(self) -> None:
        """End the loader's processes now; a rank that dies of an error would else wait 5 s for each."""
        self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data (not how far workers have read)."""
        return self._sampler.state_dict(taken=self._taken) | {"skipped": self.skips.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the steps taken; called before the first `next_step`. Raises ValueError where the data are others."""
        self._sampler.load_state_dict(state)
        self.skips.load(state.get("skipped", []))
        self._taken = self._sampler.step


def open_batches(recipe: Recipe, student: Student, accelerator: Accelerator, lockstep: bool = False) -> Batches:
    """Read the recipe's files, fill the feature cache if asked for, and stand before the first step.

    lockstep: every rank has to run every module equally often.
    """
    samples = read_all(recipe.data)
    quiet = not accelerator.is_main_process
    skips = SkipList(len(samples), recipe.data.max_bad_fraction, None if quiet else Path(recipe.run.out) / SKIPPED, quiet)
    cache = None
    if recipe.data.feature_cache and not recipe.data.blind:
        images = dict.fromkeys(path for sample in samples for path in sample.images) if accelerator.is_main_process else ()
        tower = student.model.get_submodule("model.vision_tower").to(accelerator.device)  # the rest follows with the engine
        cache = feature_cache(student.model, student.processor, images, recipe.run.micro_batch_size)
        tower.to("cpu")
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
    text_config = student.model.model.language_model.config
    longest_row = decide(recipe, _sampler(dataset, recipe), accelerator.num_processes, text_config, accelerator.print)
    idle = idle_sample(student, recipe.data) if lockstep else None
    collate = MicroBatches(Collator(pad), recipe.run.micro_batch_size, longest_row, idle)
    return Batches(dataset, collate, recipe, accelerator)


def _sampler(dataset: ConversationDataset, recipe: Recipe) -> GroupedBatchSampler:
    run = recipe.run
    return GroupedBatchSampler(dataset.lengths, dataset.has_image, run.batch_size, run.seed, window(recipe.data, dataset.samples))


def idle_sample(student: Student, data: DataRecipe) -> dict[str, Any]:
    """A sample of one blank image without a supervised token, as the dataset would give it."""
    turns = (Turn("user", "." if data.blind else f"{IMAGE_MARK}\n."), Turn("assistant", "."))
    text = student.processor.encode_text(turns, n_images=int(not data.blind), max_length=None, sample_id="idle")
    ids = torch.tensor(text.input_ids)
    sample = {"sample_id": "", "category": "", "input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}
    sample["guidance_mask"] = torch.tensor(text.guidance_mask)
    if data.blind:
        return sample
    if data.feature_cache:
        width = student.model.get_submodule("model.multi_modal_projector").linear_1.in_features
        visual = student.model.config.visual
        tokens = int((ids == student.model.config.image_token_id).sum()) + int(visual is not None and visual.guidance == "cls")
        return sample | {"image_features": torch.zeros(1, tokens, width)}
    return sample | {"pixel_values": student.processor.pixel_values([Image.new("RGB", (32, 32))])}


def _same_everywhere(fingerprint: str, accelerator: Accelerator) -> None:
    """Ranks that see other samples would train on other steps without a word."""
    prints = gather_object([fingerprint]) if accelerator.num_processes > 1 else [fingerprint]
    if others := [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]:
        raise RecipeError(
            f"ranks {others} have other samples than rank 0 ({prints[others[0]]}, {prints[0]}): data files or pictures differ between "
            "nodes; llava-collab data check shows what is missing where."
        )
