"""The recipe of a training run: every choice that shapes it, as frozen dataclasses whose field docstrings are the command line's help.

A recipe is written in YAML (`train/recipes/*.yaml`), read strictly by `recipe_file.py`, and saved, resolved, in the run folder. Field
defaults are LLaVA-1.5's stage-2 values where it has one (scripts/v1_5/finetune.sh).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llava_collab.models.build import ModelSpec


class RecipeError(ValueError):
    """A recipe that can't be meant as written; the message names the file or key and the cure."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


@dataclass(frozen=True)
class DataFile:
    """One file of conversations."""

    path: str
    """LLaVA JSON or JSONL file (relative to the current directory); or the index.json of shards, local or by URL (s3://, gs://, https://
    ...), or `pipe:COMMAND {shard}`, a command that prints the shards' file of that name."""
    image_root: str | None = None
    """Folder that the image paths in the file start from (default: the file's own folder); shards hold their pictures."""
    categories: tuple[str, ...] = ()
    """Only the samples of these categories (default: all)."""
    families: tuple[str, ...] = ()
    """Only the samples of these question families (default: all)."""
    repeat: int = 1
    """How often each sample of this file is seen in one epoch."""

    def __post_init__(self) -> None:
        _require(self.repeat >= 1, f"data.files: repeat of {self.path} must be at least 1, not {self.repeat}.")


@dataclass(frozen=True)
class DataRecipe:
    """What is learned from."""

    files: tuple[DataFile, ...]
    """The files, mixed in proportion to their size times `repeat`."""
    max_length: int = 2048
    """Longest sample in tokens, image tokens included; longer ones are skipped and counted."""
    blind: bool = False
    """Strip images and image marks (the twin run that shows what the pictures are worth)."""
    feature_cache: bool = False
    """Run the frozen vision tower once over every image and train from its stored output."""
    packing: Literal["auto", "on", "off"] = "off"
    """Several samples in one row, each with attention, guidance and weights of its own; the result stays the same. auto: where more than
    10 % of all positions are padding after grouping by length."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the samples can't be used."""
    shard_window: int | None = None
    """Draw from about so many shards at a time (default: 16 where a file's shards are remote; else one shuffle over everything)."""
    shard_cache: str | None = None
    """Folder for copies of remote shards, on a disk of this machine; ranks and runs share it (default: shards/ in the cache folder)."""
    shard_cache_gib: float = 64.0
    """Size that these copies may take together; the least recently used go first."""

    def __post_init__(self) -> None:
        _require(self.shard_window is None or self.shard_window >= 1, f"data.shard_window must be at least 1, not {self.shard_window}.")
        _require(self.shard_cache_gib > 0, f"data.shard_cache_gib must be positive, not {self.shard_cache_gib}.")
        _require(bool(self.files), "data.files is empty: name at least one file of conversations.")
        _require(self.max_length > 0, f"data.max_length must be positive, not {self.max_length}.")
        _require(0 <= self.max_bad_fraction < 1, f"data.max_bad_fraction must be in [0, 1), not {self.max_bad_fraction}.")


@dataclass(frozen=True)
class LoraRecipe:
    """peft's LoRA, merged at the end (where tune.llm is lora or lora4bit, or tune.projector is lora); LLaVA's finetune_lora.sh values."""

    r: int = 128
    """Rank."""
    alpha: int = 256
    """Scale: the update is alpha / r times B A."""
    dropout: float = 0.05
    """Dropout before A."""
    target: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers inside the language model's blocks that get an adapter; of the projector, both do."""

    def __post_init__(self) -> None:
        _require(self.r >= 1, f"tune.lora.r must be at least 1, not {self.r}.")
        _require(0 <= self.dropout < 1, f"tune.lora.dropout must be in [0, 1), not {self.dropout}.")
        _require(bool(self.target), "tune.lora.target is empty: name at least one linear layer.")


