"""The low-rank experts as a peft method, for any peft user's own script: `get_peft_model(model, TeamLoraConfig(...))`.

Importing this module registers the method; a process that loads such an adapter has to import it too. peft has no public way to add a name
to its list of methods, so `_register` adds it to the enumeration (peft 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_json
from .layer import LowRankConfig, LowRankExperts

_NAME = "teamlora"


@dataclass
class TeamLoraConfig(LowRankConfig, PeftConfig):
    """peft's configuration of the experts; the layers are named by `target_modules`, as always in peft.

    `TeamLoraConfig.of("moelora", experts=4, rank=16)` for a method of `METHODS`. What is saved names `experts` and `rank`: rank is one
    expert's.
    """

    target_modules: list[str] | str | None = field(default=None, kw_only=True)
    """Names of linear layers, a regular expression, "all-linear", or None for the FFN of a Llama-like decoder."""
    exclude_modules: list[str] | str | None = field(default=None, kw_only=True)
    """Not these."""
    layers_to_transform: list[int] | int | None = field(default=None, kw_only=True)
    """Only in these blocks."""
    layers_pattern: list[str] | str | None = field(default=None, kw_only=True)
    """What blocks are called, where not `layers`."""
    modules_to_save: list[str] | None = field(default=None, kw_only=True)
    """Other modules that are trained whole and saved beside."""

    def __post_init__(self) -> None:
        LowRankConfig.__post_init__(self)
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType[_NAME.upper()]
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))

    @classmethod
    def of(cls, method: str, **settings: Any) -> TeamLoraConfig:
        """A method of `METHODS`, with `settings` of either configuration. Raises ValueError for an unknown method."""
        return cls.read({"method": method, **settings}, "TeamLoraConfig")


class TeamLoraLayer(nn.Module, BaseTunerLayer):
    """A linear layer with the experts of one or more adapters."""

    adapter_layer_names = ("teamlora_experts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: TeamLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.teamlora_experts = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: TeamLoraConfig) -> None:
        """Add or replace an adapter."""
        base: Any = self.get_base_layer()
        settings = LowRankConfig(**{key.name: getattr(config, key.name) for key in fields(LowRankConfig)})
        self.teamlora_experts[adapter_name] = LowRankExperts(base.in_features, base.out_features, settings)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of every active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.teamlora_experts:
                    out = self.teamlora_experts[name](x, out)
        return out

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base layer's weight. Raises ValueError, changing nothing, for routed experts and quantised weights."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.teamlora_experts]
        updates = [self._update(name) for name in names]
        if not names:
            return
        weight: Any = getattr(self.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise ValueError(
                f"there is no merge into a quantised layer ({type(self.get_base_layer()).__name__}); dequantise the base first"
            )
        merged = sum(updates, weight.data.float()).to(weight.dtype)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"merging {names} would put values that are not finite into the weights")
        weight.data = merged
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged updates off again."""
        weight: Any = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data = (weight.data.float() - self._update(self.merged_adapters.pop())).to(weight.dtype)

    def _update(self, name: str) -> Tensor:
        down, up = self.teamlora_experts[name].factors()  # pyright: ignore[reportCallIssue]
        return up.float() @ down.float()


class TeamLoraModel(BaseTuner):
    """Puts the experts on a model's layers."""

    prefix = "teamlora_"
    tuner_layer_cls = TeamLoraLayer
    target_module_mapping = dict.fromkeys(  # pyright: ignore[reportAssignmentType]
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "llava", "hyper_llava"),
        ["gate_proj", "up_proj", "down_proj"],
    )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft's way to other adapters in every row of a batch (`adapter_names`), which these do not have: a ValueError, not silence."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: these experts are the same for all rows of a batch; set_adapter, and a batch for each")
        yield

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, TeamLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not (hasattr(target, "in_features") and hasattr(target, "out_features")):
            raise ValueError(f"{current_key} is a {type(target).__name__}; low-rank experts stand beside linear layers only")
        layer = TeamLoraLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:  # not the other way round: quantised base weights can't require gradients
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def export_lora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write an adapter as a plain LoRA that peft, or any server that speaks it, loads without this project.

    Raises ValueError where none exists: experts that are routed.
    """
    folder, tensors, rank = Path(folder), {}, 0
    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, TeamLoraLayer) and adapter_name in layer.teamlora_experts:
            down, up = layer.teamlora_experts[adapter_name].factors()  # pyright: ignore[reportCallIssue]
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down.contiguous(), up.contiguous()
            rank = down.shape[0]
            names.append(name.removeprefix("base_model.model."))
    if not tensors:
        raise ValueError(f"the model has no adapter {adapter_name!r} of this kind")
    given: Any = model.peft_config[adapter_name]
    if given.modules_to_save:
        raise ValueError(
            f"modules_to_save {given.modules_to_save} were trained whole, which a plain LoRA file does not hold: save_pretrained does"
        )
    pattern = "|".join(map(re.escape, names))  # these very layers, whatever the adapter's own pattern would match elsewhere
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the scale is in B
        target_modules=pattern,
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(folder / "adapter_config.json", plain)
    return folder


def _register() -> None:
    name = _NAME.upper()
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)  # an enumeration refuses new names; until Python 3.11 it looked them up in the map below
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    register_peft_method(name=_NAME, config_cls=TeamLoraConfig, model_cls=TeamLoraModel, prefix=TeamLoraModel.prefix)


_register()
