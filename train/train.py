"""Train a LLaVA or HyperLLaVA by a recipe: alignment or instruction tuning, full, LoRA or experts only.

    python train/train.py RECIPE.yaml [--optim.lr 1e-3 ...]       torchrun --nproc-per-node 8 train/train.py RECIPE.yaml

The same command resumes a run that was stopped, exactly (on CPU bit for bit), and says so when there is nothing left to do.
Exit codes: 0 finished, 1 error, 75 deadline reached, 130 / 143 stopped by SIGINT / SIGTERM after saving.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from llava_collab.data.conversation import SampleError
from llava_collab.data.places import ShardError
from llava_collab.data.skips import TooManyBadSamples
from llava_collab.files import read_json, write_json
from llava_collab.training.batches import Batches, LoaderError, open_batches
from llava_collab.training.checkpoint import CheckpointError, Checkpoints
from llava_collab.training.components import IMAGE_ONLY, learning_rate_factor, table
from llava_collab.training.engines import SHARDS, DataParallel, Fsdp2, choose_engine
from llava_collab.training.guards import Coverage, CoverageError, LossSpikes, NonFiniteError, check_finite
from llava_collab.training.log import ExpertHealth, RunLog
from llava_collab.training.meter import Meter
from llava_collab.training.opening import Student, exclusive, finish, open_run, open_student, start
from llava_collab.training.preflight import PreflightError, meeting, preflight
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.recipe_file import parse_command
from llava_collab.training.state import load_moments, load_random, save_moments, save_random
from llava_collab.training.step import Counts, EmptyStepError, accumulate, count, level, total_loss
from llava_collab.training.stop import Stopper, run_launched
from llava_collab.training.watchdog import WAITING, Watchdog, lost_contact

CURABLE = (
    RecipeError,
    PreflightError,
    SampleError,
    ShardError,
    TooManyBadSamples,
    CheckpointError,
    EmptyStepError,
    NonFiniteError,
    CoverageError,
)
"""Errors that a user can cure: told in one line."""


@dataclass
class Run:
    """All that the loop works with."""

    recipe: Recipe
    accelerator: Accelerator
    student: Student
    engine: DataParallel
    batches: Batches
    meter: Meter
    checkpoints: Checkpoints
    steps: int


def train(recipe: Recipe) -> int:
    """The whole run; returns the exit code."""
    with meeting("all ranks to join"):
        accelerator = start(recipe)
    preflight(recipe, accelerator)
    if not open_run(recipe, accelerator):
        return 0
    run, done = open_loop(recipe, accelerator)
    student, engine, batches = run.student, run.engine, run.batches
    accelerator.print(f"{batches.samples:,} samples, {run.steps:,} steps of {recipe.run.batch_size}, from step {done + 1}")

    # The loop, then a plain model folder
    code = learn(run, done)
    if len(batches.skips):
        accelerator.print(batches.skips.text())
    weights = student.gather(engine) if code == 0 else {}
    if code == 0 and accelerator.is_main_process:
        merged = "" if student.tuner is None else " (adapters merged into the base; the last checkpoint keeps them apart)"
        print(f"finished: the model is in {finish(recipe, student, engine, weights, run.steps)}{merged}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return code


def open_loop(recipe: Recipe, accelerator: Accelerator) -> tuple[Run, int]:
    """All that the loop works with, as an earlier start left it, and the steps that are done. The run folder is there (`open_run`)."""
    checkpoints = Checkpoints(Path(recipe.run.out), recipe.run.keep_last, accelerator)
    saved = checkpoints.newest_for_all(accelerator.print)

    # The model, and which of its parts learn
    student = open_student(recipe, saved, accelerator.device)
    accelerator.print(table(student.model))

    # Data, the engine with its optimiser, and how far an earlier start came
    engine = choose_engine(recipe, accelerator)
    batches = open_batches(recipe, student, accelerator, engine.lockstep)
    steps = recipe.run.steps or math.ceil((recipe.run.epochs or 0) * batches.steps_per_epoch)
    meter = Meter(student.model, recipe, accelerator)
    engine.start(student.model, student.trainable)
    run = Run(recipe, accelerator, student, engine, batches, meter, checkpoints, steps)
    return run, resume(run, saved) if saved else 0


def learn(run: Run, done: int) -> int:
    """Steps `done` + 1 to the last; returns 0, or the exit code of an early stop (after saving)."""
    recipe, accelerator, engine = run.recipe, run.accelerator, run.engine
    exempt = IMAGE_ONLY if recipe.data.blind else frozenset()
    if exempt:
        accelerator.print(f"blind run: {', '.join(sorted(exempt))} see no image, so they are not expected to learn")
    coverage = Coverage(engine, exempt)
    health = ExpertHealth(run.student.model)
    stopper, spikes = Stopper(recipe.run.deadline_minutes), LossSpikes()
    run.meter.start()
    log = RunLog(Path(recipe.run.out), done, run.steps, accelerator.is_main_process)
    dog = Watchdog(Path(recipe.run.out), accelerator.process_index, 60 * recipe.run.stall_minutes, tqdm.write)
    try:
        for step in range(done + 1, run.steps + 1):
            dog.step = step
            with dog.phase("reading data"), run.meter.waiting():
                micro_batches = run.batches.next_step()
            with dog.phase(WAITING):
                run.batches.agree_on_skips()
                counts = count(micro_batches, accelerator, stop=stopper.asked)
                micro_batches = level(micro_batches, run.batches.idle, accelerator)
            logged = step % recipe.run.log_every == 0 or step in (1, run.steps)
            health.watch(logged)

            # The gradient: of the loss over all supervised tokens of the step, on all ranks
            with dog.phase("computing"):
                losses = accumulate(engine, micro_batches, counts.supervised)
            with dog.phase(WAITING):
                missing = engine.reduce()
                loss, norms = total_loss(losses, accelerator), engine.norms()
            sample_ids = [batch["sample_ids"] for batch in micro_batches]
            check_finite(step, loss, losses, sample_ids, norms, accelerator, Path(recipe.run.out))
            coverage.after_backward(step, missing, counts.images > 0)

            # The update
            rates = set_rates(engine.param_groups, learning_rate_factor(step, run.steps, recipe.optim.warmup_ratio))
            engine.update(norms)
            coverage.after_step(step, rates, counts.images > 0)

            row = log_row(step, loss, rates, norms, counts) | run.meter.read(counts) | {"skipped": len(run.batches.skips)}
            if (usual := spikes.look(loss)) is not None:
                tell_spike(run, step, loss, usual, losses, sample_ids)
            if logged:
                row["experts"] = health.read()
                for alarm in health.alarms(row["experts"]):
                    log.say(f"step {step}: {alarm}")
            log.step(row, write=logged)

            stopped = counts.stop > 0
            if step % recipe.run.save_every == 0 or step == run.steps or stopped or (recipe.run.save_first and step == 1):
                with dog.phase("saving"):
                    log.say(f"saved {save(run, step)}")
            if stopped and step < run.steps:
                log.say(f"stopped after step {step} of {run.steps}; run the same command to go on")
                return stopper.exit_code
    finally:
        dog.close()
        run.batches.close()
        log.close()
        stopper.release()
    for line in coverage.unchecked():
        accelerator.print(line)
    return 0


def set_rates(groups: list[dict[str, Any]], factor: float) -> dict[str, float]:
    """Set every group's learning rate to its peak times `factor`; returns the rate by part."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["component"]: group["lr"] for group in groups}


