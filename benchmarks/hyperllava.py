"""What the experts cost: HyperLLaVA beside stock LLaVA of the same sizes on the same weights.

    python benchmarks/hyperllava.py                           writes benchmarks/results/hyperllava.json and .png
    python benchmarks/hyperllava.py --parts train prefill     only these

On a GPU the shapes are LLaVA-1.5 7B's (CLIP-L/336, 576 image tokens and 128 words; bf16), else small ones (fp32, names begin with "cpu:").
Weights are random, the generated ones not zero; both models hold the very same parameters. Experts stand in the later half of the blocks.

    train     a step: forward, backward, fused AdamW; all but the tower learns, in fp32 under a bf16 autocast on a GPU; of so many blocks
              as fit. "watched": with the health figures that a training logs
    prefill   pixels and prompt to the first logits, eager; the tower is part of it
    decode    a token behind the prompt: eager, with a growing cache
    graphs    the same with a static cache, compiled as `generate(cache_implementation="static")` does on a GPU: CUDA graphs
    shares    a pass under torch.profiler: writing weights, applying them, all else; and how long the device waits for launches

A ratio is ours over stock's in the same round, both in turn in one process; the median of rounds counts. Beside it stand the floors: the
ratio of FLOPs (by formula and by torch's counter) and, for decoding, of the bytes that a step has to read; on a GPU also peak memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pair import SEVEN_B, SMALL, Floor, Pair, build, counted, decode_bytes, formula, sample, train_all_but_the_tower
from timing import Took, Work, alternate, median, ratio, timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DynamicCache, StaticCache

from llava_collab.evaluation.environment import write_results
from llava_collab.models import experts, hypernetwork
from llava_collab.models.experts import keep_beside

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"train": 1.03, "prefill": 1.02, "graphs": 1.03}
PLACES = ("writing weights", "applying them")
BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Args:
    """Time HyperLLaVA against stock LLaVA."""

    parts: tuple[Literal["train", "prefill", "decode", "graphs", "shares"], ...] = ("train", "prefill", "decode", "graphs", "shares")
    """What to measure."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Samples that are decoded at once; prefill is measured up to 16."""
    blocks: int = 0
    """Blocks of the decoder that is prefilled and decoded (default: all of the architecture)."""
    train_blocks: int = 16
    """Blocks of the decoder that is trained, at most: a quarter less each time they do not fit."""
    train_batch: int = 4
    """Samples of a training step."""
    steps: int = 8
    """Tokens decoded in a round."""
    rounds: int = 0
    """Rounds that count (default: 20 on a GPU, 15 on a CPU)."""
    out: Path = ROOT / "benchmarks" / "results" / "hyperllava.json"
    """Result file; the plot stands beside it."""


