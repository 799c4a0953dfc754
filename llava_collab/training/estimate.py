"""What a recipe will cost before anything is downloaded: parameters, memory and arithmetic, counted on the real modules.

One training step of one micro-batch runs on fake tensors (shapes and types without numbers), so every expert switch, frozen part, cast
and recomputation is counted as it will happen:

    FLOPs        2 x multiply-adds of every matrix product and convolution, and 4 T^2 width a block of attention (a causal mask is not
                 discounted; backward 2.5 times that). Norms, activations and the softmax are left out. The optimiser too: it is
                 12 or so for each trained parameter and step.
    weights      as the loop stores them: trained and expert weights fp32, the rest in the run's precision
    moments      8 bytes a trained parameter: AdamW's two, fp32. The fp32 weights are the master copy; there is no other.
    gradients    4 bytes a trained parameter, kept over the micro-batches of a step
    peak         the most that is alive at once beside those three: saved activations, casts, generated weights, temporaries

A sample has one image (none in a blind run) and `tokens` tokens, all behind the image supervised: a bound, since a micro-batch is
padded to its longest sample. As in any padded micro-batch, attention is masked by a tensor. Allocator slack, the process itself and
communication buffers are not in the figures.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from llava_collab.models.blueprint import configuration, meta_model
from llava_collab.models.build import ModelSpec, extract_features
from llava_collab.models.hypernetwork import HyperNetwork
from llava_collab.training.components import by_component, cast_frozen, choose_trainable
from llava_collab.training.lora import add_adapters
from llava_collab.training.recipe import Recipe

NF4_BYTES = 0.5 + 4 / 64
"""Bytes a weight in 4 bits: half a byte, and an fp32 scale for every 64 (QLoRA without double quantisation)."""


@dataclass(frozen=True)
class Part:
    """One component of the model (`components.COMPONENTS`); FLOPs are of one sample."""

    parameters: int
    trainable: int
    weight_bytes: int
    forward_flops: int = 0


@dataclass(frozen=True)
class Estimate:
    """A recipe's cost on one device. Bytes are of a micro-batch, FLOPs of one sample."""

    parts: dict[str, Part]
    micro_batch: int
    tokens: int
    image_tokens: int
    step_flops: int
    """Forward, backward and, with gradient checkpointing, the second forward; without the tower where its output is cached."""
    activation_bytes: int
    """Alive when the forward pass ends: what the backward pass needs."""
    generated_bytes: int
    """Expert weights that the hypernetworks write, as they write them; part of the activations."""
    peak_bytes: int
    """The most alive at once in a step, beside weights, gradients and moments."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts.values())

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.parts.values())

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.trainable

    @property
    def optimizer_bytes(self) -> int:
        return 8 * self.trainable

    @property
    def forward_flops(self) -> int:
        return sum(part.forward_flops for part in self.parts.values())

    @property
    def total_bytes(self) -> int:
        """Memory that a device needs at least."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.peak_bytes

    def bytes_on(self, gpus: int) -> dict[str, int]:
        """By engine: memory that each of several GPUs needs at least, where an engine shares weights, gradients or moments out.

        The layer that a sharding engine gathers at a time comes on top.
        """
        learned = self.gradient_bytes + self.optimizer_bytes
        return {
            "ddp": self.total_bytes,
            "zero2": self.weight_bytes + learned // gpus + self.peak_bytes,
            "fsdp2, zero3": (self.weight_bytes + learned) // gpus + self.peak_bytes,
        }

    def hours(self, samples: int, gpus: int, tflops: float, utilisation: float) -> float:
        """Hours that `samples` samples take on GPUs that reach `utilisation` of their `tflops` (1e12 operations a second)."""
        return samples * self.step_flops / (gpus * tflops * 1e12 * utilisation) / 3600

    def text_on(self, gpus: int, tflops: float, utilisation: float, samples: int | None) -> str:
        """Memory by engine on several GPUs and, where the number of samples is known, hours."""
        shares = ", ".join(f"{engine} {count / 2**30:,.1f} GiB" for engine, count in self.bytes_on(gpus).items())
        lines = [f"each of {gpus} GPUs needs at least: {shares}"]
        if samples:
            hours, pace = self.hours(samples, gpus, tflops, utilisation), f"{100 * utilisation:.0f} % of {tflops:g} TFLOP/s"
            lines.append(f"{samples:,} samples of {self.tokens:,} tokens take {hours:,.1f} hours on {gpus} GPUs at {pace}")
        return "\n".join(lines)

    def text(self) -> str:
        """A table of the parts, then memory and arithmetic, for a terminal."""
        lines = [f"{'':<16}{'parameters':>16}{'trained':>16}{'weights':>12}{'forward/sample':>18}"]
        for name, part in self.parts.items():
            figures = f"{part.parameters:>16,}{part.trainable:>16,}{part.weight_bytes / 2**30:>8.2f} GiB"
            lines.append(f"{name:<16}{figures}{part.forward_flops / 1e9:>12,.2f} GFLOP")
        figures = f"{self.parameters:>16,}{self.trainable:>16,}{self.weight_bytes / 2**30:>8.2f} GiB"
        share = 100 * self.trainable / self.parameters
        lines += [
            f"{'all':<16}{figures}{self.forward_flops / 1e9:>12,.2f} GFLOP",
            f"trained: {share:.2f} %; a training step: {self.step_flops / 1e9:,.2f} GFLOP a sample",
            f"micro-batch of {self.micro_batch} samples of {self.tokens} tokens ({self.image_tokens} of them an image's):",
        ]
        rows = (
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("AdamW moments", self.optimizer_bytes),
            ("peak beside them", self.peak_bytes),
            ("  kept for the backward pass", self.activation_bytes),
            ("  of it generated weights", self.generated_bytes),
            ("a device needs at least", self.total_bytes),
        )
        return "\n".join([*lines, *(f"  {name:<30}{count / 2**30:>10.3f} GiB" for name, count in rows)])


