"""HyperLLaVA in the Hugging Face form. Importing this registers its classes with transformers' Auto classes."""

from . import efficientnet_lite, library_towers, towers  # noqa: F401 - registers the towers
from .configuration import ExpertConfig, HyperLlavaConfig, LanguageExpertConfig, VisualExpertConfig
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
    "LanguageExpertConfig",
    "VisualExpertConfig",
]
