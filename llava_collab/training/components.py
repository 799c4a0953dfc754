"""The parts of a HyperLLaVA as training sees them: which part a parameter belongs to, which learn, and at what learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llava_collab.training.recipe import OptimRecipe, TuneRecipe

PREFIXES = (
    ("visual_expert", "model.multi_modal_projector.visual_expert"),
    ("projector", "model.multi_modal_projector."),
    ("language_expert", "model.language_expert."),
    ("vision_tower", "model.vision_tower."),
    ("llm", "model.language_model."),
    ("llm", "lm_head."),
)
COMPONENTS = ("vision_tower", "projector", "visual_expert", "llm", "language_expert", "adapter")
EXPERTS = frozenset({"visual_expert", "language_expert"})
IMAGE_ONLY = frozenset({"vision_tower", "projector", "visual_expert"})
"""Parts that learn only from batches with images."""

Named = dict[str, nn.Parameter]


def component_of(name: str) -> str:
    """The part that a parameter belongs to, by its name; a name of no known part is an error (it would be trained or frozen unseen)."""
    if ".adapter." in name:  # wherever it stands
        return "adapter"
    for component, prefix in PREFIXES:
        if name.startswith(prefix):
            return component
    raise ValueError(f"parameter {name!r} belongs to no known part of the model; add its prefix to llava_collab/training/components.py.")


def by_component(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names grouped by part, parts in model order, absent parts left out."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(component_of(name), []).append(name)
    return {component: groups[component] for component in COMPONENTS if component in groups}


def choose_trainable(model: nn.Module, tune: TuneRecipe) -> Named:
    """Set `requires_grad` on every parameter by the recipe; returns the trainable ones by name."""
    wanted = {
        "projector": tune.projector != "frozen",
        "visual_expert": tune.visual_expert,
        "language_expert": tune.language_expert,
        "adapter": tune.adapter,
        "vision_tower": tune.unfreeze_vision_tower,
        "llm": tune.llm != "frozen",
    }
    for name, parameter in model.named_parameters():
        component = component_of(name)
        train = wanted[component] and not (component in tune.adapted and ".lora_" not in name)
        if component == "vision_tower" and train:
            train = _projector_reads(name, model.config)
        parameter.requires_grad_(train)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("nothing to train: the recipe's tune section freezes every part that this model has.")
    return trainable


def _projector_reads(name: str, config: Any) -> bool:
    """False for tower parameters behind the hidden state that the projector reads (they would never get a gradient)."""
    layer = getattr(config, "vision_feature_layer", -1)
    if not isinstance(layer, int) or layer == -1:
        return True
    layers = config.vision_config.num_hidden_layers
    used = layer if layer >= 0 else layers + 1 + layer
    found = re.search(r"\.layers?\.(\d+)\.", name)
    return int(found.group(1)) < used if found else "post_layernorm" not in name


def table(model: nn.Module) -> str:
    """One line a part: `[TRAINABLE]`, `[frozen]` or `[absent]`, trained and all parameters."""
    parameters = dict(model.named_parameters())
    groups = by_component(parameters)
    lines = []
    for component in COMPONENTS:
        total = sum(parameters[name].numel() for name in groups.get(component, ()))
        trained = sum(parameters[name].numel() for name in groups.get(component, ()) if parameters[name].requires_grad)
        state = "absent" if component not in groups else "TRAINABLE" if trained else "frozen"
        lines.append(f"{'[' + state + ']':<12} {component:<16} {trained:>15,} of {total:>15,} parameters")
    return "\n".join(lines)


def parameter_groups(trainable: Named, optim: OptimRecipe) -> list[dict[str, Any]]:
    """Optimiser groups: one per part and decay (matrices) or not (biases, norms); `peak_lr`, `component` and `names` ride along."""
    groups: list[dict[str, Any]] = []
    for component, names in by_component(trainable).items():
        peak = optim.lr
        if component == "projector" and optim.mm_projector_lr is not None:
            peak = optim.mm_projector_lr
        elif component == "visual_expert" and optim.visual_expert_lr is not None:
            peak = optim.visual_expert_lr
        elif component in EXPERTS:
            peak *= optim.expert_lr_multiplier
        for decay in (True, False):
            chosen = [name for name in names if (trainable[name].ndim >= 2 and not name.endswith("bias")) == decay]
            if chosen:
                weight_decay = optim.weight_decay if decay else 0.0
                parameters = [trainable[name] for name in chosen]
                groups.append(dict(params=parameters, lr=peak, peak_lr=peak, weight_decay=weight_decay, component=component, names=chosen))
    return groups


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor on the peak rate at optimiser step `step` (1-based) of `steps`: linear warm-up, then half a cosine.

    The same numbers as transformers' `get_cosine_schedule_with_warmup` under its Trainer (which LLaVA uses): with a warm-up the
    first step has rate 0.
    """
    warmup, done = math.ceil(steps * warmup_ratio), step - 1
    if done < warmup:
        return done / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen weights in `dtype` (the experts stay fp32: they compute in it), and with them a frozen tower's batch statistics."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and component_of(name) not in EXPERTS:
            parameter.data = parameter.data.to(dtype)
    tower = model.get_submodule("model.vision_tower")
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.to(dtype)


def gradient_norms(trainable: Named) -> dict[str, Tensor]:
    """L2 norm of the gradient of each part (0-d tensors); parts without any gradient are left out."""
    norms = {}
    for component, names in by_component(trainable).items():
        gradients = [g for name in names if (g := trainable[name].grad) is not None]
        if gradients:
            norms[component] = torch.nn.utils.get_total_norm(gradients)
    return norms


def clip(trainable: Named, norms: dict[str, Tensor], optim: OptimRecipe) -> None:
    """Scale gradients so that their norm is at most `clip_norm`; the experts apart at `expert_clip_norm`, if that is set."""
    apart = EXPERTS if optim.expert_clip_norm is not None else frozenset()
    for limit, chosen in ((optim.clip_norm, norms.keys() - apart), (optim.expert_clip_norm, norms.keys() & apart)):
        parameters = [p for name, p in trainable.items() if component_of(name) in chosen]
        if limit is not None and parameters:
            total = torch.stack([norms[component] for component in sorted(chosen)]).norm()
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