@dataclass
class Bench:
    """The device, and the rows found so far."""

    args: Args
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def rounds(self) -> int:
        return self.args.rounds or (20 if self.gpu else 15)

    def add(self, name: str, value: float, unit: str = "ratio", target: float | None = None, **more: Any) -> None:
        """A row, printed as it comes."""
        name = name if self.gpu else f"cpu: {name}"
        row = {"name": name, "value": round(value, 4), "unit": unit, "better": "lower", "target": target if self.gpu else None} | more
        self.rows.append(row)
        print(f"{name}: {value:.4g} {unit}", {k: v for k, v in row.items() if k in more and v is not None}, flush=True)

    def compare(self, name: str, ways: Mapping[str, Work], floor: Floor, target: float | None = None, per: int = 1, **more: Any) -> None:
        """Rows of the ways over "stock"; `per`: how many steps one call of a way is."""
        found = alternate(ways, self.rounds, 3, self.device, name)
        stock = median(found["stock"])
        for way in ways:
            if way == "stock":
                continue
            got, own = ratio(found, way, "stock"), median(found[way])
            about: dict[str, Any] = {"milliseconds": _milliseconds(own, per), "stock_milliseconds": _milliseconds(stock, per)}
            about |= {"flop_floor": round(floor.formula, 5), "flop_floor_counted": round(floor.counted, 5)}
            about |= {"cpu_time_ratio": round(got.cpu, 4)} | more
            name_here = name if way == "ours" else f"{name}, {way.removeprefix('ours, ')}"
            self.add(name_here, got.wall, target=target if way == "ours" else None, **about)

    def memory(self, pair: Pair, name: str, stock: Work, ours: Work) -> None:
        """A row: the most memory that ours allocates over the most that stock does, which is not billed for the experts beside it."""
        if not self.gpu:
            return
        peaks = []
        for work in (stock, ours):  # in this order: ours leaves the moments of its experts behind
            work()
            free()
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            torch.cuda.synchronize(self.device)
            peaks.append(torch.cuda.max_memory_allocated(self.device))
        peaks[0] -= sum(parameter.numel() * parameter.element_size() for expert in pair.experts for parameter in expert.parameters())
        gib = {"gib": round(peaks[1] / 2**30, 3), "stock_gib": round(peaks[0] / 2**30, 3)}
        self.add(f"peak memory, {name}", peaks[1] / peaks[0], **gib)


def _milliseconds(took: Took, per: int) -> float:
    return round(1000 * took.wall / per, 4)


def train(bench: Bench) -> None:
    """The step of stage 2 with a full language model, of as many blocks as fit."""
    blocks, pair = min(bench.args.train_blocks, (SEVEN_B if bench.gpu else SMALL).blocks), None
    while pair is None:
        try:
            pair = build(SEVEN_B if bench.gpu else SMALL, bench.device, torch.float32, blocks)
            _train(bench, pair)
        except torch.OutOfMemoryError:
            blocks, pair = blocks * 3 // 4, None
            if blocks < 2:
                raise
            print(f"that did not fit; {blocks} blocks", flush=True)
        free()


def _train(bench: Bench, pair: Pair) -> None:
    train_all_but_the_tower(pair.ours)
    pair.ours.model.vision_tower.to(bench.dtype)
    learned = [parameter for parameter in pair.ours.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True)  # of both models: what has no gradient is passed over
    inputs = sample(pair.sizes, bench.args.train_batch, bench.device, bench.dtype, labels=True)
    single = {name: value[:1] for name, value in inputs.items()}

    def step(model: Any, batch: dict[str, Tensor], watched: bool = False, update: bool = True) -> None:
        model.train()
        for expert in pair.experts:
            expert.monitor = watched
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ways = {
        "stock": lambda: step(pair.stock, inputs),
        "ours": lambda: step(pair.ours, inputs),
        "ours, watched": lambda: step(pair.ours, inputs, watched=True),
    }
    flops = [counted(lambda model=model: step(model, single, update=False)) for model in (pair.ours, pair.stock)]
    floor = Floor(formula(pair, pair.sizes.tokens, 0, pair.sizes.tokens, learn=True), flops[0] / flops[1])
    language = pair.ours.model.language_expert.layers
    about = {"blocks": pair.sizes.blocks, "expert_blocks": language, "batch": bench.args.train_batch, "tokens": pair.sizes.tokens}
    name = f"train step, {pair.sizes.blocks} blocks ({language} with experts), batch {bench.args.train_batch}"
    bench.memory(pair, name, ways["stock"], ways["ours"])
    bench.compare(name, ways, floor, TARGETS["train"], **about)
    if "shares" in bench.args.parts:
        shares(bench, name, ways["ours"])


