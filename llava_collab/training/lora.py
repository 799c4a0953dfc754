"""LoRA on the language model and the projector by peft: put in, and merged into a full-precision base at the end."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from llava_collab.training.components import component_of
from llava_collab.training.recipe import RecipeError, TuneRecipe


def add_adapters(model: nn.Module, tune: TuneRecipe) -> LoraModel:
    """Put adapters on the linear layers of the parts that `tune` adapts, in place; the returned tuner merges them later.

    Raises ValueError (by peft) where no layer at all fits, RecipeError where none of one of the parts does (`tune.lora.target`).
    """
    names = "|".join(map(re.escape, tune.lora.target))
    layers = {"llm": rf"model\.language_model\.layers\..*\.({names})", "projector": r"model\.multi_modal_projector\.linear_[12]"}
    config = LoraConfig(
        r=tune.lora.r,
        lora_alpha=tune.lora.alpha,
        lora_dropout=tune.lora.dropout,
        target_modules="|".join(layers[part] for part in sorted(tune.adapted)),
        bias="none",
    )
    tuner = LoraModel(model, config, "default")
    reached = {component_of(name) for name, _ in model.named_parameters() if ".lora_" in name}
    if missed := tune.adapted - reached:
        raise RecipeError(
            f"no linear layer of the {', '.join(sorted(missed))} got an adapter; correct tune.lora.target {tune.lora.target}."
        )
    return tuner


def merge_adapters(tuner: LoraModel) -> nn.Module:
    """The plain model with the adapters' update added to its weights (fp32); adapters are gone."""
    return tuner.merge_and_unload(safe_merge=True)


def require_4bit() -> None:
    """Raise RecipeError with the cure where a 4-bit base can't work on this machine."""
    if not torch.cuda.is_available():
        raise RecipeError("tune.llm: lora4bit needs a CUDA GPU. Use tune.llm: lora (the same adapters on an unquantised base).")
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RecipeError("tune.llm: lora4bit needs bitsandbytes: pip install bitsandbytes. Or use tune.llm: lora.") from error


def quantise(model: nn.Module, device: torch.device) -> None:
    """Store the language model's linear layers in 4 bits (NF4, bf16 arithmetic), in place, on a CUDA device (QLoRA, 2305.14314)."""
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    if getattr(model.config, "adapter", None) is not None:
        raise RecipeError(
            "tune.llm: lora4bit quantises plain linear layers, and this model's adapter has changed them: use tune.llm: frozen."
        )
    blocks = model.get_submodule("model.language_model.layers")
    linears = [(name, module) for name, module in blocks.named_modules() if type(module) is nn.Linear]
    for name, linear in linears:
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(blocks.get_submodule(parent), leaf, small.to(device))
