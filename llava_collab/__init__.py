"""Large and small models that work together, built around a LLaVA-style multimodal model.

`from llava_collab import HyperLlavaForConditionalGeneration` and its companions; they are imported when first asked for, so that
`import llava_collab` stays light and a broken optional part shows its own error where it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .torchvision_guard import mend_torchvision

mend_torchvision()

if TYPE_CHECKING:
    from .collab.single import Single
    from .models import (
        HyperLlavaConfig,
        HyperLlavaForConditionalGeneration,
        HyperLlavaModel,
        HyperLlavaProcessor,
        HyperNetwork,
        LanguageExpertConfig,
        VisualExpertConfig,
    )
    from .types import Answer, Model, Request, Turn, Usage

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "HyperLlavaConfig",
    "HyperLlavaForConditionalGeneration",
    "HyperLlavaModel",
    "HyperLlavaProcessor",
    "HyperNetwork",
    "LanguageExpertConfig",
    "Model",
    "Request",
    "Single",
    "Turn",
    "Usage",
    "VisualExpertConfig",
]
_TYPES = {"Answer", "Model", "Request", "Turn", "Usage"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = ".types" if name in _TYPES else ".collab.single" if name == "Single" else ".models"
        return getattr(import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
