"""How a run begins and ends: process set-up, the run folder, the model to train, and the plain model folder that comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from transformers.utils.logging import disable_progress_bar

from llava_collab.files import locked, publish, read_json, write_json
from llava_collab.models.build import build, load
from llava_collab.models.delta import LoraFactors, lora_factors, save_delta
from llava_collab.training.checkpoint import verify
from llava_collab.training.components import EXPERTS, Named, cast_frozen, choose_trainable, component_of
from llava_collab.training.engines import SHARDS, DataParallel
from llava_collab.training.lora import add_adapters, merge_adapters, quantise, require_4bit
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.recipe_file import load_recipe, refuse_other_recipe, save_recipe

TRAINABLE = "trainable.safetensors"


def start(recipe: Recipe) -> Accelerator:
    """Threads, seed, device and ranks. Raises RuntimeError for an engine that the loop does not speak."""
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    disable_progress_bar()  # transformers shows one for every shard it writes; the run has its own
    _meet_again(timedelta(minutes=recipe.run.timeout_minutes))
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.run.timeout_minutes))
    precision = "bf16" if recipe.run.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # each would train alone and write to the same folder
        raise RuntimeError(f"launched as {launched} processes, but {accelerator.num_processes} joined; use torchrun or accelerate launch.")
    engine = accelerator.distributed_type.name
    if engine not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise RuntimeError(f"run.engine chooses what shards the model, not the launcher ({engine}): start with torchrun or plain python.")
    set_seed(recipe.run.seed)
    return accelerator


def _meet_again(timeout: timedelta) -> None:
    """After a restart by torchrun on one node: set the process group up with keys of its own.

    torchrun's restarts share one store, in which gloo finds the addresses of processes that are dead. Agents of several nodes may count
    restarts differently, so there the launcher has to switch the sharing off (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as ours do).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if attempt == "0" or not one_node or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    own = PrefixStore(f"attempt-{attempt}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=timeout)


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """One training at a time in a run folder; the kernel frees it when its holder dies, however. Only rank 0 holds it.

    Raises RecipeError where another process trains there (a script that was killed can leave its child running).
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run / ".lock"))
        except BlockingIOError:
            raise RecipeError(f"another process is training in {run}: wait for it, stop it, or give another run.out.") from None
        yield


def open_run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Make or check the run folder; False if the run is finished. Raises RecipeError if it belongs to another recipe."""
    run = Path(recipe.run.out)
    saved = run / "recipe.yaml"
    refuse_other_recipe(run, recipe)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_recipe(recipe, saved)
    if (run / "finished.json").exists():
        accelerator.print(f"{run} is finished ({read_json(run / 'finished.json')['step']} steps); the model is in {run / 'model'}.")
        return False
    return True


@dataclass
class Student:
    """The model that learns, with what goes with it."""

    model: Any
    processor: Any
    trainable: Named
    tuner: LoraModel | None
    light: bool
    """See `TuneRecipe.light`."""

    def gather(self, engine: DataParallel) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the weights, on the main process ({} elsewhere): all; or of a light one those that are trained."""
        return engine.gather(trained_only=self.light)

    def write(self, folder: Path, engine: DataParallel, tensors: dict[str, torch.Tensor]) -> None:
        """Gathered weights for a checkpoint: a loadable model folder; of a light one the trained ones only."""
        if not self.light:
            engine.whole(tensors).save_pretrained(folder)
        else:
            save_file(tensors, folder / TRAINABLE)
        self.processor.save_pretrained(folder)


def open_student(recipe: Recipe, checkpoint: Path | None, device: torch.device) -> Student:
    """Build the recipe's model, or take a checkpoint's weights; freeze what the recipe freezes. An engine puts it on the device."""
    if recipe.tune.llm == "lora4bit":
        require_4bit()
    from_shards = checkpoint is not None and (checkpoint / SHARDS).is_dir()  # the engine fills them in
    from_light = checkpoint is not None and (checkpoint / TRAINABLE).is_file()
    if checkpoint is None or from_light or from_shards:
        model, processor = build(recipe.model, seed=recipe.run.seed)
    else:
        model, processor = load(checkpoint, dtype=torch.float32)
    if recipe.tune.llm == "lora4bit":
        quantise(model, device)
    tuner = add_adapters(model, recipe.tune) if recipe.tune.adapted else None
    trainable = choose_trainable(model, recipe.tune)
    if from_light and checkpoint is not None:
        load_trainable(trainable, load_file(checkpoint / TRAINABLE))
    if recipe.run.precision == "bf16":
        cast_frozen(model, torch.bfloat16)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.run.compile:
        for block in model.model.language_model.layers:
            block.compile(dynamic=True)
    model.train()
    model.get_submodule("model.vision_tower").eval()  # its batch statistics, where it has any, are never those of a step
    return Student(model, processor, trainable, tuner, recipe.tune.light(model.config.adapter is not None))


@torch.no_grad()
def load_trainable(trainable: Named, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved values into the trainable parameters; ValueError unless the names are the same."""
    if tensors.keys() != trainable.keys():
        odd = sorted(tensors.keys() ^ trainable.keys())
        raise ValueError(f"the saved weights are not those that this recipe trains; they differ in {odd[:5]}.")
    for name, parameter in trainable.items():
        parameter.copy_(tensors[name])


def rebuilt(recipe: Recipe, tensors: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, LoraFactors]]:
    """The fp32 model that the trained weights of a light run stand for, and the LoRA factors that were merged into it.

    Factors are first rounded to the run's precision, that of the model folder, so that a delta in that precision holds the same model.
    """
    model, _ = build(recipe.model, seed=recipe.run.seed)
    tuner = add_adapters(model, recipe.tune) if recipe.tune.adapted else None
    load_trainable(choose_trainable(model, recipe.tune), tensors)
    if tuner is None:
        return model, {}
    dtype = torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    factors = lora_factors(model, dtype)
    return merge_adapters(tuner), factors


