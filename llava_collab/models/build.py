"""Make a model from named bases, load one from a folder, extract the features of its tower.

`build` puts a vision tower and a language model together behind a fresh projector (or starts from a checkpoint and adds experts);
`load` reads a checkpoint and accepts nothing missing, unexpected or mismatched. Only `config.json` decides what a folder is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    PreTrainedConfig,
)

from ..adapters.layer import LowRankExperts
from ..assets import cache_root
from ..data.conversation import IMAGE_MARK, TEMPLATES
from ..data.features import FeatureCache
from .bases import is_base, prepare
from .chat_templates import taking_strings
from .configuration import HyperLlavaConfig
from .library_towers import PREFIXES, pretrained_tower
from .modeling import HyperLlavaForConditionalGeneration
from .processor import HyperLlavaProcessor
from .tiny import tiny_decoder, tiny_tokenizer
from .towers import IMAGENET_MEAN, IMAGENET_STD, FusedVisionConfig, FusedVisionModel


@dataclass(frozen=True)
class ModelSpec:
    """What to build. Names of bases from packages, local folders and hub ids all go into the same two fields."""

    language_model: str = "tiny"
    """`tiny`, `smollm2-135m` (or a cut of it such as `smollm2-135m-l8-v8k`), a folder, or a hub id such as lmsys/vicuna-7b-v1.5"""
    vision_tower: str = "tiny"
    """`tiny`, `efficientnet-lite0`, `dinov2-s`, `fused` (both), a folder, a hub id such as openai/clip-vit-large-patch14-336,
    `timm/<name>`, or `open_clip/<architecture>:<weights>`"""
    visual_expert: dict | None = None
    """null (off), {} for the paper's, or fields of VisualExpertConfig such as {bottleneck: 16, layers: both}"""
    language_expert: dict | None = None
    """null (off), {} for the paper's, or fields of LanguageExpertConfig such as {bottleneck: 16, layers: all}"""
    adapter: dict | None = None
    """null (none), or low-rank experts, such as {method: teamlora, experts: 4, rank: 8} (fields of AdapterConfig, methods of METHODS)"""
    template: str = "chatml"
    """plain | vicuna_v1 | chatml | own (the tokenizer's chat template)"""
    init_from: str | None = None
    """a checkpoint of an earlier stage: weights come from it (bases above are then not read); experts it lacks start at zero output"""