def estimate(recipe: Recipe, earlier: Mapping[str, ModelSpec] | None = None, tokens: int | None = None) -> Estimate:
    """The cost of a recipe, from its architecture alone.

    Args:
        earlier: what `model.init_from` may name before it is there (see `models.blueprint`; `tables.earlier_stages` finds it).
        tokens: length of a sample, image tokens included (default: `data.max_length`, the longest).
    Raises:
        BlueprintError: an unknown base. ValueError: experts that can't be, or `tokens` too few for the image.
    """
    model = student(recipe, earlier)
    mode = FakeTensorMode()
    _fake(model, mode)
    with mode:
        trace = _Trace(model, recipe, tokens or recipe.data.max_length)
        trace.run()
    return Estimate(
        parts=count(model, recipe, trace.forward),
        micro_batch=trace.samples,
        tokens=trace.tokens,
        image_tokens=trace.image_tokens,
        step_flops=trace.step_flops,
        activation_bytes=trace.activation_bytes,
        generated_bytes=trace.generated_bytes,
        peak_bytes=trace.peak_bytes,
    )


def student(recipe: Recipe, earlier: Mapping[str, ModelSpec] | None = None) -> Any:
    """The model as training opens it (`opening.open_student`), on the meta device: adapters in, parts frozen, frozen weights cast."""
    model: Any = meta_model(configuration(recipe.model, earlier))
    if recipe.tune.adapted:
        add_adapters(model, recipe.tune)
    choose_trainable(model, recipe.tune)
    if recipe.run.precision == "bf16":
        cast_frozen(model, torch.bfloat16)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put a meta model on fake tensors of the CPU, in place: unlike meta ones they meet the casts and kernels of a real device."""
    made: dict[Tensor, Tensor] = {}  # a tied weight stays one
    with mode:
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                module._parameters[key] = None if parameter is None else made[parameter]  # pyright: ignore[reportArgumentType]
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def count(model: nn.Module, recipe: Recipe, flops: Mapping[str, int] | None = None) -> dict[str, Part]:
    """The parts of a `student` of a recipe."""
    parameters = dict(model.named_parameters())
    parts = {}
    for name, members in by_component(parameters).items():
        chosen = [parameters[member] for member in members]
        size = sum(p.numel() * p.element_size() for p in chosen)
        if recipe.tune.llm == "lora4bit" and name == "llm":
            packed = [p for member, p in zip(members, chosen, strict=True) if ".base_layer." in member and p.ndim == 2]
            size -= sum(round(p.numel() * (p.element_size() - NF4_BYTES)) for p in packed)
        trained = sum(p.numel() for p in chosen if p.requires_grad)
        parts[name] = Part(sum(p.numel() for p in chosen), trained, size, (flops or {}).get(name, 0))
    return parts


class _Trace:
    """One micro-batch through a fake model, forward and backward, with its arithmetic and its memory watched."""

    def __init__(self, model: Any, recipe: Recipe, tokens: int) -> None:
        self.model, self.recipe, self.tokens, self.samples = model, recipe, tokens, recipe.run.micro_batch_size
        self.image_tokens = 0
        self.generated_bytes = self.activation_bytes = self.peak_bytes = self.step_flops = 0
        self.forward: dict[str, int] = {}

    def run(self) -> None:
        """Fill in the figures. What is alive before (weights, gradients, the batch) is not counted as the step's."""
        inputs, tower = self._inputs()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        hooks = [m.register_forward_hook(self._generated) for m in self.model.modules() if isinstance(m, HyperNetwork)]
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            self._loss(inputs)
        for hook in hooks:
            hook.remove()
        self.forward = {name: count // self.samples for name, count in _by_part(flops).items()} | {"vision_tower": tower}
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        before = [*self.model.parameters(), *self.model.buffers(), *inputs.values(), *(p.grad for p in trained if p.grad is not None)]
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.run.precision == "bf16")
        with Meter(before) as meter:
            with bf16:
                loss = self._loss(inputs)
            self.activation_bytes = meter.alive
            loss.backward()
        self.step_flops, self.peak_bytes = meter.flops // self.samples, meter.peak

    def _inputs(self) -> tuple[dict[str, Tensor], int]:
        """The batch as the loop gives it to the model, and what the tower costs an image, whether it runs in the step or did before."""
        ids_BT = torch.zeros(self.samples, self.tokens, dtype=torch.long)
        inputs: dict[str, Tensor] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if self.recipe.data.blind:
            return inputs, 0
        config = self.model.config
        size = config.vision_config.image_size
        dtype = next(self.model.model.vision_tower.parameters()).dtype
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            state_NPV = extract_features(self.model, torch.empty(1, 3, size, size, dtype=dtype))
        self.image_tokens = state_NPV.shape[1]
        if config.visual is not None and config.visual.guidance == "cls":
            self.image_tokens -= 1
        if self.image_tokens >= self.tokens:
            raise ValueError(f"samples of {self.tokens} tokens can't hold an image of {self.image_tokens}: raise the length")
        if self.recipe.data.feature_cache:
            inputs["image_features"] = torch.empty(self.samples, *state_NPV.shape[1:], dtype=torch.bfloat16)
        else:
            inputs["pixel_values"] = torch.empty(self.samples, 3, size, size, dtype=dtype)
        mask_BT = torch.zeros(self.samples, self.tokens, dtype=torch.bool)
        # Whether marks and features match in number is a question about numbers, and there are none.
        self.model.model.get_placeholder_mask = lambda *args, **kwargs: mask_BT[..., None].expand(kwargs["inputs_embeds"].shape)
        return inputs, flops.get_total_flops()

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loop's loss: logits at the supervised positions only, cross-entropy in fp32."""
        supervised = self.tokens - self.image_tokens
        logits_BSV = self.model(**inputs, use_cache=False, logits_to_keep=supervised).logits
        labels = torch.zeros(self.samples * supervised, dtype=torch.long)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels, reduction="sum")

    def _generated(self, module: nn.Module, args: Any, output: Any) -> None:
        storages = {t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)}
        self.generated_bytes += sum(storage.nbytes() for storage in storages)