def prefill(bench: Bench, pair: Pair, batch: int) -> None:
    """Pixels and prompt to the first logits."""
    inputs = sample(pair.sizes, batch, bench.device, bench.dtype)
    single = {name: value[:1] for name, value in inputs.items()}
    ways = {way: (lambda model=model: read(model, inputs)) for way, model in (("stock", pair.stock), ("ours", pair.ours))}
    flops = [counted(lambda model=model: read(model, single)) for model in (pair.ours, pair.stock)]
    floor = Floor(formula(pair, pair.sizes.tokens, 0, 1), flops[0] / flops[1])
    bench.memory(pair, f"prefill, batch {batch}", ways["stock"], ways["ours"])
    bench.compare(f"prefill, batch {batch}", ways, floor, TARGETS["prefill"], batch=batch, tokens=pair.sizes.tokens)


def read(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    """One prefill."""
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)


def decode(bench: Bench, pair: Pair, batch: int, graphs: bool) -> None:
    """Tokens behind a prompt, one by one."""
    args, name = bench.args, f"decode, batch {batch}, {'static cache and CUDA graphs' if graphs else 'eager'}"
    length = pair.sizes.tokens + args.steps
    models = (("stock", pair.stock), ("ours", pair.ours))
    if graphs:
        torch.compiler.reset()
    else:
        whole = [lambda model=model: decoder(bench, model, pair, batch, None)() for _, model in models]
        bench.memory(pair, f"prefill and decode, batch {batch}", *whole)
    ways = {way: decoder(bench, model, pair, batch, length if graphs else None) for way, model in models}
    flops = [counted(decoder(bench, model, pair, 1, None, steps=1, compiled=False)) for model in (pair.ours, pair.stock)]
    floor = Floor(formula(pair, 1, pair.sizes.tokens, 1, images=0), flops[0] / flops[1])
    target = TARGETS["graphs"] if graphs and batch == 16 else None
    byte_floor = round(decode_bytes(pair, batch, length), 5)
    bench.compare(name, ways, floor, target, per=args.steps, byte_floor=byte_floor, batch=batch, cache_length=length)


def decoder(bench: Bench, model: Any, pair: Pair, batch: int, static: int | None, steps: int = 0, compiled: bool = True) -> Work:
    """Prefills a cache (a static one of so many positions, or one that grows) and gives what decodes `steps` tokens behind it.

    The tokens are always the same ones: which they are costs nothing, and choosing them is not the model's work.
    """
    config = model.config.get_text_config()
    cache: Any = StaticCache(config=config, max_cache_len=static) if static else DynamicCache(config=config)
    out = read(model, sample(pair.sizes, batch, bench.device, bench.dtype), cache)
    more = {}
    if getattr(out, "expert_weights", None) is not None:
        more["expert_weights"] = keep_beside(cache, tuple(out.expert_weights))
    forward: Callable[..., Any] = model
    if static and compiled:
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    ids_B1 = torch.full((batch, 1), 7, device=bench.device)
    count = steps or bench.args.steps

    def run() -> None:
        for _ in range(count):
            if static:
                torch.compiler.cudagraph_mark_step_begin()
            forward(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
        if not static:
            cache.crop(-count)
            return
        for layer in cache.layers:  # which has no crop; in place, since a graph reads it where it is
            layer.cumulative_length.sub_(count)

    return run


def shares(bench: Bench, name: str, work: Work) -> None:
    """Rows: the experts' shares of the device's busy time, their backward pass with them, and how long the device is not busy at all."""
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.gpu else [])]
    with ranges(), profile(activities=activities) as found:
        took = timed(work, bench.device)
    own, whole = ("self_device_time_total", "device_time_total") if bench.gpu else ("self_cpu_time_total", "cpu_time_total")
    events: list[Any] = [event for event in found.events() or () if event.device_type.name == "CPU"]
    busy = sum(getattr(event, own) for event in events)
    rest = 1.0
    for place in PLACES:
        marked = [event for event in events if event.name == place]
        numbers = {event.sequence_nr for top in marked for event in _inside(top)} - {-1}
        backward = [event for event in events if event.name.startswith(BACKWARD) and event.sequence_nr in numbers]
        share = sum(getattr(event, whole) for event in (*marked, *backward)) / busy
        rest -= share
        bench.add(f"share of {place}, {name}", share, "share")
    bench.add(f"share of all else, {name}", rest, "share")
    if bench.gpu:
        bench.add(f"share of time in which the device waits for launches, profiled, {name}", 1 - busy / 1e6 / took.wall, "share")


