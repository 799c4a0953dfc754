"""Large and small models that work together, built around a LLaVA-style multimodal model.

`from llava_collab import HyperLlavaForConditionalGeneration` and its companions; they are imported when first asked for, so that
`import llava_collab` stays light and a broken optional part shows its own error where it is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODELS = (
    "ExpertConfig",
    "HyperLlavaConfig",
    "HyperLlavaForConditionalGeneration",
    "HyperLlavaModel",
    "HyperLlavaProcessor",
    "HyperNetwork",
)
_TYPES = ("Answer", "Model", "Request", "Single", "Turn", "Usage")
__all__ = [*_MODELS, *_TYPES]


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(import_module(".models", __name__), name)
    if name in _TYPES:
        return getattr(import_module(".types", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
