"""Deltas: a model stored as its difference from a base, in one folder that `build.load` opens like any other.

    config.json, processor files     as in a whole model
    delta.safetensors                every tensor that is not the base's, bit for bit, stored whole; of weights that were trained by LoRA,
                                     if its factors are given, `<name>.lora_A` [R, I] and `<name>.lora_B` [O, R] instead
    base.json                        what the base is, and the sha256 of each of its tensors that the model takes over; of a base that is a
                                     delta itself the sha256 of its file, since what LoRA factors give differs in last bits between CPUs
    README.md                        a model card

The base is either the named parts that a model was built from (a `ModelSpec`) or a whole checkpoint (folder or hub id). It is cast to the
delta's dtype before it is compared, hashed or used, so a bf16 delta fits the fp32 base that it was trained from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..files import publish, read_json, sha256, write_json, write_text
from .bases import is_base
from .build import ModelSpec, build, load
from .convert import same_bits
from .modeling import HyperLlavaForConditionalGeneration
from .processor import HyperLlavaProcessor
from .weights import local_folder, read_tensors

TENSORS, BASE = "delta.safetensors", "base.json"
_PARTS = ("language_model", "vision_tower")


@dataclass(frozen=True)
class LoraFactors:
    """The update `scale * up_OR @ down_RI` of one weight [O, I]."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def merged(self, base_OI: Tensor) -> Tensor:
        """fp32 [O, I], by the arithmetic of peft's merge."""
        return base_OI.float() + (self.up_OR.float() @ self.down_RI.float()) * self.scale


def lora_factors(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, LoraFactors]:
    """The factors of a model's LoRA layers by the name that their weight has after merging; take them before the merge.

    dtype: what they are kept in (default: their own).
    """
    factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            down, up = (part["default"].weight.detach().to("cpu", dtype, copy=True) for part in (layer.lora_A, layer.lora_B))  # pyright: ignore
            factors[f"{name}.weight"] = LoraFactors(down, up, float(layer.scaling["default"]))
    return factors


def is_delta(folder: str | Path) -> bool:
    """Whether a folder holds a delta."""
    return (Path(folder) / TENSORS).is_file()


def save_delta(
    model: HyperLlavaForConditionalGeneration,
    processor: HyperLlavaProcessor,
    folder: Path,
    base: ModelSpec | str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    lora: Mapping[str, LoraFactors] | None = None,
    licence: str = "other",
) -> Path:
    """Write what `model` has that `base` lacks to `folder` (which may be an earlier delta; it is replaced).

    seed: the one that a `ModelSpec` was built with; `tiny` and the rows of added tokens depend on it.
    dtype: what weights are stored in, but for the experts, which stay fp32 (default: the model's own). licence: for the model card.
    lora: factors of merged weights; they must reproduce these weights.
    Raises ValueError where they do not, where the written folder does not reproduce the model, and where `folder` is something else.
    """
    if folder.exists() and not is_delta(folder) and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already and is no delta; give another folder")
    dtype = dtype or model.dtype
    origin = _origin(base, seed, folder)
    under, computed = _base_tensors(origin, folder), _computed(origin, folder)
    target = {name: _cast(name, tensor.detach().cpu(), dtype) for name, tensor in _untied(model).items()}
    stored, facts = _difference(target, {name: _cast(name, tensor, dtype) for name, tensor in under.items()}, under, lora or {}, dtype)
    facts["sha256"] = {name: value for name, value in facts["sha256"].items() if name not in computed}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures, config.dtype = [type(model).__name__], dtype
        for part in (config, config.get_text_config(), config.vision_config):
            if part is not None:  # folders travel, places on one machine don't
                part._name_or_path = ""  # pyright: ignore[reportAttributeAccessIssue]
        config.save_pretrained(temporary)
        (model.generation_config or GenerationConfig()).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        save_file(stored, temporary / TENSORS, {"format": "pt"})
        write_json(temporary / BASE, origin | facts)
        write_text(temporary / "README.md", _card(folder.name, origin, facts, stored, model, licence))
        again = _combine(temporary, under, dtype, computed)
        if lost := [name for name in target if name not in again or not same_bits(target[name], again[name])]:
            raise ValueError(f"{folder} would not hold the model as it is: {', '.join(lost[:8])}")
        HyperLlavaProcessor.from_pretrained(temporary)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def read_delta(folder: Path) -> tuple[dict[str, Tensor], torch.dtype]:
    """All tensors of the model that a delta folder stands for, by their names in memory, and the dtype they are stored in.

    Raises ValueError if the base can't be had, or is not the one that the delta was made from (the differing tensors are named).
    """
    origin = read_json(folder / BASE)
    dtype = getattr(torch, read_json(folder / "config.json")["dtype"])
    return _combine(folder, _base_tensors(origin, folder), dtype, _computed(origin, folder)), dtype


def _origin(base: ModelSpec | str | Path, seed: int, folder: Path) -> dict[str, Any]:
    """What base.json says of the base."""
    if isinstance(base, ModelSpec) and base.init_from is not None:
        base = base.init_from
    if isinstance(base, ModelSpec):
        return {"base": {name: _named(getattr(base, name), folder) for name in _PARTS}, "seed": seed}
    named = _named(str(base), folder)
    if is_delta(base):
        named["delta_sha256"] = sha256(Path(base) / TENSORS)
    return {"base": {"checkpoint": named}}


def _named(source: str, folder: Path) -> dict[str, str]:
    """A part of the base: its name; relative to the delta's place if it is a folder, with its commit if it is a hub repository."""
    if source in ("tiny", "fused") or source.startswith(("timm/", "open_clip/")) or (is_base(source) and not Path(source).exists()):
        return {"name": source}
    if Path(source).is_dir():
        return {"folder": os.path.relpath(source, folder)}
    return {"name": source, "revision": local_folder(source).name}


