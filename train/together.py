"""Train a small model, a large one's experts and the gate between them in one run, with the cost in the loss; or apart, to compare.

    python train/together.py --small runs/small-llava/model --large checkpoints/hyperllava-smol --out runs/together
    python train/together.py --small runs/small-llava/model --large checkpoints/hyperllava-smol --out runs/apart --apart

Writes OUT/small and OUT/large (model folders), OUT/router.safetensors and OUT/log.jsonl. A recipe puts them together again:
`route: {small: ..., large: ..., gate: {kind: deterministic, path: OUT/router.safetensors}}`. Killed? The same command goes on.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from llava_collab.collab.distill import STATE, TRAINED, finished_before
from llava_collab.collab.router import HashedText, Router
from llava_collab.collab.students import LlavaStudent
from llava_collab.collab.together import Together
from llava_collab.data.samples import read_samples
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import choose
from llava_collab.evaluation.records import dump
from llava_collab.files import model_sha256, write_json, write_text
from llava_collab.models.build import pick_device


@dataclass(frozen=True)
class Args:
    """Train two models and their gate, together or apart."""

    small: Path
    """Model folder of the small model; all of it but its tower learns."""

    large: Path
    """Model folder of the large model; its experts learn (of a model without experts: its projector)."""

    out: Path
    """Folder for small/, large/, router.safetensors, log.jsonl."""

    data: Path = Path("data/cmt-open/train.jsonl")
    """LLaVA JSON or JSONL."""

    samples_per_category: int | None = 600
    """At most so many samples of each category, chosen by --seed."""

    apart: bool = False
    """The control: the models do not feel the gate."""

    steps: int = 250
    """Steps of training."""

    batch_size: int = 16
    """Samples a step."""

    cost: float = 0.1
    """Price of a large call, in nats a token."""

    keep: float = 0.25
    """How much both models go on learning from every sample, whoever is asked."""

    small_lr: float = 1e-4
    """Highest learning rate of the small model."""

    large_lr: float = 1e-4
    """Highest learning rate of the experts."""

    seed: int = 0
    """Chooses samples, draws their order."""

    save_every: int = 50
    """Steps between two saves that a killed training goes on from."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def main(args: Args) -> None:
    """Train and save. Raises ValueError or FileNotFoundError with the cure."""
    arguments = {key: str(value) for key, value in asdict(args).items()}
    if finished_before(args.out, arguments):
        return
    samples = [sample for sample in read_samples(args.data) if sample.turns[-1].role == "assistant"]
    samples = choose(samples, args.samples_per_category, args.seed)
    device = pick_device(args.device)
    images = [image for sample in samples for image in sample.images]
    small, large = (LlavaStudent(folder, images, device) for folder in (args.small, args.large))
    small.network.requires_grad_(True)
    small.network.model.vision_tower.requires_grad_(False)
    large.network.requires_grad_(False)
    learning = [p for name, p in large.network.named_parameters() if "expert" in name]
    for parameter in learning or large.network.model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)
    features = HashedText()
    features_MF, _ = features([sample.request() for sample in samples], [])
    torch.manual_seed(args.seed)
    gate = torch.nn.Linear(features.size, 1).to(device)
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.zeros_(gate.bias)
    how = Together(
        args.steps, args.batch_size, args.small_lr, args.large_lr, cost=args.cost, keep=args.keep, joint=not args.apart, seed=args.seed
    )
    learnt = [model_sha256(args.small), model_sha256(args.large), *(sample.id for sample in samples)]
    of = hashlib.sha256(" ".join(learnt).encode()).hexdigest()
    steps = how.fit(small, large, gate, samples, features_MF, folder=args.out, save_every=args.save_every, of=of)
    write_text(args.out / "log.jsonl", "".join(dump(asdict(step)) for step in steps))
    for student, name in ((small, "small"), (large, "large")):
        student.save(args.out / name)
    about: dict[str, object] = {"how": asdict(how), "asked_small": steps[-1].asked_small}
    router = Router(
        features, gate.weight[0].detach().cpu().clone(), float(gate.bias.detach()), "apart" if args.apart else "together", about
    )
    router.save(args.out / "router.safetensors")
    write_json(args.out / TRAINED, environment(arguments=arguments))
    (args.out / STATE).unlink(missing_ok=True)
    last = steps[-20:]
    means = [sum(getattr(step, key) for step in last) / len(last) for key in ("small", "large", "asked_small")]
    print(f"{args.out}: losses of small and large {means[0]:.3f}, {means[1]:.3f}; the gate asks the small one for {means[2]:.1%}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
