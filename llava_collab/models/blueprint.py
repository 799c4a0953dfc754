"""What a model would look like: the configuration of any `ModelSpec`, with no weights, no downloads and no converted bases.

The configuration is the one that `build` would arrive at, so that parameters, memory and arithmetic of a recipe can be counted before
anything is fetched. `meta_model` makes the real modules of it on the meta device, whose tensors have shapes and types but no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from .bases import CUT
from .build import ModelSpec
from .configuration import HyperLlavaConfig
from .efficientnet_lite import EfficientNetLiteConfig
from .modeling import HyperLlavaForConditionalGeneration
from .tiny import tiny_decoder
from .towers import IMAGENET_MEAN, IMAGENET_STD, FusedVisionConfig


class BlueprintError(ValueError):
    """A base whose architecture can't be known from what is here; the message names the cure."""


def _vicuna(width: int, inner: int, layers: int) -> LlamaConfig:
    # 32,000 tokens and <image>, which `build` adds. One head for each 128 channels, no grouped keys.
    heads = width // 128
    return LlamaConfig(
        vocab_size=32001,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


_LANGUAGE: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": tiny_decoder,
    "lmsys/vicuna-7b-v1.5": lambda: _vicuna(4096, 11008, 32),
    "lmsys/vicuna-13b-v1.5": lambda: _vicuna(5120, 13824, 40),
}
_VISION: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": lambda: _clip(32, 64, 3, 2, 32, 8),
    "openai/clip-vit-large-patch14-336": lambda: _clip(1024, 4096, 24, 16, 336, 14),
    "efficientnet-lite0": EfficientNetLiteConfig,
    "dinov2-s": lambda: Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
}


def _clip(width: int, inner: int, layers: int, heads: int, image: int, patch: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, image_size=image, patch_size=patch
    )


def _smollm2(layers: int, tokens: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokens,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def configuration(spec: ModelSpec, earlier: Mapping[str, ModelSpec] | None = None) -> HyperLlavaConfig:
    """The configuration that `build(spec)` gives its model, but for token ids.

    Args:
        earlier: what the model folders that `init_from` may name are built from, where a folder is not there yet.
    Raises:
        BlueprintError: a base or an earlier stage of which nothing is known here. ValueError: experts that can't be.
    """
    if spec.init_from is not None:
        return _initialised(spec, spec.init_from, earlier or {})
    strategy: Any
    text, (vision, layer, strategy) = _language(spec.language_model), _vision(spec.vision_tower)
    return HyperLlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        visual_expert=spec.visual_expert,
        language_expert=spec.language_expert,
        adapter=spec.adapter,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def meta_model(config: HyperLlavaConfig) -> HyperLlavaForConditionalGeneration:
    """The model of a configuration on the meta device, fp32: real modules, no memory."""
    with torch.device("meta"), no_init_weights():
        model = HyperLlavaForConditionalGeneration(config)
    model.tie_weights()
    return model


def _initialised(spec: ModelSpec, folder: str, earlier: Mapping[str, ModelSpec]) -> HyperLlavaConfig:
    """As `load` does it: the checkpoint's model; an expert or adapter named in the spec is added or replaces its namesake."""
    if (Path(folder) / "config.json").is_file():
        stored: Any = AutoConfig.from_pretrained(folder)
        known: dict[str, Any] = {
            key: value for key, value in stored.to_dict().items() if key not in ("model_type", "architectures", "dtype")
        }
    elif folder in earlier:
        known = configuration(earlier[folder], earlier).to_dict()
        known.pop("model_type", None)
    else:
        raise BlueprintError(
            f"init_from {folder}: no such model folder, and no recipe beside this one trains it; run that stage first, "
            "or name the bases (language_model, vision_tower) and set init_from to null"
        )
    parts = {"visual_expert": spec.visual_expert, "language_expert": spec.language_expert, "adapter": spec.adapter}
    known |= {name: value for name, value in parts.items() if value is not None}
    return HyperLlavaConfig(**known)


def _language(name: str) -> PreTrainedConfig:
    cut = CUT.fullmatch(name)
    if cut is not None:
        return _smollm2(int(cut["layers"] or 30), 1024 * int(cut["kilo"]) if cut["kilo"] else 49161)
    return _LANGUAGE[name]() if name in _LANGUAGE else _stored(name)


def _vision(name: str) -> tuple[PreTrainedConfig, int, str]:
    """Configuration, hidden state taken, select strategy: `build`'s choices."""
    if name == "fused":
        return _fused(), -1, "full"
    config = _VISION[name]() if name in _VISION else _stored(name)
    config = getattr(config, "vision_config", config)
    if config.model_type == "efficientnet_lite":
        return config, -1, "full"
    strategy = "full" if config.model_type.startswith("siglip") else "default"  # no class token in front
    return config, -4 if name == "dinov2-s" else -2, strategy


def _fused() -> FusedVisionConfig:
    towers = []
    for name, layer in (("efficientnet-lite0", -1), ("dinov2-s", 9)):
        config: Any = _VISION[name]()
        if layer > 0:
            config.num_hidden_layers = layer + 1
        plain = {key: value for key, value in config.to_dict().items() if key not in ("out_features", "out_indices", "stage_names")}
        towers.append({"config": plain, "layer": layer, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)})
    return FusedVisionConfig(towers=towers, grid=8, shuffle=2, image_size=224)


def _stored(name: str) -> PreTrainedConfig:
    """The config.json of a folder, or of a hub id that was downloaded before."""
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        known = sorted({*_LANGUAGE, *_VISION, "fused", "smollm2-135m"})
        raise BlueprintError(
            f"{name}: not a folder with a config.json, not downloaded, and not an architecture known without either ({', '.join(known)})"
        ) from error
