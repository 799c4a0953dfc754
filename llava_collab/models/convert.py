"""Other people's LLaVAs into ours, and ours back into stock LLaVA.

    convert(source, out)                source: an original LLaVA folder in any of its variants, a llava-hf checkpoint, one of ours
    convert(source, out, to="stock")    out loads in `LlavaForConditionalGeneration`; only where the experts are off

What is written is opened again and compared, tensor by tensor, before the folder gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ..data.conversation import TEMPLATES
from ..files import publish
from .build import load
from .chat_templates import taking_parts
from .modeling import HyperLlavaForConditionalGeneration
from .original import Original, read_original, their_name, variant_of
from .processor import HyperLlavaProcessor
from .weights import local_folder


def convert(
    source: str | Path,
    out: Path,
    *,
    to: Literal["ours", "stock"] = "ours",
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
) -> Path:
    """Write `source` (a folder or hub id) to the new folder `out`, in the dtype it is stored in.

    base: the language model (or full model) under a projector or LoRA of the original LLaVA, if its files do not name it.
    vision_tower: CLIP's folder or hub id, instead of the one that the original's config.json names.
    template: plain, vicuna_v1 or chatml; by default the source's own, and for the original, which stores none, the one of the
        stage: plain for a projector alone, else vicuna_v1.
    Raises ValueError for a source that can't be converted or does not fit its own settings (missing, unexpected and mismatched keys
    are named), and if `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; give a new folder")
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; known: {sorted(TEMPLATES)}")
    folder = local_folder(source)
    if (variant := variant_of(folder)) is not None:
        original = read_original(folder, base, vision_tower)
        model, processor = _assemble(original, folder)
        template = template or ("plain" if variant == "projector" else "vicuna_v1")
    else:
        model, processor = load(folder)
    if template is not None:
        processor.chat_template = TEMPLATES[template]
    if to == "stock":
        model, processor = _stock(model, processor, folder)
    _write(model, processor, out)
    return out


def _assemble(original: Original, folder: Path) -> tuple[HyperLlavaForConditionalGeneration, HyperLlavaProcessor]:
    model = _filled(HyperLlavaForConditionalGeneration, original.config, original.tensors, folder)
    ids = original.config.get_text_config()
    vision: Any = original.config.vision_config
    model.generation_config = GenerationConfig(bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
    strategy = original.config.vision_feature_select_strategy
    processor = HyperLlavaProcessor(
        image_processor=original.image_processor,
        tokenizer=original.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        image_aspect_ratio=original.image_aspect_ratio,
    )
    return model, processor


def _filled(kind: type, config: Any, tensors: Mapping[str, Tensor], where: Path) -> Any:
    """A model whose weights are the given tensors themselves, without a copy. Raises ValueError naming what does not fit."""
    with torch.device("meta"):
        model = kind(config)
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", {})) if config.tie_word_embeddings else set()
    problems = {
        "missing": [their_name(name) for name in expected if name not in tensors and name not in tied],
        "unexpected": [their_name(name) for name in tensors if name not in expected],
        "mismatched": [
            f"{their_name(name)} {list(tensor.shape)} instead of {list(expected[name].shape)}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {kind}: {', '.join(sorted(keys)[:8])}{' ...' if len(keys) > 8 else ''}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{where} does not fit its config.json:\n" + "\n".join(lines))
    model.load_state_dict(tensors, assign=True, strict=not tied)
    model.tie_weights()
    return model


def _stock(
    model: HyperLlavaForConditionalGeneration, processor: HyperLlavaProcessor, folder: Path
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    config = model.config
    generated = "generated for each sample"
    for name, what in (("visual_expert", generated), ("language_expert", generated), ("adapter", "beside its own")):
        if getattr(config, name) is not None:
            raise ValueError(f"{folder}: `{name}` is on, and stock LLaVA has no place for weights that are {what}")
    vision: Any = config.vision_config
    if not type(vision).__module__.startswith("transformers."):
        raise ValueError(f"{folder}: its vision tower is a {vision.model_type!r}, which stock transformers does not know")
    left_out = ("visual_expert", "language_expert", "adapter", "model_type", "architectures", "dtype", "transformers_version")
    stock_config = LlavaConfig(**{key: value for key, value in config.to_dict().items() if key not in left_out})
    stock_config.dtype = model.dtype
    stock = _filled(LlavaForConditionalGeneration, stock_config, model.state_dict(), folder)
    stock.generation_config = model.generation_config
    stock_processor = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=taking_parts(str(processor.chat_template or processor.tokenizer.chat_template)),
    )
    return stock, stock_processor


def _write(model: Any, processor: Any, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        again, report = type(model).from_pretrained(temporary, output_loading_info=True)
        if lost := [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]:
            raise ValueError(f"{out} would not load as it was written: {', '.join(map(str, lost[:8]))}")
        written = again.state_dict()
        if lost := [name for name, tensor in model.state_dict().items() if not same_bits(tensor, written[name])]:
            raise ValueError(f"{out} would not hold what was written: {', '.join(lost[:8])}")
        type(processor).from_pretrained(temporary)
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaNs and signed zeros included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.detach().contiguous().flatten().view(torch.uint8), b.detach().contiguous().flatten().view(torch.uint8))
