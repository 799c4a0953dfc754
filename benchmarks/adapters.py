"""What low-rank experts cost: LoRA, MoELoRA, HydraLoRA and TeamLoRA as one fused layer, beside MoELoRA as the literature runs it.

    python benchmarks/adapters.py                      writes benchmarks/results/adapters.json and .png

A decoder of LLaMA-7B's widths on a GPU (of small ones on a CPU), random weights, frozen but for the adapters on its FFN: a train step
(forward, backward, AdamW, dropout), a forward over a prompt, and decoding with a cache. Every variant has the same frozen weights, in the
same process, in turns; a ratio is the median of the ratios of neighbours.

The unfused MoELoRA runs an expert after the other, x A_i B_i, weighed by its router: 2 k products a layer. The one that is compared drops
out where the fused layer does, on z; with dropout on x, as peft and MoELoRA have it, it is no straw man: k active LoRAs of peft, which do
the same without a router, are timed beside it. Fused, MoELoRA is TeamLoRA's collaboration module, product for product; so what is left of
TeamLoRA's speed claim is the fusing, which anyone's MoELoRA can have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from timing import Took, alternate, median, plot_ratios, ratio, ratio_row
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaModel

from llava_collab.adapters import AdapterConfig, LowRankExperts
from llava_collab.adapters.install import install_adapters
from llava_collab.evaluation.environment import write_results

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Args:
    """Time adapters. Sizes default to LLaMA-7B's on a GPU, to small ones on a CPU."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    width: int | None = None
    """Of the decoder (4096; 256 on a CPU)."""
    inner: int | None = None
    """Of its FFN (11008; 688)."""
    layers: int | None = None
    """Blocks (8; 4)."""
    batch: int | None = None
    """Sequences (8; 4)."""
    tokens: int | None = None
    """Of a sequence (1024; 128)."""
    steps: int = 8
    """Tokens decoded one after the other."""
    experts: tuple[int, ...] = (4, 8)
    """Numbers of experts, k. The first is compared with the targets."""
    rank: int | None = None
    """Of one expert (32; 8)."""
    dropout: float = 0.05
    """In training."""
    repeats: int = 15
    """Measurements of each."""
    out: Path = ROOT / "benchmarks" / "results" / "adapters.json"
    """Result file; the plot goes beside it."""


