"""How much each low-rank expert does for each category: does the router tell tasks apart, and does any expert stand idle?

    python eval/expert_load.py runs/smol-adapters/model --out runs/smol-adapters/load --feature-cache

Every question is read once, without an answer. An expert's load is its mean weight over a category's tokens and over the adapted layers;
1 is its fair share. Beside the spread over categories (root mean square) stands what chance would give, from random halves of each.
Writes load.json, load.md and load.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from llava_collab.adapters import LowRankExperts, RoutingContext
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import choose
from llava_collab.evaluation.report import Table
from llava_collab.evaluation.suite import SuiteError, load_suite
from llava_collab.files import write_json, write_text
from llava_collab.models.build import feature_cache, load, pick_device

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


@dataclass(frozen=True)
class Args:
    """Measure the experts' load by category."""

    model: tyro.conf.Positional[Path]
    """Model folder whose adapter is routed."""
    out: Path
    """Folder for load.json, load.md and load.png."""
    suite: Path = Path("eval/suites/cmt-open.yaml")
    """Whose questions are read."""
    split: str = "test"
    """Split of the suite."""
    items_per_category: int | None = 100
    """At most so many of each category."""
    data_root: Path | None = None
    """Folder of the data, in place of the suite's own."""
    batch_size: int = 16
    """Questions read at once."""
    feature_cache: bool = False
    """Keep vision tower outputs in the local cache (training's)."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def main(args: Args) -> Tensor:
    """Measure, print, write; returns loads [categories, experts]. Raises ValueError for a model without routed experts."""
    network, processor = load(args.model)
    network.to(pick_device(args.device))  # pyright: ignore[reportArgumentType]
    adapter = network.config.low_rank
    if adapter is None or adapter.mergeable:
        raise ValueError(f"{args.model} has no routed experts: its adapter is {'off' if adapter is None else 'plain LoRA'}")
    suite = load_suite(args.suite)
    samples = choose(suite.read(args.split, args.data_root), args.items_per_category, seed=0)
    if args.feature_cache:
        processor.feature_cache = feature_cache(
            network, processor, [image for sample in samples for image in sample.images], args.batch_size
        )
    halves: dict[str, list[list[Sample]]] = {}
    for number, sample in enumerate(samples):  # `choose` kept the file's order, which is random within a category
        halves.setdefault(sample.category, [[], []])[number % 2].append(sample)
    if len(halves) < 2 or any(not half for pair in halves.values() for half in pair):
        raise ValueError("at least two categories are needed, and two questions of each: categories are compared, and halves of them")
    with tqdm(total=len(samples), unit="question") as bar:
        loads_CHLK = torch.stack([torch.stack([measure(network, processor, half, args, bar) for half in pair]) for pair in halves.values()])
    report(args, list(halves), loads_CHLK / adapter.balanced_weight)
    return (loads_CHLK / adapter.balanced_weight).mean((1, 2))


@torch.inference_mode()
def measure(network: Any, processor: Any, samples: Sequence[Sample], args: Args, bar: Any) -> Tensor:
    """[layers, k]: the mean weight of each expert of each layer over the tokens of these questions."""
    layers = [module for module in network.modules() if isinstance(module, LowRankExperts)]
    sums = torch.zeros(len(layers), network.config.low_rank.experts)
    count = 0.0
    for start in range(0, len(samples), args.batch_size):
        chosen = samples[start : start + args.batch_size]
        batch = processor.encode_requests([sample.request(1) for sample in chosen]).to(network.device)
        with RoutingContext(batch["attention_mask"], batch["guidance_mask"], watch=True) as context:
            network(**batch, logits_to_keep=1, use_cache=False)
        sums += torch.stack([context.load[layer][0].float().cpu() for layer in layers])
        count += float(context.load[layers[0]][1])
        bar.update(len(chosen))
    return sums / max(1.0, count)


def report(args: Args, categories: list[str], loads_CHLK: Tensor) -> None:
    """Print and write the table, the figures behind it, and the plot."""
    mean_CK = loads_CHLK.mean((1, 2))
    between, chance = spreads(loads_CHLK)
    experts = [f"expert {number}" for number in range(1, mean_CK.shape[1] + 1)]
    lines = [[category, *(f"{load:.3f}" for load in row)] for category, row in zip(categories, mean_CK.tolist(), strict=True)]
    lines.append(["all", *(f"{load:.3f}" for load in mean_CK.mean(0).tolist())])
    title = (
        f"Load of the experts of {args.model.parent.name}/{args.model.name} (1: a fair share). Spread over categories, in a layer: "
        f"{between:.4f}; by chance: {chance:.4f}"
    )
    text = Table(title, ["category", *experts], lines, []).markdown()
    print(text)
    write_text(args.out / "load.md", text + "\n")
    figures = {
        "categories": categories,
        "load": mean_CK.tolist(),
        "by_layer": loads_CHLK.mean(1).tolist(),
        "between": between,
        "chance": chance,
    }
    write_json(args.out / "load.json", figures | environment())
    plot(categories, experts, mean_CK, args.out / "load.png")


def spreads(loads_CHLK: Tensor) -> tuple[float, float]:
    """Root mean square spread of a layer's expert over categories, and the one that would be there if categories did not differ."""
    between = loads_CHLK.mean(1).var(0).mean().sqrt()
    chance = (loads_CHLK[:, 0] - loads_CHLK[:, 1]).square().mean().sqrt() / 2  # of a mean of two halves, as the other is
    return float(between), float(chance)


def plot(categories: list[str], experts: list[str], mean_CK: Tensor, path: Path) -> None:
    """A heat map, categories by experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2.5 + 0.9 * len(experts), 1.2 + 0.4 * len(categories)), layout="constrained")
    reach = max(0.1, float((mean_CK - 1).abs().max()))
    image = axes.imshow(mean_CK.numpy(), cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    axes.set_xticks(range(len(experts)), experts, fontsize=8)
    axes.set_yticks(range(len(categories)), categories, fontsize=8)
    for row, loads in enumerate(mean_CK.tolist()):
        for column, load_ in enumerate(loads):
            axes.text(column, row, f"{load_:.2f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, label="mean weight (1: a fair share)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (SuiteError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