def finish(recipe: Recipe, student: Student, engine: DataParallel, tensors: dict[str, torch.Tensor], step: int) -> Path:
    """Write `<run>/model`, a plain model folder of the gathered weights in the run's precision (experts fp32); mark the run finished.

    What a light run trained is put into the recipe's base built anew (LoRA is merged), so that a base in fewer bits leaves no trace.
    """
    run = Path(recipe.run.out)
    model: nn.Module = rebuilt(recipe, tensors)[0] if student.light else engine.whole(tensors)
    if recipe.run.precision == "bf16":
        for name, tensor in [*model.named_parameters(), *model.get_submodule("model.vision_tower").named_buffers("model.vision_tower")]:
            if tensor.is_floating_point() and component_of(name) not in EXPERTS:  # batch statistics too: cast_frozen trained with such
                tensor.data = tensor.data.to(torch.bfloat16)
    if student.tuner is not None and recipe.run.checkpoint == "sharded":  # `store_delta` needs the factors whole
        save_file(tensors, run / TRAINABLE)
    temporary = run / ".model.tmp"
    model.save_pretrained(temporary)  # pyright: ignore[reportCallIssue]
    student.processor.save_pretrained(temporary)
    verify(temporary, dict(model.named_parameters()))
    publish(temporary, run / "model")
    write_json(run / "finished.json", {"step": step})
    return run / "model"


def store_delta(run: Path, folder: Path, base: Path | None = None, licence: str = "other") -> Path:
    """Write a finished run's model to `folder` as its difference from what it started from; adapters as their factors.

    base: the same weights in another place than the recipe's (a released folder). Raises RecipeError for a run that is not finished,
    and ValueError (by `save_delta`) where `base` has other weights or `folder` is something else.
    """
    if not (run / "finished.json").is_file():
        raise RecipeError(f"{run} is no finished run (it has no finished.json); train it to the end first.")
    recipe = load_recipe(run / "recipe.yaml")
    factors = None
    if recipe.tune.adapted:
        last = run / "checkpoints" / f"step-{read_json(run / 'finished.json')['step']}" / TRAINABLE
        factors = rebuilt(recipe, load_file(last if last.is_file() else run / TRAINABLE))[1]
    model, processor = load(run / "model")
    return save_delta(model, processor, folder, base or recipe.model, seed=recipe.run.seed, lora=factors, licence=licence)