def _inside(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _inside(child)


@contextmanager
def ranges() -> Iterator[None]:
    """Names what the profiler sees of the experts."""
    written, applied = hypernetwork.HyperNetwork.forward, experts.apply_expert

    def named(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(key):
                return function(*args, **kwargs)

        return call

    hypernetwork.HyperNetwork.forward = named(PLACES[0], written)  # pyright: ignore[reportAttributeAccessIssue]
    experts.apply_expert = named(PLACES[1], applied)
    try:
        yield
    finally:
        hypernetwork.HyperNetwork.forward, experts.apply_expert = written, applied


def free() -> None:
    """Give memory back between cases."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def infer(bench: Bench) -> None:
    """All parts but training."""
    parts, sizes = bench.args.parts, bench.args.batch_sizes
    pair = build(SEVEN_B if bench.gpu else SMALL, bench.device, bench.dtype, bench.args.blocks or None)
    cases: list[Callable[[], None]] = []
    if "prefill" in parts:
        cases += [lambda n=n: prefill(bench, pair, n) for n in sizes if n <= 16]
    if "decode" in parts:
        cases += [lambda n=n: decode(bench, pair, n, graphs=False) for n in sizes]
    if "graphs" in parts and bench.gpu:
        cases += [lambda n=n: decode(bench, pair, n, graphs=True) for n in sizes]
    elif "graphs" in parts:
        print("static cache and CUDA graphs: skipped, there is no GPU", flush=True)
    if "shares" in parts:
        for n in sizes:
            inputs = sample(pair.sizes, n, bench.device, bench.dtype)
            cases += [lambda n=n, inputs=inputs: shares(bench, f"prefill, batch {n}", lambda: read(pair.ours, inputs))] * (n <= 16)
            cases += [lambda n=n: shares(bench, f"decode, batch {n}, eager", decoder(bench, pair.ours, pair, n, None))]
    for case in cases:
        try:
            case()
        except torch.OutOfMemoryError as error:
            print(f"that did not fit: {error}", flush=True)
        free()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured ratios beside their floors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if "flop_floor" in row][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.3), layout="constrained")
    heights = range(len(shown))
    axes.barh(heights, [row["value"] - 1 for row in shown], left=1, height=0.55, color="#0072B2", label="measured: ours / stock")
    for key, mark, colour, label in (
        ("flop_floor_counted", "|", "#D55E00", "ratio of FLOPs"),
        ("byte_floor", "x", "#009E73", "ratio of bytes that a step reads"),
        ("target", "d", "#CC79A7", "target"),
    ):
        points = [(row[key], height) for height, row in zip(heights, shown, strict=True) if row.get(key) is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=mark, color=colour, s=60, zorder=3, label=label)
    axes.set_yticks(list(heights), [row["name"] for row in shown], fontsize=8)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_xlabel("time of HyperLLaVA over stock LLaVA, same sizes and weights")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Args) -> None:
    """Measure, print, write, draw."""
    bench = Bench(args)
    if "train" in args.parts:
        train(bench)
    if set(args.parts) - {"train"}:
        infer(bench)
    sizes = SEVEN_B if bench.gpu else SMALL
    about = {"shapes": "LLaVA-1.5 7B, CLIP-L/336" if bench.gpu else f"width {sizes.width}, {sizes.blocks} blocks", "rounds": bench.rounds}
    write_results(args.out, bench.rows, **about, learned="all but the tower; experts in the later half of the blocks, K 16, C 64")
    if any("flop_floor" in row for row in bench.rows):
        plot(bench.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