class UnfusedMoeLora(nn.Module):
    """A frozen linear layer and k LoRAs, each through two products of its own, weighed by a softmax router: MoELoRA as published.

    The weight is put on the narrow side of an expert's second product, where it costs least. Dropout falls on what A reads, as in peft's
    LoRA and those who build on it, or on what it gives, as in TeamLoRA and our layer.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float, dropout: float, at_input: bool) -> None:
        super().__init__()
        self.base, self.scale, self.at_input, self.dropout = base, alpha / rank, at_input, nn.Dropout(dropout)
        self.down = nn.ModuleList(nn.Linear(base.in_features, rank, bias=False) for _ in range(experts))
        self.up = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(experts))
        self.router = nn.Linear(base.in_features, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.base(x), (self.router(x).float().softmax(-1) * self.scale).to(x.dtype)
        for number, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            z = down(self.dropout(x)) if self.at_input else self.dropout(down(x))
            out = out + up(z * weights[..., number, None])
        return out


class Variant:
    """A decoder with adapters on its FFN, everything else frozen and shared with the others."""

    def __init__(self, base: LlamaModel, place: Callable[[Any], None], args: Args, device: torch.device) -> None:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model: Any = copy.deepcopy(base, memo)
        place(self.model)
        kept = {id(parameter) for parameter in base.parameters()}
        self.trained = [p.requires_grad_(True) for p in self.model.parameters() if id(p) not in kept]
        for parameter in self.trained:
            parameter.data = torch.randn(parameter.shape, device=device) * 0.01  # fp32 masters, also where peft takes the base's type
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None
        self.device = device
        size = base.config.hidden_size
        dtype = next(base.parameters()).dtype
        self.x_BTD = torch.randn(args.batch or 0, args.tokens or 0, size, dtype=dtype, device=device)
        self.steps = args.steps

    def train_step(self) -> None:
        """Forward, backward and update. As in training, adapters are fp32 masters; on a GPU arithmetic is bf16."""
        self.model.train()
        with self._autocast():
            loss = self.model(inputs_embeds=self.x_BTD, use_cache=False).last_hidden_state.float().square().mean()
        if self.optimizer is not None:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.inference_mode()
    def prefill(self) -> None:
        """One forward over whole prompts."""
        self.model.eval()
        with self._autocast():
            self.model(inputs_embeds=self.x_BTD, use_cache=False)

    @torch.inference_mode()
    def decode(self) -> None:
        """A short prompt, then `steps` tokens one by one."""
        self.model.eval()
        cache = DynamicCache(config=self.model.config)
        with self._autocast():
            self.model(inputs_embeds=self.x_BTD[:, :8], past_key_values=cache, use_cache=True)
            for step in range(self.steps):
                self.model(inputs_embeds=self.x_BTD[:, 8 + step : 9 + step], past_key_values=cache, use_cache=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def fused(args: Args, **settings: Any) -> Callable[[Any], None]:
    """Puts our layer on the FFN."""

    def place(model: Any) -> None:
        holder = nn.Module()
        holder.language_model = model
        install_adapters(holder, AdapterConfig.read({"dropout": args.dropout, **settings}))

    return place


def unfused(args: Args, experts: int, at_input: bool = False) -> Callable[[Any], None]:
    """Puts MoELoRA as published on the FFN."""

    def place(model: Any) -> None:
        for block in model.layers:
            for name in TARGETS:
                linear, rank = getattr(block.mlp, name), args.rank or 0
                setattr(block.mlp, name, UnfusedMoeLora(linear, experts, rank, 2.0 * rank, args.dropout, at_input))

    return place


def peft_loras(args: Args, count: int) -> Callable[[Any], None]:
    """Puts so many LoRAs of peft on the FFN, all active."""

    def place(model: Any) -> None:
        names = [f"lora{number}" for number in range(count)]
        configs = [
            LoraConfig(r=args.rank or 0, lora_alpha=2 * (args.rank or 0), lora_dropout=args.dropout, target_modules=list(TARGETS))
        ] * count
        tuner = LoraModel(model, configs[0], names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
        tuner.set_adapter(names)

    return place


def defaults(args: Args, device: torch.device) -> Args:
    """Sizes that were not given: LLaMA-7B's on a GPU."""
    large = {"width": 4096, "inner": 11008, "layers": 8, "batch": 8, "tokens": 1024, "rank": 32}
    small = {"width": 256, "inner": 688, "layers": 4, "batch": 4, "tokens": 128, "rank": 8}
    chosen = large if device.type == "cuda" else small
    return Args(**{**vars(args), **{key: value for key, value in chosen.items() if getattr(args, key) is None}})


def variants(args: Args, base: LlamaModel, k: int, device: torch.device) -> dict[str, Variant]:
    """All that is compared for k experts."""
    r = args.rank or 0
    places = {
        "LoRA r": fused(args, method="lora", rank=r, alpha=2.0 * r),
        "LoRA kr": fused(args, method="lora", rank=k * r, alpha=2.0 * k * r),
        "MoELoRA unfused": unfused(args, k),
        "MoELoRA unfused, dropout on x": unfused(args, k, at_input=True),
        "peft's k LoRAs": peft_loras(args, k),
        "MoELoRA fused": fused(args, method="moelora", experts=k, rank=r, alpha=2.0 * r),
        "HydraLoRA fused": fused(args, method="hydralora", experts=k, rank=r, alpha=2.0 * r),
        "TeamLoRA fused": fused(args, method="teamlora", experts=k, rank=r, alpha=2.0 * r),
    }
    return {name: Variant(base, place, args, device) for name, place in places.items()}


COMPARED = (  # over, under, targets of the train step and of inference at the first k
    ("TeamLoRA fused", "MoELoRA unfused", 0.69, 0.71),
    ("MoELoRA fused", "MoELoRA unfused", None, None),
    ("TeamLoRA fused", "LoRA kr", 1.10, None),
    ("TeamLoRA fused", "MoELoRA fused", None, None),
    ("HydraLoRA fused", "LoRA kr", None, None),
    ("MoELoRA unfused", "LoRA kr", None, None),
    ("MoELoRA unfused, dropout on x", "peft's k LoRAs", 1.10, 1.10),
    ("TeamLoRA fused", "MoELoRA unfused, dropout on x", None, None),
    ("LoRA kr", "LoRA r", None, None),
)


