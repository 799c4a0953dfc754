"""HyperLLaVA in the Hugging Face form. Importing this registers its classes with transformers' Auto classes."""

from .configuration import ExpertConfig, HyperLlavaConfig
from .hypernetwork import ExpertWeights, HyperNetwork
from .modeling import HyperLlavaForConditionalGeneration, HyperLlavaModel
from .processor import HyperLlavaProcessor

__all__ = [
    "ExpertConfig",
    "ExpertWeights",
    "HyperLlavaConfig",
    "HyperLlavaForConditionalGeneration",
    "HyperLlavaModel",
    "HyperLlavaProcessor",
    "HyperNetwork",
]
