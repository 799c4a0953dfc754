"""Train a LLaVA or HyperLLaVA by a recipe: alignment or instruction tuning, full, LoRA or experts only.

    python train/train.py RECIPE.yaml [--optim.lr 1e-3 ...]       torchrun --nproc-per-node 8 train/train.py RECIPE.yaml

The same command resumes a run that was stopped, exactly (on CPU bit for bit), and says so when there is nothing left to do.
Exit codes: 0 finished, 1 error, 75 deadline reached, 130 / 143 stopped by SIGINT / SIGTERM after saving.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llava_collab.data.conversation import SampleError
from llava_collab.data.dataset import TooManyBadSamples
from llava_collab.files import read_json, write_json
from llava_collab.training.batches import Batches, open_batches
from llava_collab.training.checkpoint import CheckpointError, Checkpoints
from llava_collab.training.components import IMAGE_ONLY, clip, gradient_norms, learning_rate_factor, parameter_groups, table
from llava_collab.training.guards import Coverage, CoverageError, NonFiniteError, check_finite
from llava_collab.training.log import ExpertHealth, RunLog
from llava_collab.training.opening import Student, exclusive, finish, open_run, open_student, start
from llava_collab.training.preflight import PreflightError, meeting, preflight
from llava_collab.training.recipe import Recipe, RecipeError
from llava_collab.training.recipe_file import parse_command
from llava_collab.training.state import load_optimizer, load_random, save_optimizer, save_random
from llava_collab.training.step import Counts, EmptyStepError, accumulate, count, reduce_gradients, same_start, total_loss
from llava_collab.training.stop import Stopper, run_launched


@dataclass
class Run:
    """All that the loop works with."""

    recipe: Recipe
    accelerator: Accelerator
    student: Student
    batches: Batches
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    steps: int


def train(recipe: Recipe) -> int:
    """The whole run; returns the exit code."""
    with meeting("all ranks to join"):
        accelerator = start(recipe)
    preflight(recipe, accelerator)
    if not open_run(recipe, accelerator):
        return 0
    checkpoints = Checkpoints(Path(recipe.run.out), recipe.run.keep_last, accelerator)
    saved = checkpoints.newest(accelerator.print)

    # The model, and which of its parts learn
    student = open_student(recipe, saved, accelerator.device)
    same_start(student.trainable, accelerator)
    accelerator.print(table(student.model))

    # Data, optimiser, and how far an earlier start came
    batches = open_batches(recipe, student, accelerator)
    steps = recipe.run.steps or math.ceil((recipe.run.epochs or 0) * batches.steps_per_epoch)
    groups = parameter_groups(student.trainable, recipe.optim)
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True)
    run = Run(recipe, accelerator, student, batches, optimizer, checkpoints, steps)
    done = resume(run, saved) if saved else 0
    accelerator.print(f"{batches.samples:,} samples, {steps:,} steps of {recipe.run.batch_size}, from step {done + 1}")

    # The loop, then a plain model folder
    code = learn(run, done)
    if code == 0 and accelerator.is_main_process:
        merged = "" if student.tuner is None else " (adapters merged into the base; the last checkpoint keeps them apart)"
        print(f"finished: the model is in {finish(recipe, student, steps)}{merged}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return code


def learn(run: Run, done: int) -> int:
    """Steps `done` + 1 to the last; returns 0, or the exit code of an early stop (after saving)."""
    recipe, accelerator, trainable, optimizer = run.recipe, run.accelerator, run.student.trainable, run.optimizer
    exempt = IMAGE_ONLY if recipe.data.blind else frozenset()
    if exempt:
        accelerator.print(f"blind run: {', '.join(sorted(exempt))} see no image, so they are not expected to learn")
    coverage = Coverage(trainable, exempt)
    health = ExpertHealth(run.student.model)
    stopper = Stopper(recipe.run.deadline_minutes)
    log = RunLog(Path(recipe.run.out), done, run.steps, accelerator.is_main_process)
    try:
        for step in range(done + 1, run.steps + 1):
            began = time.perf_counter()
            micro_batches = run.batches.next_step()
            counts = count(micro_batches, accelerator, stop=stopper.asked)
            logged = step % recipe.run.log_every == 0 or step in (1, run.steps)
            health.watch(logged)

            # The gradient: of the loss over all supervised tokens of the step, on all ranks
            losses = accumulate(run.student.model, micro_batches, counts.supervised, accelerator)
            missing = reduce_gradients(trainable, accelerator)
            loss, norms = total_loss(losses, accelerator), gradient_norms(trainable)
            sample_ids = [batch["sample_ids"] for batch in micro_batches]
            check_finite(step, loss, losses, sample_ids, norms, accelerator, Path(recipe.run.out))
            coverage.after_backward(step, missing, counts.images > 0)

            # The update
            clip(trainable, norms, recipe.optim)
            rates = set_rates(optimizer, learning_rate_factor(step, run.steps, recipe.optim.warmup_ratio))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            coverage.after_step(step, rates, counts.images > 0)

            row = log_row(step, loss, rates, norms, counts, time.perf_counter() - began) | {"skipped": run.batches.skipped}
            if logged:
                row["experts"] = health.read()
                for alarm in health.alarms(row["experts"]):
                    log.say(f"step {step}: {alarm}")
            log.step(row, write=logged)

            stopped = counts.stop > 0
            if step % recipe.run.save_every == 0 or step == run.steps or stopped or (recipe.run.save_first and step == 1):
                log.say(f"saved {run.checkpoints.save(step, partial(write, run=run, step=step), trainable)}")
            if stopped and step < run.steps:
                log.say(f"stopped after step {step} of {run.steps}; run the same command to go on")
                return stopper.exit_code
    finally:
        run.batches.close()
        log.close()
        stopper.release()
    for line in coverage.unchecked():
        accelerator.print(line)
    return 0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate to its peak times `factor`; returns the rate by part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["component"]: group["lr"] for group in optimizer.param_groups}


def log_row(
    step: int, loss: float, rates: dict[str, float], norms: dict[str, torch.Tensor], counts: Counts, seconds: float
) -> dict[str, Any]:
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
        "tokens_per_second": counts.tokens / seconds,
        "samples_per_second": counts.samples / seconds,
        "seconds": seconds,
    }


def write(folder: Path, run: Run, step: int) -> None:
    """All that a checkpoint holds: random states of every rank, the rest from the main process."""
    save_random(folder, run.accelerator.process_index)
    if run.accelerator.is_main_process:
        run.student.write(folder)
        save_optimizer(run.optimizer, run.student.trainable, folder)
        write_json(folder / "state.json", {"step": step, "batches": run.batches.state_dict(), "torch": torch.__version__})


def resume(run: Run, saved: Path) -> int:
    """Put everything back as it was when `saved` was written (the weights already are); returns its step."""
    state = read_json(saved / "state.json")
    load_optimizer(run.optimizer, run.student.trainable, saved)
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
    except (
        RecipeError,
        PreflightError,
        SampleError,
        TooManyBadSamples,
        CheckpointError,
        EmptyStepError,
        NonFiniteError,
        CoverageError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {error}\nLower run.micro_batch_size (the result stays the same), set ", end="", file=sys.stderr)
        print("run.gradient_checkpointing, or tune less (tune.llm: lora or frozen).", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run_launched(main))