@dataclass(frozen=True)
class TuneRecipe:
    """Which parts learn. A part that the model does not have is skipped and printed as absent."""

    projector: Literal["full", "lora", "frozen"] = "full"
    """How the projector's two linear layers learn: all weights, adapters, or not."""
    visual_expert: bool = True
    """Train the hypernetwork of the visual expert."""
    language_expert: bool = True
    """Train the hypernetwork of the language expert."""
    adapter: bool = True
    """Train the model's own low-rank experts (model.adapter), which stay beside the weights; at optim.lr."""
    llm: Literal["full", "lora", "lora4bit", "frozen"] = "full"
    """How the language model learns: all weights, adapters, adapters on a 4-bit base (CUDA and bitsandbytes), or not."""
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    """Adapter settings."""
    unfreeze_vision_tower: bool = False
    """Train the vision tower too (the layers that the projector reads from)."""

    @property
    def adapted(self) -> frozenset[str]:
        """The parts that learn through adapters."""
        ways = {"llm": self.llm, "projector": self.projector}
        return frozenset(part for part, way in ways.items() if way in ("lora", "lora4bit"))

    def light(self, adapter: bool) -> bool:
        """Whether checkpoints hold what is trained alone: the rest can be built again. adapter: the model has one."""
        return bool(self.adapted) or (adapter and self.llm == "frozen")


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW with a cosine schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    mm_projector_lr: float | None = None
    """Peak learning rate of the projector, where it differs. A step moves a unit by up to this times the width of what it reads."""
    expert_lr_multiplier: float = 1.0
    """The hypernetworks learn at lr times this."""
    visual_expert_lr: float | None = None
    """Peak learning rate of the visual expert, where it differs: its inputs are often the widest, and at too high a rate it dies."""
    weight_decay: float = 0.0
    """AdamW's decay, on matrices only (biases and norms never decay)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_ratio: float = 0.03
    """Part of all steps that the learning rate rises from zero."""
    schedule: Literal["cosine"] = "cosine"
    """After the warm-up: half a cosine, towards zero at the end."""
    clip_norm: float = 1.0
    """Largest gradient norm, over all trained parameters."""
    expert_clip_norm: float | None = None
    """If set, the hypernetworks' gradient is clipped apart from the rest, at this norm."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be positive, not {self.lr}.")
        _require(self.clip_norm > 0, f"optim.clip_norm must be positive, not {self.clip_norm}.")
        _require(0 <= self.warmup_ratio < 1, f"optim.warmup_ratio must be in [0, 1), not {self.warmup_ratio}.")


@dataclass(frozen=True)
class RunRecipe:
    """Where, how long, on what."""

    out: str
    """Run folder: recipe.yaml, log.jsonl, checkpoints/, model/."""
    steps: int | None = None
    """Optimiser steps (give either this or epochs)."""
    epochs: float | None = None
    """Passes over the data (give either this or steps)."""
    batch_size: int = 128
    """Samples in one optimiser step, over all ranks and micro-batches."""
    micro_batch_size: int = 16
    """Samples in one forward pass; lower it when memory runs out: the result stays the same."""
    seed: int = 0
    """Seed of new weights, sample order and dropout."""
    engine: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """How weights, gradients and moments lie on the ranks: whole on each, in shards (torch's FSDP2), or DeepSpeed's ZeRO stage 2 or 3."""
    engine_config: str | None = None
    """JSON file of the engine's settings (default: llava_collab/training/engine_configs/<engine>.json)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: trained weights stay fp32, frozen weights and arithmetic are bfloat16."""
    compile: bool = False
    """Compile the decoder's blocks with torch.compile: a slow start, then faster steps (the result differs by rounding)."""
    checkpoint: Literal["whole", "sharded"] = "whole"
    """How checkpoints hold weights and moments: whole safetensors, which any engine takes up again, or (fsdp2) each rank's shards."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: int = 500
    """Optimiser steps between checkpoints; the last step is always saved."""
    save_first: bool = False
    """Save after step 1 as well, so that a smoke run meets a save that can't work at once."""
    keep_last: int = 2
    """Checkpoints to keep."""
    log_every: int = 1
    """Optimiser steps between lines of log.jsonl."""
    threads: int | None = None
    """CPU threads of torch (default: torch's own choice)."""
    num_workers: int = 0
    """Processes that load data."""
    stall_minutes: float = 5.0
    """Say which rank holds the run up, and where, when a phase of a step lasts longer than this."""
    timeout_minutes: float = 30.0
    """How long ranks wait for each other before they give the run up."""
    peak_tflops: float | None = None
    """Peak arithmetic of one device, for the logged MFU (default: the data sheet's, where the device is known; else none is logged)."""
    deadline_minutes: float | None = None
    """If set, save and stop cleanly (exit code 75) after this many minutes; the same command goes on from there."""

    def __post_init__(self) -> None:
        _require((self.steps is None) != (self.epochs is None), "run: give exactly one of steps and epochs.")
        for name in ("batch_size", "micro_batch_size", "save_every", "keep_last", "log_every"):
            _require(getattr(self, name) >= 1, f"run.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("stall_minutes", "timeout_minutes"):
            _require(getattr(self, name) > 0, f"run.{name} must be positive, not {getattr(self, name)}.")
        _require(self.checkpoint == "whole" or self.engine == "fsdp2", f"run.checkpoint sharded needs run.engine fsdp2, not {self.engine}.")
        length = self.steps if self.steps is not None else self.epochs
        _require(length is not None and length > 0, f"run.steps or run.epochs must be positive, not {length}.")


@dataclass(frozen=True)
class Recipe:
    """Model, data, what is tuned, how, and where."""

    model: ModelSpec
    """What is built."""
    data: DataRecipe
    """What is learned from."""
    tune: TuneRecipe
    """What learns."""
    optim: OptimRecipe
    """How it learns."""
    run: RunRecipe
    """Where and how long."""

    def __post_init__(self) -> None:
        _require(
            not (self.data.feature_cache and self.tune.unfreeze_vision_tower),
            "data.feature_cache stores the vision tower's output, so it can't be used with tune.unfreeze_vision_tower: switch one off.",
        )
        _require(
            not (self.tune.llm == "lora4bit" and self.model.adapter is not None),
            "tune.llm: lora4bit quantises plain linear layers, and model.adapter changes them: use tune.llm: frozen.",
        )
