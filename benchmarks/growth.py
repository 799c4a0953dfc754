"""How the experts' cost grows: with tokens, images, samples, expert layers, code width, bottleneck, and samples in a packed row.

    python benchmarks/growth.py            writes benchmarks/results/growth.json and .png

The experts alone, as the model runs them: writing their weights (generation) and applying them to every position (application), forward,
and forward with backward. One size at a time is doubled, the others stay. An exponent is the slope of log seconds over log size, by least
squares: 1 is proportional, 0 does not matter. Constants (launches, the call itself) bend it down at small sizes: what counts is that none
is well above 1. In the packed axis the tokens of a row are dealt to more and more samples. Seconds are the device's on a GPU (bf16, width
4096); on a CPU (fp32, small) they are this process's own, which others on the machine lengthen less; names then begin with "cpu:".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from timing import Work, alternate
from torch import Tensor, nn

from llava_collab.evaluation.environment import write_results
from llava_collab.models import LanguageExpertConfig, VisualExpertConfig
from llava_collab.models.experts import ExpertContext
from llava_collab.models.hypernetwork import HyperNetwork, apply_expert
from llava_collab.models.packing import read_segments

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("generation", "application", "generation, with backward", "application, with backward")
VISION_WIDTH = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Size:
    """One point: a call of the language expert (or, where `images` is set, of the visual one) with these sizes."""

    batch: int
    tokens: int
    layers: int
    code_width: int
    bottleneck: int
    packed: int = 0
    """Samples in each row; 0: one, not packed."""
    images: int = 0
    """Images of `tokens` patches each, through the projector's expert."""


SMALL, LARGE = Size(4, 256, 4, 32, 16), Size(8, 512, 16, 64, 16)
AXES: dict[str, Callable[[Size, int], Size]] = {
    "tokens": lambda size, k: replace(size, tokens=size.tokens * k),
    "samples in a batch": lambda size, k: replace(size, batch=size.batch * k),
    "images": lambda size, k: replace(size, images=2 * k, layers=1),
    "expert layers": lambda size, k: replace(size, layers=size.layers * k),
    "code width": lambda size, k: replace(size, code_width=size.code_width * k),
    "bottleneck": lambda size, k: replace(size, bottleneck=size.bottleneck * k),
    "samples in a packed row": lambda size, k: replace(size, packed=k, batch=2),
}
FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Args:
    """Time the experts alone at many sizes."""

    rounds: int = 15
    """Rounds that count, at each size."""
    width: int = 0
    """Model width (default: 4096 on a GPU, 128 on a CPU)."""
    out: Path = ROOT / "benchmarks" / "results" / "growth.json"
    """Result file; the plot stands beside it."""


def work(size: Size, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """What is timed at one size, by phase."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"code_width": size.code_width, "bottleneck": size.bottleneck}
    rows, segments = size.images or size.batch, None
    config, read = (VisualExpertConfig(**shape), VISION_WIDTH[device.type]) if size.images else (LanguageExpertConfig(**shape), width)
    with device:
        generator = HyperNetwork(read, read, width, size.layers, config)
        for parameter in generator.parameters():
            nn.init.normal_(parameter, std=0.02)
        x_BTD = torch.randn(rows, size.tokens, read, dtype=dtype).requires_grad_()
        mask_BT = torch.ones(rows, size.tokens, dtype=torch.bool)
        if size.packed:
            ids_BT = (torch.arange(size.tokens) * size.packed // size.tokens + 1).expand(rows, -1).contiguous()
            segments = read_segments(ids_BT, ids_BT.shape)
            mask_BT = segments.spread(mask_BT)

    def write() -> tuple[tuple[Tensor, ...], ...]:
        return ExpertContext(generator, mask_BT, None, segments).fill(x_BTD)

    def apply(layers: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        out_BTO = x_BTD.new_zeros(rows, size.tokens, width)
        for weights in layers:
            own = x_BTD if segments is None else segments.spread(x_BTD)
            expert = apply_expert(own, weights, config.activation)
            out_BTO = out_BTO + (expert if segments is None else segments.join(expert))
        return out_BTO

    with torch.no_grad():
        learned = tuple(tuple(weight.clone().requires_grad_() for weight in weights) for weights in write())
    leaves = [x_BTD, *generator.parameters(), *(weight for weights in learned for weight in weights)]

    def backward(out: list[Tensor]) -> None:
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        for leaf in leaves:
            leaf.grad = None

    without = torch.no_grad()
    return {
        PHASES[0]: without(write),
        PHASES[1]: without(lambda: apply(learned)),
        PHASES[2]: lambda: backward([weight for weights in write() for weight in weights]),
        PHASES[3]: lambda: backward([apply(learned)]),
    }


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """A row for every axis and phase, printed as it comes."""
    gpu = device.type == "cuda"
    start, width = (LARGE if gpu else SMALL), args.width or (4096 if gpu else 128)
    rows = []
    for axis, grow in AXES.items():
        ways = {}  # of all sizes together: a machine that grows slower while they run bends no slope
        for factor in FACTORS:
            made = work(grow(start, factor), width, device, torch.bfloat16 if gpu else torch.float32)
            ways |= {f"{phase} x{factor}": run for phase, run in made.items()}
        found = alternate(ways, args.rounds, 2, device, axis)
        seconds = {way: statistics.median(t.wall if gpu else t.cpu for t in took) for way, took in found.items()}
        for phase in PHASES:
            values = [seconds[f"{phase} x{factor}"] for factor in FACTORS]
            slope = exponent(list(FACTORS), values)
            name = f"{'' if gpu else 'cpu: '}exponent of {phase} over {axis}"
            rows.append({"name": name, "value": round(slope, 3), "unit": "exponent", "better": "lower", "target": 1.1 if gpu else None})
            rows[-1] |= {"axis": axis, "phase": phase, "factors": list(FACTORS), "start": asdict(grow(start, 1)), "width": width}
            rows[-1]["milliseconds"] = [round(1000 * value, 4) for value in values]
            print(f"{name}: {slope:.2f}   {rows[-1]['milliseconds']} ms", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel an axis: milliseconds over the factor, both on logarithmic scales, with the exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for axes, axis in zip(grid.flat, AXES, strict=False):
        for row, colour in zip((row for row in rows if row["axis"] == axis), ("#0072B2", "#D55E00", "#56B4E9", "#E69F00"), strict=True):
            label = f"{row['phase']}: {row['value']:.2f}"
            axes.loglog(row["factors"], row["milliseconds"], "o-", color=colour, markersize=3, linewidth=1.2, label=label)
        axes.set_title(axis, fontsize=10, loc="left")
        axes.set_xticks(FACTORS, [f"x{factor}" for factor in FACTORS])
        axes.minorticks_off()
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid.flat[len(AXES) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("milliseconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Args) -> None:
    """Measure, print, write, draw."""
    rows = measure(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_results(args.out, rows, rounds=args.rounds)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