def build(
    spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[HyperLlavaForConditionalGeneration, HyperLlavaProcessor]:
    """The model of `spec` on the CPU, new parts initialised from `seed`, and its processor.

    Raises ValueError for an unknown template or base, or a checkpoint that does not fit.
    """
    if spec.template != "own" and spec.template not in TEMPLATES:
        raise ValueError(f"unknown template {spec.template!r}; known: {sorted(TEMPLATES)}, or own")
    torch.manual_seed(seed)
    if spec.init_from is not None:
        parts = {"visual_expert": spec.visual_expert, "language_expert": spec.language_expert, "adapter": spec.adapter}
        model, processor = load(spec.init_from, dtype=dtype, **parts)
        processor.chat_template = processor.chat_template if spec.template == "own" else TEMPLATES[spec.template]
        return model, processor
    decoder, tokenizer = _language_model(spec.language_model, dtype)
    tower, layer, strategy, extra_tokens, mean, std = _vision_tower(spec.vision_tower, dtype)
    template = tokenizer.chat_template if spec.template == "own" else TEMPLATES[spec.template]
    size = tower.config.image_size
    config = HyperLlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=decoder.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        visual_expert=spec.visual_expert,
        language_expert=spec.language_expert,
        adapter=spec.adapter,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    model: Any = HyperLlavaForConditionalGeneration(config)
    model.to(dtype)
    _initialise_new_parts(model, seed)
    _fp32_experts(model)
    _copy(tower, model.model.vision_tower)
    _copy(decoder.model, model.model.language_model)
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.tie_weights()
    _set_generation(model, tokenizer)
    images = CLIPImageProcessorPil(
        size={"height": size, "width": size},
        crop_size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=mean,
        image_std=std,
    )
    processor = HyperLlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra_tokens,
        chat_template=template,
    )
    return model.eval(), processor


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: a GPU if there is one; else what is named: cpu, cuda, cuda:N."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    visual_expert: dict | None = None,
    language_expert: dict | None = None,
    adapter: dict | None = None,
) -> tuple[HyperLlavaForConditionalGeneration, HyperLlavaProcessor]:
    """A checkpoint (ours, a delta, or stock LLaVA's; folder or hub id) and its processor; experts and adapter given here are added where
    it has none.

    Raises ValueError naming every missing, unexpected or mismatched key, and for a folder that is no LLaVA at all. Only keys of what
    is added here may be missing.
    """
    config = _read_config(folder)
    added = []
    for name, value in (("visual_expert", visual_expert), ("language_expert", language_expert), ("adapter", adapter)):
        if value is not None:
            if getattr(config, name, None) is None:
                added.append(f".{name}")  # a parameter's name has it between dots
            setattr(config, name, value)
    config = HyperLlavaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "dtype")})
    tensors, place = None, folder
    if (Path(folder) / "delta.safetensors").is_file():
        from .delta import read_delta  # which loads bases, through here

        (tensors, stored), place = read_delta(Path(folder)), None
        dtype = dtype or stored
    model, report = HyperLlavaForConditionalGeneration.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        place, config=config, state_dict=tensors, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    if tensors is not None:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    missing = [key for key in report["missing_keys"] if not any(name in key for name in added)]
    problems = {
        "missing": sorted(missing),
        "unexpected": sorted(report["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in report["mismatched_keys"]),
    }
    if any(problems.values()):
        lines = [f"  {kind}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{folder} does not fit its config.json:\n" + "\n".join(lines))
    _fp32_experts(model)
    processor = HyperLlavaProcessor.from_pretrained(folder, backend="pil")
    processor.chat_template = taking_strings(str(processor.chat_template or processor.tokenizer.chat_template), processor.tokenizer)
    return model.eval(), processor


def _read_config(folder: str | Path) -> PreTrainedConfig:
    if Path(folder).is_dir() and not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json; a model folder is what training writes to `<run>/model`")
    if "mm_vision_tower" in PreTrainedConfig.get_config_dict(folder)[0]:
        raise ValueError(f"{folder} is in the layout of the original LLaVA; convert it first: llava-collab convert {folder} OUT")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("llava", "hyper_llava"):
        raise ValueError(
            f"{folder} is a {config.model_type!r} checkpoint, not a LLaVA or HyperLLaVA; give it as a base (language_model) instead"
        )
    return config


def _initialise_new_parts(model: HyperLlavaForConditionalGeneration, seed: int) -> None:
    """The projector from `seed` alone, then the experts: twins with and without experts start from the same static model."""
    projector, language_expert = model.model.multi_modal_projector, model.model.language_expert
    for linear in (projector.linear_1, projector.linear_2):
        torch.manual_seed(seed)
        linear.reset_parameters()
    for number, expert in enumerate((projector.visual_expert, language_expert, projector.visual_expert_2), start=1):
        torch.manual_seed(seed + number)
        if expert is not None:
            expert.reset_parameters()
    torch.manual_seed(seed + 4)
    for module in model.modules():
        if isinstance(module, LowRankExperts):
            module.reset_parameters()


def _copy(base: torch.nn.Module, part: torch.nn.Module) -> None:
    """Give a part of the model a base's weights; low-rank experts keep theirs. Raises RuntimeError for any other difference in names."""
    own = {name: tensor for name, tensor in part.state_dict().items() if ".adapter." in name}
    part.load_state_dict(base.state_dict() | own)


def _fp32_experts(model: HyperLlavaForConditionalGeneration) -> None:
    """The generators stay in fp32 whatever the rest is in."""
    for part in (*model.model.multi_modal_projector.experts, model.model.language_expert):
        if part is not None:
            part.float()


def _language_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name == "tiny":
        return AutoModelForCausalLM.from_config(tiny_decoder()).to(dtype), tiny_tokenizer()
    source = _source(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        rows = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for part in {model.get_input_embeddings(), model.get_output_embeddings()}:  # not drawn at random: a base is the same everywhere
            part.weight.data[rows:] = part.weight.data[:rows].mean(0)
    return model, tokenizer


def _vision_tower(name: str, dtype: torch.dtype) -> tuple[Any, int, Any, int, tuple[float, ...], tuple[float, ...]]:
    """The tower, the hidden state taken, the select strategy, tokens beside the patches, pixel mean and std."""
    if name == "tiny":
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=32
        )
        return AutoModel.from_config(config).to(dtype), -2, "default", 1, IMAGENET_MEAN, IMAGENET_STD
    if name == "fused":
        return _fused_tower(dtype), -1, "full", 0, IMAGENET_MEAN, IMAGENET_STD
    if name.startswith(PREFIXES):
        tower, mean, std = pretrained_tower(name, dtype)
        return tower, -1, *_tokens_beside_patches(tower), mean, std
    source = _source(name)
    tower = AutoModel.from_pretrained(source, dtype=dtype)
    tower = getattr(tower, "vision_model", tower)
    mean, std = _pixel_statistics(source)
    if tower.config.model_type == "efficientnet_lite":
        return tower, -1, "full", 0, mean, std
    layer = -4 if name == "dinov2-s" else -2  # this DINOv2 was tuned for saliency: semantics fade in its last three layers
    return tower, layer, *_tokens_beside_patches(tower), mean, std


@torch.no_grad()
def _tokens_beside_patches(tower: Any) -> tuple[Any, int]:
    """Select strategy and tokens beside the patches: CLIP and DINOv2 have a class token in front, SigLIP and grids have none.

    Raises ValueError for towers with more, such as registers: LLaVA knows to leave out one token.
    """
    config, parameter = tower.config, next(tower.parameters())
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=parameter.dtype, device=parameter.device)
    tokens = tower.eval()(pixels, output_hidden_states=True, return_dict=True).hidden_states[-1].shape[1]
    beside = tokens - (config.image_size // config.patch_size) ** 2
    if beside not in (0, 1):
        raise ValueError(f"the vision tower {config.model_type!r} gives {beside} tokens beside its patches; LLaVA leaves out at most 1")
    return ("default", 1) if beside else ("full", 0)


def _fused_tower(dtype: torch.dtype) -> FusedVisionModel:
    """EfficientNet-lite0 (what) and DINOv2-S at hidden state 9 (where); DINOv2's blocks past the tenth are never run."""
    parts, specs = [], []
    for name, layer in (("efficientnet-lite0", -1), ("dinov2-s", 9)):
        source = _source(name)
        tower = AutoModel.from_pretrained(source, dtype=dtype)
        if layer > 0:
            tower.encoder.layer = tower.encoder.layer[: layer + 1]
            tower.config.num_hidden_layers = layer + 1
        mean, std = _pixel_statistics(source)
        parts.append(tower)
        specs.append({"config": _plain(tower.config), "layer": layer, "mean": list(mean), "std": list(std)})
    fused: Any = FusedVisionModel(FusedVisionConfig(towers=specs, grid=8, shuffle=2, image_size=224))
    fused.to(dtype)
    for own, part in zip(fused.towers, parts, strict=True):
        own.load_state_dict(part.state_dict())
    return fused


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as JSON, without what depends on the process that read it or on how many blocks it had (the backbone fields)."""
    stored = json.loads(config.to_json_string(use_diff=False))
    left_out = ("dtype", "architectures", "transformers_version", "out_features", "out_indices", "stage_names")
    return {key: value for key, value in stored.items() if not key.startswith("_") and key not in left_out}


def _pixel_statistics(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    processor = CLIPImageProcessorPil.from_pretrained(source)
    return tuple(processor.image_mean), tuple(processor.image_std)


def _source(name: str) -> str:
    """A named base as a folder of the cache; anything else as it is (folder or hub id)."""
    return str(prepare(name)) if is_base(name) and not Path(name).exists() else name


def _set_generation(model: HyperLlavaForConditionalGeneration, tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = pad
    model.generation_config.bos_token_id = tokenizer.bos_token_id


@torch.no_grad()
def extract_features(model: HyperLlavaForConditionalGeneration, pixel_values_N3HW: Tensor, tower: torch.nn.Module | None = None) -> Tensor:
    """[N, P, V] outputs of the tower as the projector gets them (the class token in front where it guides the visual expert).

    `tower`: a copy to compute them with instead of the model's own.
    """
    config = model.config
    seeing: Any = tower or model.model.vision_tower
    parameter = next(seeing.parameters())
    outputs = seeing(pixel_values_N3HW.to(parameter.device, parameter.dtype), output_hidden_states=True, return_dict=True)
    layers = config.vision_feature_layer
    states = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    start = 1 if _strategy(model) == "default" else 0
    return torch.cat([state[:, start:] for state in states], dim=-1)


def _strategy(model: HyperLlavaForConditionalGeneration) -> str:
    visual = model.config.visual
    return "full" if visual is not None and visual.guidance == "cls" else model.config.vision_feature_select_strategy


def feature_cache(
    model: HyperLlavaForConditionalGeneration, processor: HyperLlavaProcessor, images: Iterable[str | Path] = (), batch_size: int = 16
) -> FeatureCache:
    """The cache of what this model's tower sees, these pictures in it.

    The tower computes them in bf16 whatever the model's dtype: training, evaluation in fp32 and a third person's check read the same
    features. (fp32 features change one greedy answer in ten of a model trained on bf16 ones.)
    """
    cache = FeatureCache(cache_root() / "features", tower_key(model, processor))
    tower = copy.deepcopy(model.model.vision_tower).to(torch.bfloat16)
    report = cache.fill(images, lambda opened: extract_features(model, processor.pixel_values(opened), tower), batch_size)
    if report.computed or report.skipped:
        skipped = sum(len(names) for names in report.skipped.values())
        counts = f"{report.computed} computed, {report.cached} were there, {skipped} unreadable"
        print(f"vision features in {cache.folder}: {counts}", file=sys.stderr)
    return cache


def tower_key(model: HyperLlavaForConditionalGeneration, processor: HyperLlavaProcessor) -> str:
    """sha256 over the tower's weights in bf16, its selected layer and the pixel preprocessing: what cached features depend on."""
    digest = hashlib.sha256()
    config, images = model.config, processor.image_processor
    settings = [config.vision_feature_layer, _strategy(model), processor.image_aspect_ratio]
    settings += [_plain(config.vision_config)]  # pyright: ignore[reportArgumentType]
    settings += [{k: v for k, v in images.to_dict().items() if isinstance(v, int | float | str | list | dict)}]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().bfloat16().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