def _base_tensors(origin: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors that the base gives (fresh parts are no base), on the CPU in its own dtype."""
    parts = {part: _place(value, folder) for part, value in origin["base"].items()}
    if "checkpoint" in parts:
        model, _ = load(parts["checkpoint"])
        return _untied(model)
    model, _ = build(ModelSpec(language_model=parts["language_model"], vision_tower=parts["vision_tower"]), seed=origin["seed"])
    return {name: tensor for name, tensor in _untied(model).items() if "multi_modal_projector" not in name}


def _computed(origin: dict[str, Any], folder: Path) -> frozenset[str]:
    """The names of the base's tensors that it gets from LoRA factors, itself or by its own base."""
    if "checkpoint" not in origin["base"]:
        return frozenset()
    place = Path(_place(origin["base"]["checkpoint"], folder))
    if not is_delta(place):
        return frozenset()
    below = read_json(place / BASE)
    return frozenset(below["lora"]) | _computed(below, place)


def _place(part: dict[str, str], folder: Path) -> str:
    if "folder" in part:
        place = Path(os.path.normpath(folder / part["folder"]))
        if not place.is_dir():
            raise ValueError(f"{folder} is a delta over {place}, which is not there; put it there, or correct `folder` in {folder / BASE}")
        if part.get("delta_sha256", "") not in ("", sha256(place / TENSORS) if is_delta(place) else None):
            raise ValueError(f"{folder} was made over another {place / TENSORS} than is there; restore it, or correct {folder / BASE}")
        return str(place)
    return str(local_folder(part["name"], part["revision"])) if "revision" in part else part["name"]


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with one name for weights that have several."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and "_expert" not in name else tensor


def _difference(
    target: dict[str, Tensor], cast: dict[str, Tensor], under: dict[str, Tensor], lora: Mapping[str, LoraFactors], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What to store, and the hashes and LoRA scales that go into base.json."""
    if unknown := sorted(set(lora) - target.keys()):
        raise ValueError(f"LoRA factors of weights that the model does not have: {', '.join(unknown[:8])}")
    stored: dict[str, Tensor] = {}
    hashes, scales = {}, {}
    for name, tensor in target.items():
        same = name in cast and same_bits(tensor, cast[name])
        if not same and name in lora and name in under:  # over named parts a projector is fresh, and has no base
            merged = lora[name].merged(under[name]).to(dtype)
            if not same_bits(merged, tensor):
                gap = (merged.float() - tensor.float()).abs().max().item()
                raise ValueError(
                    f"the LoRA factors of {name} do not give its weight (largest difference {gap:.3g}); were they merged in fp32?"
                )
            stored |= {f"{name}.lora_A": lora[name].down_RI.contiguous(), f"{name}.lora_B": lora[name].up_OR.contiguous()}
            scales[name] = lora[name].scale
        elif not same:
            stored[name] = tensor.contiguous()
        if same or name in scales:
            hashes[name] = _sha256(cast[name] if same else under[name])
    return stored, {"lora": scales, "sha256": hashes}


def _combine(folder: Path, under: dict[str, Tensor], dtype: torch.dtype, computed: frozenset[str]) -> dict[str, Tensor]:
    """The whole model's tensors, from a delta folder and its base's tensors. Raises ValueError for another base.

    `computed`: tensors of the base that have no hash of their own.
    """
    facts, tensors = read_json(folder / BASE), read_tensors([folder / TENSORS])
    scales = facts["lora"]
    differing = []
    for name in [*facts["sha256"], *(name for name in under if name in computed and name not in tensors)]:
        base = under.get(name)
        if base is not None and name not in scales:
            base = _cast(name, base, dtype)
        if base is None or (name in facts["sha256"] and _sha256(base) != facts["sha256"][name]):
            differing.append(name)
        elif name in scales:
            pair = LoraFactors(tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B"), scales[name])
            tensors[name] = pair.merged(base).to(dtype)
        else:
            tensors[name] = base
    if differing:
        raise ValueError(
            f"{folder} was made over another base than {facts['base']} is here: {len(differing)} of {len(facts['sha256'])} tensors "
            f"differ by sha256 ({', '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}). Restore that base, or correct its"
            f" place in {folder / BASE}"
        )
    return tensors


def _sha256(tensor: Tensor) -> str:
    """Of shape, dtype and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _card(name: str, origin: dict, facts: dict, stored: dict[str, Tensor], model: HyperLlavaForConditionalGeneration, licence: str) -> str:
    parts = {part: value.get("name", value.get("folder")) for part, value in origin["base"].items()}
    experts = {part: getattr(model.config, part) for part in ("visual_expert", "language_expert", "adapter")}
    lines = [f"- {part}: {'off' if value is None else value}" for part, value in experts.items()]
    return "\n".join(
        [
            "---", f"license: {licence}", "library_name: llava_collab", "pipeline_tag: image-text-to-text", "---", "",
            f"# {name}", "",
            f"A HyperLLaVA (arXiv 2403.13447), stored as its difference from {' and '.join(f'{p} {v}' for p, v in parts.items())}.", "",
            *lines,
            f"- stored here: {sum(t.numel() for t in stored.values()):,} numbers in {len(stored)} tensors; {len(facts['sha256'])} are "
            "the base's, verified by sha256 when it is loaded", "",
            "```python", "from llava_collab.models.build import load", "", f'model, processor = load("{name}")', "```", "",
        ]
    )  # fmt: skip
