"""The two loops that benchmarks/loop.py compares, each run under a watch: train/train.py's, and transformers' `Trainer`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from llava_collab.data.collate import Collator
from llava_collab.training.batches import Batches
from llava_collab.training.components import cast_frozen, choose_trainable
from llava_collab.training.opening import open_run, start
from llava_collab.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figures:
    """Of one run: the counted steps, and the peak memory of all of it."""

    seconds: float
    cpu_seconds: float
    tokens: int
    positions: int
    """Tokens and padding."""
    memory: float | None
    """GiB, on a GPU: the most that was allocated."""

    @property
    def rate(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds


class Watch:
    """Counts what a model is given in the steps `first` to `last` (from 1), and times them, from the data of the first one on."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.seconds = self.cpu_seconds = 0.0
        self._tokens: Any = 0
        self.positions = 0

    def attach(self, model: nn.Module) -> None:
        """Look at every forward pass of `model`; nothing waits for the device."""
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        mask_BT = inputs["attention_mask"]
        self._tokens = self._tokens + mask_BT.sum()
        self.positions += mask_BT.numel()

    def begin(self) -> None:
        """The first step has its data."""
        self._tokens, self.positions = 0, 0
        _wait()
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The last step is done."""
        _wait()
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began[0], time.process_time() - self._began[1]

    @property
    def tokens(self) -> int:
        """Attended ones."""
        return int(self._tokens)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class EnoughError(Exception):
    """All steps that are wanted are done."""


class Paced:
    """The loop's batches; the watch is told of the first and the last counted step, and then the run ends, before it saves."""

    def __init__(self, batches: Batches, watch: Watch) -> None:
        self._batches, self._watch, self._taken = batches, watch, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def next_step(self) -> Any:
        """As `Batches.next_step`."""
        if self._taken == self._watch.last:
            self._watch.end()
            raise EnoughError
        step = self._batches.next_step()
        self._taken += 1
        if self._taken == self._watch.first:
            self._watch.begin()
        return step


@cache
def train_program() -> ModuleType:
    """train/train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def our_loop(recipe: Recipe, watch: Watch, place: int) -> float:
    """Run train/train.py's loop to the watch's last step, with the data from their step `place` (from 0) on.

    Returns the loss of the first step, as it stands in the log.
    """
    program = train_program()
    accelerator = start(recipe)
    open_run(recipe, accelerator)
    run, done = program.open_loop(recipe, accelerator)
    watch.attach(run.student.model)
    run.batches.load_state_dict(run.batches.state_dict() | {"step": place})
    run.batches = Paced(run.batches, watch)
    try:
        program.learn(run, done)
    except EnoughError:
        pass
    return json.loads((Path(recipe.run.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]


@dataclass(frozen=True)
class Plain:
    """Pads to the longest; what stock LLaVA takes. At module level, for workers."""

    collator: Collator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            key: value for key, value in self.collator(samples).items() if key in ("input_ids", "attention_mask", "labels", "pixel_values")
        }


class Marks(TrainerCallback):
    """Tells the watch of the first and the last counted step, and stops there."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.watch.first - 1:
            self.watch.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.watch.last:
            self.watch.end()
            control.should_training_stop = True


def best_settings(workers: int) -> dict[str, Any]:
    """The Trainer's settings that make it fastest here, beside the order of the data (in transformers 5.17 to 5.23)."""
    return {
        "dataloader_num_workers": workers,
        "accelerator_config": {"non_blocking": True},  # beside pinned memory, its default
        "logging_nan_inf_filter": False,  # else it waits for each micro-batch's loss
    }


def trainer_loop(recipe: Recipe, settings: Mapping[str, Any], dataset: Dataset[Any], pad: int, watch: Watch) -> float:
    """Train stock LLaVA with the Trainer to the watch's last step, taking the samples in order; returns the mean loss of all steps."""
    run, optim = recipe.run, recipe.optim
    model: Any = LlavaForConditionalGeneration.from_pretrained(str(recipe.model.init_from), dtype=torch.float32)
    choose_trainable(model, recipe.tune)
    if run.precision == "bf16":
        cast_frozen(model, torch.bfloat16)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    watch.attach(model)
    arguments = TrainingArguments(
        output_dir=run.out,
        per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=run.batch_size // run.micro_batch_size,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=optim.lr,
        lr_scheduler_type="cosine",
        max_grad_norm=optim.clip_norm,
        optim="adamw_torch_fused",
        bf16=run.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator takes out what the model does not know
        **settings,
    )
    trainer = Trainer(model, arguments, Plain(Collator(pad)), dataset, callbacks=[Marks(watch)])
    return trainer.train().training_loss
