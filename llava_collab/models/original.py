"""Reads what haotian-liu/LLaVA writes: full models, a trained projector alone, and LoRA over a base.

    full model       config.json, pytorch_model*.bin or model*.safetensors; the vision tower inside, or only named in config.json
    projector        config.json, mm_projector.bin                                          (stage 1; over a language model)
    LoRA             config.json, adapter_config.json, adapter_model.*, non_lora_trainables.bin   (over a language model or a full model)

Names and behaviour follow `llava/model/builder.py`, `llava_arch.py` and `train.py` at c121f04. LLaVA marks an image by the id -200, which
is no token: its vocabulary is the language model's (32000). Here, as in the llava-hf checkpoints, `<image>` and `<pad>` are tokens (32000
and 32001) and the embedding is filled up to a multiple of 64 rows (32064); what is added starts as the mean of all rows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, MistralConfig, Qwen2Config

from ..data.conversation import IMAGE_MARK
from ..files import read_json
from .configuration import HyperLlavaConfig
from .weights import local_folder, read_tensors, weight_files

RENAMES = (  # theirs -> ours; the first prefix that fits counts, in both directions
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
DECODERS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig, "llava_qwen": Qwen2Config}
PROJECTOR, LORA_REST = "mm_projector.bin", "non_lora_trainables.bin"
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$")  # old checkpoints store what is computed
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


@dataclass
class Original:
    """A LLaVA model read into our names: everything that a folder of ours is made of."""

    config: HyperLlavaConfig
    tensors: dict[str, Tensor]
    tokenizer: Any
    image_processor: Any
    image_aspect_ratio: str
    variant: str


def variant_of(folder: Path) -> str | None:
    """`full`, `projector` or `lora` for a folder of the original LLaVA, None for anything else. Only files decide, never a name."""
    config = folder / "config.json"
    if not config.is_file() or "mm_vision_tower" not in read_json(config):
        return None
    if (folder / "adapter_config.json").is_file():
        return "lora"
    if weight_files(folder):
        return "full"  # its mm_projector.bin, if it has one, is the one it was trained from
    return "projector" if (folder / PROJECTOR).is_file() else "full"


def read_original(folder: Path, base: str | None = None, vision_tower: str | None = None) -> Original:
    """The model in a folder of the original LLaVA.

    `base`: what a projector or a LoRA stands on (default: what its own files name). `vision_tower`: a CLIP folder or hub id instead of
    the one that config.json names. Raises ValueError for settings that LLaVA-1.5's architecture does not have, and for weights that
    are not those the settings ask for, by name.
    """
    variant = variant_of(folder)
    if variant is None:
        raise ValueError(f"{folder} is not an original LLaVA folder: its config.json names no mm_vision_tower")
    raw = read_json(folder / "config.json")
    layer, strategy, aspect = _settings(raw, folder)
    tensors, tokenizer_folder = _tensors(folder, variant, base)
    tower = local_folder(vision_tower or raw["mm_vision_tower"])
    vision = CLIPVisionConfig.from_pretrained(tower)
    dtype = tensors["lm_head.weight"].dtype if "lm_head.weight" in tensors else next(iter(tensors.values())).dtype
    if not any(name.startswith(RENAMES[2][0]) for name in tensors):
        tensors |= _clip_tensors(tower, dtype)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items() if not _DERIVED.search(name)}
    rows = _add_tokens(tensors, tokenizer, folder)
    known = DECODERS[raw["model_type"]]
    fields = set(known().to_dict()) | {"rope_theta", "rope_scaling", "head_dim"}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    dropped = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
    text = (
        {key: value for key, value in raw.items() if key in fields and key not in dropped and value is not None}
        | {"vocab_size": rows}
        | ids
    )
    config = HyperLlavaConfig(
        vision_config=vision,
        text_config=known.from_dict(text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    config.dtype = dtype
    return Original(config, _renamed(tensors), tokenizer, CLIPImageProcessorPil.from_pretrained(tower), aspect, variant)


def their_name(name: str) -> str:
    """The original's name of one of our tensors, for messages."""
    return next((old + name.removeprefix(new) for old, new in RENAMES if name.startswith(new)), name)


def _settings(raw: dict[str, Any], folder: Path) -> tuple[int, Any, str]:
    """Hidden state taken, select strategy, aspect ratio; ValueError where LLaVA-1.5's architecture has no such thing."""
    where, features = folder / "config.json", {"patch": "default", "cls_patch": "full"}
    aspects = {"pad": "pad", "square": "none", None: "none"}
    for key, known, given in (
        ("model_type", DECODERS, raw.get("model_type")),
        ("mm_projector_type", ("mlp2x_gelu",), raw.get("mm_projector_type", "linear")),
        ("mm_vision_select_feature", features, raw.get("mm_vision_select_feature", "patch")),
        ("image_aspect_ratio", aspects, raw.get("image_aspect_ratio")),
        ("mm_use_im_start_end", (False,), raw.get("mm_use_im_start_end", False)),
    ):
        if given not in known:
            raise ValueError(f"{where}: {key} is {given!r}; LLaVA-1.5's architecture, which is converted here, has {list(known)}")
    layer = raw.get("mm_vision_select_layer", -2)
    return layer, features[raw.get("mm_vision_select_feature", "patch")], aspects[raw.get("image_aspect_ratio")]


