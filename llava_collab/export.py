"""Look at what the hypernetworks wrote for one sample: its experts as a safetensors file that says how to apply them.

Tensors, every one a whole matrix, whatever the generator (R rows: K, or 2 K where the activation is a gate):

    language_expert.block_N.down [R, D], .up [D, K]      of decoder block N (from 0)
    visual_expert.image_I.down   [R, V], .up [D, K]      of image I (from 0), on the projector's first layer
    visual_expert_2.image_I.down [R, D], .up [D, K]      the same on its second layer

The metadata entry `experts` is JSON: `model`, `model_sha256`, `prompt`, `images` (name and sha256 of each file), and for each expert
`places`, `activation`, `equation` (how to apply the matrices), `x` (what to apply them to), `added_to`, `tensors` (their shapes);
`json.loads(safe_open(file, "pt").metadata()["experts"])` reads it.

Such weights can't be merged into a model: they belong to one sample, and an activation stands between the two matrices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data.conversation import IMAGE_MARK
from .data.images import resolve_image
from .files import model_sha256, sha256, sync_folder
from .models.configuration import ExpertConfig, HyperLlavaConfig
from .models.hypernetwork import Generated, HyperNetwork
from .types import Request, Turn

EQUATIONS = {
    "silu": "E(x) = up @ silu(down @ x)",
    "gelu": "E(x) = up @ gelu(down @ x), the exact gelu (erf)",
    "swiglu": "E(x) = up @ (silu(g) * v), g the first and v the second half of down @ x",
}


def export_experts(model: Any, processor: Any, prompt: str, images: Sequence[Path], out: Path, *, folder: Path) -> dict[str, Any]:
    """Write the experts that `prompt` and `images` make the model of `folder` generate; returns what the metadata says.

    The file appears whole or not at all. Raises SampleError for an image that can't be opened, ValueError where no expert
    is generated (both are off, or only the visual one is on and there is no image), RecordError if `folder` holds no model.
    """
    generated = _generate(model, processor, prompt, images)
    tensors: dict[str, Tensor] = {}
    experts: dict[str, Any] = {}
    for name, weights in generated.items():
        down, up = HyperNetwork.materialise(weights)
        if name == "language_expert":
            pairs = {f"block_{block}": (down[0, i], up[0, i]) for i, block in enumerate(_blocks(model.config))}
        else:
            pairs = {f"image_{i}": (down[i, 0], up[i, 0]) for i in range(len(images))}
        own = {f"{name}.{place}.{part}": w for place, pair in pairs.items() for part, w in zip(("down", "up"), pair, strict=True)}
        tensors |= {key: w.cpu().contiguous().clone() for key, w in own.items()}
        experts[name] = {
            "places": list(pairs),
            **_meaning(name, model.config),
            "tensors": {key: list(w.shape) for key, w in own.items()},
        }
    meta = {
        "model": folder.name,
        "model_sha256": model_sha256(folder),
        "prompt": prompt,
        "images": [{"name": path.name, "sha256": sha256(resolve_image(path) or path)} for path in images],
        "experts": experts,
    }
    _save(tensors, meta, out)
    return meta


@torch.inference_mode()
def _generate(model: Any, processor: Any, prompt: str, images: Sequence[Path]) -> dict[str, Generated]:
    """What each hypernetwork wrote, by its name, read off while the model reads the prompt as it would to answer it."""
    marks = "" if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n" * len(images)
    batch = processor.encode_requests([Request("export", (Turn("user", marks + prompt),), tuple(images))]).to(model.device)
    found: dict[str, Generated] = {}
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, HyperNetwork)}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output}))
        for name, module in modules.items()
    ]
    try:
        model(**batch, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        why = "the visual expert writes for images only: give one" if modules else "both of this model's experts are off"
        raise ValueError(f"nothing to export, {why}")
    return found


def _blocks(config: HyperLlavaConfig) -> tuple[int, ...]:
    assert config.language is not None
    return config.language.blocks(config.get_text_config().num_hidden_layers)


def _meaning(name: str, config: HyperLlavaConfig) -> dict[str, str]:
    """Where the expert called `name` stands (Eqs. 6 and 7), in words."""
    settings: ExpertConfig | None = config.language if name == "language_expert" else config.visual
    assert settings is not None
    if name == "language_expert":
        x, added_to = "what block N's FFN reads: the output of its post_attention_layernorm, each token", "the FFN's output"
    elif name == "visual_expert_2":
        x, added_to = "act(linear_1 f) of the projector, f a feature of image I; without the first expert", "linear_2's output"
    else:
        x = "f, each feature of image I as the vision tower gives it to the projector"
        before = config.visual is not None and config.visual.insertion == "before_gelu"
        added_to = "linear_1's output, before the GELU" if before else "linear_1's output behind the GELU"
    return {"activation": settings.activation, "equation": EQUATIONS[settings.activation], "x": x, "added_to": added_to}


def _save(tensors: dict[str, Tensor], meta: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    save_file(tensors, temporary, {"experts": json.dumps(meta)})
    with safe_open(temporary, "pt") as stored:
        if set(stored.keys()) != set(tensors):
            raise OSError(f"{temporary} does not hold what was written to it; is the disk full?")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, out)
    sync_folder(out.parent)
