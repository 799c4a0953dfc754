"""Makes a torchvision that was built for CUDA importable beside a CPU-only torch.

The registry's torchvision wheel for Linux is built for CUDA. Beside a CPU-only torch its C++ library does not load, and its import stops at
the two operators that it registers fakes for; transformers, peft, timm and open_clip then fail wherever they only look whether
torchvision is there. Declaring the schemas of these two operators (no kernels) is all that the import needs; `torchvision.ops.nms`
itself still raises torchvision's own error. Where torchvision works, or is absent, nothing is touched.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: Any = None  # a torch.library.Library; the schemas live as long as it does


def mend_torchvision() -> bool:
    """Whether torchvision had to be mended, now or earlier in this process. Cheap where there is nothing to mend.

    It has to run before transformers imports anything about images. Errors of torchvision's import that are not about its missing
    operators are left to whoever imports it.
    """
    global _library
    if _library is not None or not _suspicious():
        return _library is not None
    try:
        import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return False
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _library.define(_SCHEMA.format(operator))
    return _library is not None


def _suspicious() -> bool:
    """Whether there is a torchvision, and a torch without CUDA libraries; found without importing either."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or importlib.util.find_spec("torchvision") is None:
        return False
    return not any((Path(torch.origin).parent / "lib").glob("libtorch_cuda*"))