def log_row(step: int, loss: float, rates: dict[str, float], norms: dict[str, torch.Tensor], counts: Counts) -> dict[str, Any]:
    """What log.jsonl keeps of a step. `grad_norm` is before clipping."""
    return {
        "step": step,
        "loss": loss,
        "lr": rates,
        "grad_norm": {component: float(norm) for component, norm in norms.items()},
        "supervised_tokens": counts.supervised,
        "supervised_fraction": counts.supervised / counts.tokens,
        "padding_share": 1 - counts.tokens / counts.positions,
        "samples": counts.samples,
        "images": counts.images,
    }


def tell_spike(run: Run, step: int, loss: float, usual: float, losses: list[torch.Tensor], sample_ids: list[list[str]]) -> None:
    """Say that the loss jumped, and keep what was in the step in `<run>/spikes.jsonl`; all ranks call it."""
    own = [{"loss": float(part), "sample_ids": ids} for part, ids in zip(losses, sample_ids, strict=True)]
    ranks = gather_object([own]) if run.accelerator.num_processes > 1 else [own]
    if run.accelerator.is_main_process:
        with (Path(run.recipe.run.out) / "spikes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, "median_before": usual, "micro_batches_by_rank": ranks}) + "\n")
        tqdm.write(f"step {step}: the loss jumped to {loss:.3g} (median before: {usual:.3g}); its samples are in spikes.jsonl")


def save(run: Run, step: int) -> Path:
    """A checkpoint: random states of every rank, the rest from the main process."""
    engine, sharded = run.engine, run.recipe.run.checkpoint == "sharded"
    weights, moments = ({}, {}) if sharded else (run.student.gather(run.engine), run.engine.moments())  # ranks meet here

    def write(folder: Path) -> None:
        if sharded and isinstance(engine, Fsdp2):
            engine.save_shards(folder / SHARDS)  # fails on all ranks together; so first
        elif run.accelerator.is_main_process:
            run.student.write(folder, engine, weights)
            save_moments(moments, folder)
        if run.accelerator.is_main_process:
            write_json(folder / "state.json", {"step": step, "batches": run.batches.state_dict(), "torch": torch.__version__})
        save_random(folder, run.accelerator.process_index)

    return run.checkpoints.save(step, write, {name: weights[name] for name in run.student.trainable if name in weights})


def resume(run: Run, saved: Path) -> int:
    """Put everything back as it was when `saved` was written (the weights already are); returns its step."""
    state = read_json(saved / "state.json")
    if (saved / SHARDS).is_dir():
        if not isinstance(run.engine, Fsdp2):
            raise CheckpointError(f"{saved} holds shards, which only run.engine fsdp2 takes up again (on any number of ranks).")
        run.engine.load_shards(saved / SHARDS)
    else:
        run.engine.set_moments(load_moments(saved, run.student.trainable))
    run.batches.load_state_dict(state["batches"])
    if not load_random(saved, run.accelerator.process_index):
        print(f"rank {run.accelerator.process_index}: {saved} was written by fewer ranks; dropout here starts from the seed again")
    run.accelerator.print(f"resuming from {saved}")
    return state["step"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; errors that a user can cure are told in one line."""
    recipe = parse_command(sys.argv[1:] if argv is None else argv, __doc__ or "")
    try:
        with exclusive(Path(recipe.run.out)):
            return train(recipe)
    except CURABLE as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {error}\nLower run.micro_batch_size (the result stays the same), set ", end="", file=sys.stderr)
        print("run.gradient_checkpointing, or tune less (tune.llm: lora or frozen).", file=sys.stderr)
    except RuntimeError as error:
        if hint := str(error) if isinstance(error, LoaderError) else lost_contact(error):
            print(f"error: {hint}", file=sys.stderr)
        raise  # no exit code of ours: after this one torchrun's restart may cure it
    return 1


if __name__ == "__main__":
    sys.exit(run_launched(main))
