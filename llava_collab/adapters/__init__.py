"""Low-rank experts beside linear layers of any transformers model: LoRA, MoELoRA, HydraLoRA, TeamLoRA as configurations of one layer.

    from llava_collab.adapters import TeamLoraConfig          # registers the method with peft
    model = get_peft_model(model, TeamLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))

A HyperLLaVA carries them in its own configuration instead (`adapter` in config.json), beside its experts.
"""

from .layer import METHODS, AdapterConfig, LowRankConfig, LowRankExperts
from .peft_method import TeamLoraConfig, export_lora
from .routing import RoutingContext, checkpoint_context

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
