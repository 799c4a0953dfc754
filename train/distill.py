"""Make a text classifier of a language model: from labels, or from another model's answers. The result is a leaf of recipes.

    python train/distill.py --texts r52 --out runs/classifiers/r52/seed-0
    python train/distill.py --texts r52 --out runs/kd/r52 --recipe eval/suites/systems/ds-r52.yaml --teacher "TF-IDF + LR"

The texts' shares (of a recipe that gives a teacher its own, else the usual ones) and the seed are those of eval/system.py, so a classifier
has never seen what thresholds are chosen on. Without a teacher it learns the labelled texts; with one, the teacher's distributions on the
unlabelled ones. Killed? The same command goes on.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from llava_collab.collab.builder import Builder, distributions
from llava_collab.collab.classifier import UpperBlocks
from llava_collab.collab.distill import STATE, TRAINED, Distiller, Labeler, Targets, finished_before
from llava_collab.collab.recipe import load_recipe
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.tasks import read_task, text_task
from llava_collab.files import model_sha256, write_json
from llava_collab.models.bases import is_base, prepare
from llava_collab.models.build import pick_device


@dataclass(frozen=True)
class Args:
    """Train a text classifier on the upper blocks of a language model, resumably."""

    texts: str
    """A set of labelled texts: r8, r52, 20ng, spam, ..."""

    out: Path
    """Folder of the classifier, as transformers reads it."""

    base: str = "smollm2-135m"
    """Language model to start from: a base by name, a folder, or a hub id."""

    learning: int = 8
    """How many of its upper blocks learn, with the final norm and the head; the states below them are computed once."""

    tokens: int = 96
    """Texts are cut to so many tokens."""

    steps: int = 400
    """Steps of training."""

    batch_size: int = 32
    """Texts a step."""

    lr: float = 2e-4
    """Highest learning rate."""

    seed: int = 0
    """Deals out the texts, as in eval/system.py; draws the head and the order."""

    recipe: Path | None = None
    """With --teacher: the recipe that has the teacher."""

    teacher: str | None = None
    """Model or system of the recipe whose distributions are learnt."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    save_every: int = 50
    """Steps between two saves that a killed training goes on from."""


def main(args: Args) -> None:
    """Train and save. Raises ValueError with the cure."""
    if (args.recipe is None) != (args.teacher is None):
        raise ValueError("--recipe and --teacher go together: the recipe has the teacher")
    arguments = {key: str(value) for key, value in asdict(args).items()}
    if finished_before(args.out, arguments):
        return
    targets: Any
    if args.recipe is not None and args.teacher is not None:
        recipe = load_recipe(args.recipe)
        if recipe.data.get("texts") != args.texts:
            raise ValueError(f"--texts {args.texts}, and {args.recipe} is about {dict(recipe.data)}: a teacher knows its own texts alone")
        task, _ = read_task(recipe.data, args.seed)
        requests = list(task.unlabelled)
        targets = distributions(Builder(recipe, task=task, folder=args.out / "teacher").model(args.teacher), requests)
    else:
        task = text_task(args.texts, args.seed)
        requests = [request for request, _ in task.fit]
        targets = torch.tensor([task.test[0].choices.index(label) for _, label in task.fit])
    choices = task.test[0].choices
    labeler: Labeler = Targets(targets)
    base = prepare(args.base) if is_base(args.base) else Path(args.base)
    student = UpperBlocks(base, choices, learning=args.learning, tokens=args.tokens, seed=args.seed, device=pick_device(args.device))
    print(
        f"{len(requests)} texts of {task.name}, {len(choices)} labels; first the states below the upper {args.learning} blocks", flush=True
    )
    student.keep([request.text for request in requests])
    distiller = Distiller(args.steps, args.batch_size, args.lr, weight_decay=0.01, seed=args.seed, bf16=True)
    start = model_sha256(base) if base.is_dir() else str(base)
    learnt = f"{start} {args.learning} {args.tokens} {[request.id for request in requests]} {targets.tolist()}"
    of = hashlib.sha256(learnt.encode()).hexdigest()
    losses = distiller.fit(student, range(len(requests)), labeler, folder=args.out, save_every=args.save_every, of=of)
    student.save(args.out)
    write_json(args.out / TRAINED, environment(arguments=arguments, losses=losses))
    (args.out / STATE).unlink(missing_ok=True)
    print(f"{args.out}: the classifier; last losses {', '.join(f'{loss:.3f}' for loss in losses[-3:])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