def _tensors(folder: Path, variant: str, base: str | None) -> tuple[dict[str, Tensor], Path]:
    """All tensors under the original's names, and the folder of the tokenizer."""
    if variant == "full":
        if not (files := weight_files(folder)):
            raise ValueError(f"{folder} has a config.json of LLaVA but neither model weights, {PROJECTOR} nor adapter_config.json")
        return read_tensors(files), folder
    adapter = read_json(folder / "adapter_config.json") if variant == "lora" else {}
    named = base or adapter.get("base_model_name_or_path") or read_json(folder / "config.json").get("_name_or_path")
    if not named:
        raise ValueError(f"{folder} holds a {variant} only and names no base; give the one it was trained over (--base)")
    try:
        under = local_folder(named)
    except ValueError as error:
        raise ValueError(f"{folder} holds a {variant} only, over {named}: {error}. Give its folder (--base)") from error
    if not (files := weight_files(under)):
        raise ValueError(f"the base {under} of {folder} holds no weights")
    tensors = read_tensors(files)
    trained = folder / (LORA_REST if variant == "lora" else PROJECTOR)
    if not trained.is_file():
        raise ValueError(f"{folder} lacks {trained.name}, which holds its projector")
    rest = {_plain(name): tensor for name, tensor in read_tensors([trained]).items()}
    if unknown := [name for name in rest if not name.startswith(("model.", "lm_head."))]:
        raise ValueError(f"{trained} has unexpected keys: {', '.join(unknown[:8])}")
    tensors |= {name: tensor for name, tensor in rest.items() if not _LORA.fullmatch(name)}
    if variant == "lora":
        _merge(tensors, adapter, folder)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return tensors, folder if own else under


def _plain(name: str) -> str:
    """A name as training wrote it (behind DeepSpeed's and peft's wrappers) by its plain model name."""
    name = name.removeprefix("base_model.model.")
    name = name.removeprefix("model.") if name.startswith("model.model.") else name
    return f"model.{name}" if name.startswith("mm_projector.") else name


def _merge(tensors: dict[str, Tensor], adapter: dict[str, Any], folder: Path) -> None:
    """Add a LoRA to its weights, in fp32: W + alpha / r * B A (Hu et al. 2021; alpha / sqrt(r) for rsLoRA)."""
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if adapter.get(key):
            raise ValueError(f"{folder / 'adapter_config.json'}: {key} is {adapter[key]!r}, which LLaVA's LoRA never is")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors or .bin")
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(files[:1]).items():
        match = _LORA.fullmatch(_plain(name))
        if match is None or f"{match['module']}.weight" not in tensors:
            raise ValueError(f"{files[0]} has an unexpected key: {name}")
        factors.setdefault(match["module"], {})[match["part"]] = tensor.float()
    rank = adapter["r"]
    scale = adapter["lora_alpha"] / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{files[0]}: {module} lacks its lora_{'A' if 'B' in pair else 'B'}.weight")
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.float() + scale * (pair["B"] @ pair["A"])).to(weight.dtype)


def _clip_tensors(tower: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model: Any
    model, report = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    if report["missing_keys"]:
        raise ValueError(f"the vision tower {tower} lacks {', '.join(sorted(report['missing_keys'])[:8])}")
    return {RENAMES[2][0] + name: tensor for name, tensor in model.state_dict().items()}


def _add_tokens(tensors: dict[str, Tensor], tokenizer: Any, folder: Path) -> int:
    """Give the tokenizer `<image>` and `<pad>` and the embeddings (in place) rows for them; returns the number of rows."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token in (None, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors]
    rows = 0
    for name in names:
        old_VD = tensors[name]
        rows = -(-max(len(tokenizer), old_VD.shape[0]) // 64) * 64
        mean_D = old_VD.float().mean(0).to(old_VD.dtype)
        tensors[name] = torch.cat([old_VD, mean_D.expand(rows - old_VD.shape[0], -1)])
    if not names:
        raise ValueError(f"{folder} has no model.embed_tokens.weight")
    return rows


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; a name that has none keeps its own, and is found unexpected later."""
    pairs = ((name, next(((old, new) for old, new in RENAMES if name.startswith(old)), None)) for name in tensors)
    return {name if pair is None else pair[1] + name.removeprefix(pair[0]): tensors[name] for name, pair in pairs}