def measure(args: Args, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ratios, and facts about the run."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        hidden_size=args.width or 0,
        intermediate_size=args.inner or 0,
        num_hidden_layers=args.layers or 0,
        num_attention_heads=max(1, (args.width or 0) // 128),
        vocab_size=8,
    )
    torch.manual_seed(0)
    with torch.device(device):
        base: Any = nn.Module.to(LlamaModel(config), dtype=dtype).requires_grad_(False)
    rows: list[dict[str, Any]] = []
    for place, k in enumerate(args.experts):
        built = variants(args, base, k, device)
        for what in ("train step", "prefill", "decode"):
            runs = {name: getattr(variant, what.replace(" ", "_")) for name, variant in built.items()}
            found = alternate(runs, args.repeats, 1, device, f"k={k}, {what}")
            report(k, what, found)
            for over, under, train, inference in COMPARED:
                target = (train if what == "train step" else inference) if place == 0 else None
                rows.append(ratio_row(f"{what}, k={k}: {over} / {under}", found, over, under, device, target))
        del built
    return rows, {"model": f"{args.layers} blocks {args.width} x {args.inner}, {args.batch} x {args.tokens} tokens, r={args.rank}, {dtype}"}


def report(k: int, what: str, found: dict[str, list[Took]]) -> None:
    """Print medians, and each over LoRA of all columns."""
    print(f"\n{what}, k={k}\n| | ms | / LoRA kr |\n| --- | ---: | ---: |")
    for name, took in found.items():
        print(f"| {name} | {1000 * median(took).wall:.2f} | {ratio(found, name, 'LoRA kr').wall:.2f} |")


def same_function(args: Args, device: torch.device) -> float:
    """Largest difference between MoELoRA fused and unfused on the same numbers, fp32: they are one function."""
    torch.manual_seed(1)
    width, r, k = 64, 4, args.experts[0]
    linear = nn.Linear(width, width, bias=False).to(device)
    loop = UnfusedMoeLora(linear, k, r, 2.0 * r, 0.0, at_input=False).to(device)
    holder = nn.Module()
    holder.language_model = nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.ModuleDict({"gate_proj": copy.deepcopy(linear)})})})
    settings = {"method": "moelora", "experts": k, "rank": r, "alpha": 2.0 * r, "dropout": 0.0, "target": ["gate_proj"]}
    install_adapters(holder, AdapterConfig.read(settings))
    ours: Any = holder.get_submodule("language_model.layers.0.gate_proj")
    ours.adapter.to(device)
    with torch.no_grad():
        ours.adapter.down.copy_(torch.cat([*(d.weight for d in loop.down), loop.router.weight]))  # pyright: ignore
        ours.adapter.up.copy_(torch.cat([u.weight for u in loop.up], 1))  # pyright: ignore[reportArgumentType]
        x = torch.randn(8, width, device=device)
        return float((F.mse_loss(ours(x), loop(x), reduction="none").sqrt()).max())


class Operations(TorchDispatchMode):
    """Counts operations that are no views: on a GPU about as many kernels are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += not any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        return func(*args, **(kwargs or {}))


def operations(args: Args) -> list[dict[str, Any]]:
    """Rows: operations of one adapted layer in a train step under a bf16 autocast, forward and backward, the static layer's left out."""
    rows = []
    for method in ("lora", "moelora", "hydralora", "teamlora"):
        layer = LowRankExperts(64, 64, AdapterConfig.read({"method": method, "rank": 8, "dropout": args.dropout})).train()
        x, static = (torch.randn(2, 8, 64, requires_grad=True) for _ in range(2))
        with Operations() as counted, torch.autocast("cpu", torch.bfloat16):
            out = layer(x, static)
        forward = counted.count
        with counted:
            out.float().sum().backward()
        row = {"name": f"operations of a layer, train step: {method}", "value": counted.count, "unit": "operations", "better": "lower"}
        rows.append(row | {"target": None, "forward": forward})
        print(f"{method}: {forward} operations forward, {counted.count - forward} backward")
    return rows


def main(args: Args) -> None:
    """Measure, print, write, plot."""
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    args = defaults(args, device)
    difference = same_function(args, device)
    print(f"MoELoRA fused and unfused on the same numbers: largest difference {difference:.1e}")
    rows, about = measure(args, device)
    rows += operations(args)
    rows.append(
        {"name": "MoELoRA fused against unfused: largest difference", "value": difference, "unit": "", "better": "lower", "target": 1e-5}
    )
    write_results(args.out, rows, **about)
    plot_ratios(
        [row for row in rows if f"k={args.experts[0]}:" in row["name"]], args.out.with_suffix(".png"), "Low-rank experts: time ratios"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