_HOSTS = ("vision_tower", "multi_modal_projector", "language_model")


def _by_part(flops: FlopCounterMode) -> dict[str, int]:
    """Forward FLOPs of the whole micro-batch by component.

    An expert is applied by the module it stands in, so what a block or the projector computes outside its sub-modules is the expert's.
    """
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in flops.get_flop_counts().items()}
    blocks = [name for name in counts if re.fullmatch(r"model\.language_model\.layers\.\d+", name)]
    applied = sum(_own(name, counts) for name in blocks)
    generator = counts.get("model.language_expert", 0)  # called by the first block that needs it, so inside the language model
    projector = counts.get("model.multi_modal_projector", 0)
    adapters = {name: count for name, count in counts.items() if name.endswith(".adapter")}
    beside = {part: sum(count for name, count in adapters.items() if name.startswith(f"model.{part}")) for part in _HOSTS}
    static = sum(counts.get(f"model.multi_modal_projector.linear_{n}", 0) for n in (1, 2))
    return {
        "vision_tower": counts.get("model.vision_tower", 0) - beside["vision_tower"],
        "projector": static - beside["multi_modal_projector"],
        "visual_expert": projector - static,
        "llm": counts.get("model.language_model", 0) + counts.get("lm_head", 0) - applied - generator - beside["language_model"],
        "language_expert": applied + generator,
        "adapter": sum(adapters.values()),
    }


def _own(name: str, counts: dict[str, int]) -> int:
    """What a module computes outside its direct sub-modules."""
    return counts[name] - sum(count for child, count in counts.items() if child.rpartition(".")[0] == name)


def _attention(query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(query) * key[-2]  # two products


def _attention_backward(gradient: Sequence[int], query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 10 * math.prod(query) * key[-2]  # five, the first of them once more


def _know_cpu_attention() -> None:
    """Teach torch's FLOP counter the attention kernel of CPUs; it knows those of CUDA."""
    aten = torch.ops.aten
    formulas: Any = (
        (aten._scaled_dot_product_flash_attention_for_cpu, _attention),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
    )
    for operation, formula in formulas:
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)


_know_cpu_attention()


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors made inside it: `alive` now, and `peak`. A storage counts once, until it is freed.

    FlopCounterMode beside it would not do: what it hooks into the modules keeps recomputed activations alive.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation, then count it and what is new in its result."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.alive += count
        self.peak = max(self.peak, self.alive)
