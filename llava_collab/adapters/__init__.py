"""Low-rank experts beside linear layers of any transformers model: LoRA, MoELoRA, HydraLoRA, TeamLoRA as configurations of one layer.

    from llava_collab.adapters import TeamLoraConfig          # registers the method with peft
    model = get_peft_model(model, TeamLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))

A HyperLLaVA carries them in its own configuration instead (`adapter` in config.json), beside its experts.
"""

from typing import TYPE_CHECKING, Any

from .layer import METHODS, AdapterConfig, LowRankConfig, LowRankExperts
from .routing import RoutingContext, checkpoint_context

if TYPE_CHECKING:
    from .peft_method import TeamLoraConfig, export_lora

__all__ = [
    "METHODS",
    "AdapterConfig",
    "LowRankConfig",
    "LowRankExperts",
    "RoutingContext",
    "TeamLoraConfig",
    "checkpoint_context",
    "export_lora",
]


def __getattr__(name: str) -> Any:
    """What needs peft, which a model that carries its experts itself does not."""
    if name in ("TeamLoraConfig", "export_lora"):
        from . import peft_method

        return getattr(peft_method, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
