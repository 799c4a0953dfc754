"""Teach a LLaVA by a larger one: by its distributions over each next token, by its answers, or by several teachers' rationales.

    python train/distill_llava.py --student runs/small-llava/model --teachers checkpoints/hyperllava-smol --out runs/taught/distributions
    python train/distill_llava.py --student runs/small-llava/model --out runs/taught/labels --how labels      # the control: the same steps

Writes OUT/model. What teachers say is kept in OUT/teachers. Killed? The same command goes on.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from llava_collab.collab.distill import STATE, TRAINED, Distiller, Labeler, TeacherTokens, Tokens, finished_before
from llava_collab.collab.recorded import Recorded
from llava_collab.collab.single import Single
from llava_collab.collab.students import LlavaStudent
from llava_collab.data.conversation import IMAGE_MARK
from llava_collab.data.samples import Sample, read_samples
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import choose
from llava_collab.files import model_sha256, write_json
from llava_collab.models.build import pick_device
from llava_collab.types import Request, Turn


@dataclass(frozen=True)
class Args:
    """Teach a LLaVA by larger ones, resumably."""

    student: Path
    """Model folder of the student; all of it but its tower learns."""

    out: Path
    """Folder for model/, teachers/, training.json."""

    teachers: tuple[Path, ...] = ()
    """Model folders of the teachers: one, several for rationales, none for labels."""

    how: Literal["labels", "distributions", "answers", "rationales"] = "distributions"
    """What is learnt: the data's own answers (the control); the teacher's distributions over each of their tokens (white box, shared
    vocabulary); the teacher's answers in their place (black box); or the data's answers, and beside them each teacher's rationales behind a
    prefix of its own (TinyLLM, arXiv 2402.04616)."""

    data: Path = Path("data/cmt-open/train.jsonl")
    """LLaVA JSON or JSONL."""

    samples_per_category: int | None = 600
    """At most so many samples of each category, chosen by --seed."""

    share: float = 1.0
    """Of distributions: the teacher's share of the target; the rest is the token that stands there."""

    temperature: float = 1.0
    """Of distributions: what the teacher's logits are divided by."""

    alpha: float = 1.0
    """Of rationales: what a token of them weighs, beside an answer's 1."""

    ask: str = "{question}\nThe answer is: {answer}. Explain why."
    """Of rationales: what a teacher is asked."""

    max_new_tokens: int = 96
    """Longest answer or rationale of a teacher."""

    steps: int = 250
    """Steps of training."""

    batch_size: int = 16
    """Samples a step."""

    lr: float = 1e-4
    """Highest learning rate."""

    seed: int = 0
    """Chooses samples, draws their order."""

    save_every: int = 50
    """Steps between two saves that a killed training goes on from."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def main(args: Args) -> None:
    """Teach and save. Raises ValueError or FileNotFoundError with the cure."""
    arguments = {key: str(value) for key, value in asdict(args).items()}
    count, several = len(args.teachers), args.how == "rationales"
    if count != (args.how != "labels") and not (several and count > 1):
        wanted = "one or more" if several else "none" if args.how == "labels" else "one"
        raise ValueError(f"--how {args.how} takes {wanted} of --teachers, not {count}")
    if finished_before(args.out, arguments):
        return
    samples = [sample for sample in read_samples(args.data) if sample.turns[-1].role == "assistant"]
    samples = choose(samples, args.samples_per_category, args.seed)
    images, device = [image for sample in samples for image in sample.images], pick_device(args.device)
    labeler: Labeler
    if args.how == "distributions":
        teacher = LlavaStudent(args.teachers[0], images, device).eval()
        labeler = TeacherTokens(teacher, args.temperature, args.share)
    else:
        samples, weights = _told(args, samples, images, device)
        labeler = Tokens(torch.tensor(weights))
    student = LlavaStudent(args.student, images, device)
    student.network.model.vision_tower.requires_grad_(False)
    learnt = [args.how, *map(model_sha256, (args.student, *args.teachers)), *(f"{sample.id} {sample.turns}" for sample in samples)]
    of = hashlib.sha256("\n".join([*learnt, str(args.share), str(args.temperature), str(args.alpha)]).encode()).hexdigest()
    distiller = Distiller(args.steps, args.batch_size, args.lr, seed=args.seed)
    losses = distiller.fit(student, samples, labeler, folder=args.out, save_every=args.save_every, of=of)
    student.save(args.out / "model")
    write_json(args.out / TRAINED, environment(arguments=arguments, losses=losses))
    (args.out / STATE).unlink(missing_ok=True)
    print(f"{args.out}/model: last losses {', '.join(f'{loss:.3f}' for loss in losses[-3:])}")


def _told(args: Args, samples: list[Sample], images: Sequence[Path], device: torch.device) -> tuple[list[Sample], list[float]]:
    """Samples to learn from, and what each one's tokens weigh."""
    if args.how == "labels":
        return samples, [1.0] * len(samples)
    rows = [] if args.how == "answers" else [(sample, 1.0) for sample in samples]
    for number, folder in enumerate(args.teachers, start=1):
        teacher = LlavaStudent(folder, images, device)
        model = Recorded(
            Single(teacher.network, teacher.processor, folder.name), args.out / f"teachers/{number}.jsonl", model_sha256(folder)
        )
        asked = [_asked(args, sample) for sample in samples]
        answers = model.generate(asked)
        said = [" ".join(answer.text.split()) if answer.error is None else "" for answer in answers]
        if not any(said):
            why = next((answer.error for answer in answers if answer.error), "empty answers")
            raise ValueError(f"{folder} said nothing to any of {len(samples)} requests ({why}): is it a LLaVA that answers?")
        print(f"{folder}: {sum(map(bool, said))} of {len(samples)} requests have an answer to learn from", flush=True)
        for sample, text in zip(samples, said, strict=True):
            if text and args.how == "answers":
                rows.append((_saying(sample, sample.turns[:-1], text), 1.0))
            elif text:
                rows.append((_saying(sample, _prefixed(sample.turns[:-1], f"Explain ({number}): "), text), args.alpha))
    return [sample for sample, _ in rows], [weight for _, weight in rows]


def _asked(args: Args, sample: Sample) -> Request:
    """What a teacher is asked: the question, or, for a rationale, `--ask` with question and answer in it."""
    request = sample.request(args.max_new_tokens)
    if args.how == "answers":
        return request
    question, last = request.turns[-1].text, sample.turns[-1].text.rstrip(".")
    text = args.ask.replace("{question}", question).replace("{answer}", last)
    marks = f"{IMAGE_MARK}\n" * (question.count(IMAGE_MARK) - text.count(IMAGE_MARK))
    return replace(request, turns=(*request.turns[:-1], Turn("user", marks + text)))


def _prefixed(turns: tuple[Turn, ...], prefix: str) -> tuple[Turn, ...]:
    """The turns, with a prefix before the last one's words: a student tells its tasks apart by it."""
    last = turns[-1].text
    words = re.sub(rf"^(\s*{IMAGE_MARK}\s*)*", "", last)
    return (*turns[:-1], Turn("user", last.removesuffix(words) + prefix + words))


def _saying(sample: Sample, turns: tuple[Turn, ...], text: str) -> Sample:
    return replace(sample, turns=(*turns, Turn("assistant", text)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
