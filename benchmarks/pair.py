"""HyperLLaVA and stock LLaVA of the same sizes on the very same weights, and what each has at least to compute and to read.

Shapes: D width, F width of the FFN, L blocks, X expert blocks, V width of the tower, P patches, T tokens of a sample, C code width,
K bottleneck. The two models share every parameter but the experts' own, so a GPU holds them once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from timing import Work
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_collab.models import HyperLlavaConfig, HyperLlavaForConditionalGeneration
from llava_collab.models.hypernetwork import HyperNetwork

IMAGE_TOKEN = 3
SMALL_RANDOM = 0.02  # about what trained generators have; zeros, their start, could be told from it by no timing, but by a reader


@dataclass(frozen=True)
class Sizes:
    """One architecture and the sample that is put through it: an image, then words."""

    width: int
    ffn: int
    heads: int
    blocks: int
    vocabulary: int
    vision_width: int
    vision_ffn: int
    vision_heads: int
    vision_blocks: int
    image: int
    """Pixels of a side."""
    patch: int
    words: int
    """Text tokens of a sample."""

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """T"""
        return self.patches + self.words


SEVEN_B = Sizes(4096, 11008, 32, 32, 32000, 1024, 4096, 16, 24, 336, 14, 128)
"""LLaVA-1.5 7B: Vicuna and CLIP-L/336."""
SMALL = Sizes(256, 688, 8, 8, 2048, 64, 128, 4, 2, 64, 8, 64)


@dataclass(frozen=True)
class Pair:
    """The two models."""

    ours: Any
    stock: Any
    sizes: Sizes

    @property
    def experts(self) -> list[HyperNetwork]:
        """What ours has more."""
        return [module for module in self.ours.modules() if isinstance(module, HyperNetwork)]


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype, blocks: int | None = None) -> Pair:
    """Random models with experts in the later half of the blocks; stock LLaVA is given our parameters themselves.

    Generators are fp32, and no longer at their start, where their output is zero. Raises RuntimeError if the two are not the same model
    with the experts at zero.
    """
    sizes = replace(sizes, blocks=blocks or sizes.blocks)
    parts = _parts(sizes)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            ours: Any = HyperLlavaForConditionalGeneration(HyperLlavaConfig(**parts, visual_expert={}, language_expert={}))
        with torch.device("meta"):
            stock: Any = LlavaForConditionalGeneration(LlavaConfig(**parts))
    finally:
        torch.set_default_dtype(before)
    for name, module in stock.named_modules():
        own = ours.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = own._parameters[key]
        for key in module._buffers:
            module._buffers[key] = own._buffers[key]
    pair = Pair(ours.eval(), stock.eval(), sizes)
    for expert in pair.experts:
        expert.float()
    with torch.no_grad():
        inputs = sample(sizes, 1, device, dtype)
        if not torch.equal(ours(**inputs, logits_to_keep=1).logits, stock(**inputs, logits_to_keep=1).logits):
            raise RuntimeError("the two models differ before the experts do anything: this would compare two different things")
        for expert in pair.experts:
            for key, parameter in expert.named_parameters():
                if not key.startswith("encoder"):
                    parameter.add_(torch.randn_like(parameter), alpha=SMALL_RANDOM)
    return pair


def _parts(sizes: Sizes) -> dict[str, Any]:
    text = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_ffn,
        num_hidden_layers=sizes.vision_blocks,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        projection_dim=sizes.vision_width,
    )
    return {"vision_config": vision, "text_config": text, "image_token_index": IMAGE_TOKEN, "image_seq_length": sizes.patches}


def sample(sizes: Sizes, batch: int, device: torch.device, dtype: torch.dtype, labels: bool = False) -> dict[str, Tensor]:
    """A batch of an image and words each; with `labels`, the later half of the words is the answer."""
    generator = torch.Generator().manual_seed(0)
    words_BW = torch.randint(5, sizes.vocabulary, (batch, sizes.words), generator=generator)
    ids_BT = torch.cat([torch.full((batch, sizes.patches), IMAGE_TOKEN), words_BW], dim=1)
    pixels = torch.randn(batch, 3, sizes.image, sizes.image, generator=generator)
    inputs = {"input_ids": ids_BT.to(device), "pixel_values": pixels.to(device, dtype)}
    if labels:
        asked = sizes.tokens - sizes.words // 2
        inputs["labels"] = ids_BT.masked_fill(torch.arange(sizes.tokens) < asked, -100).to(device)
    return inputs


@dataclass(frozen=True)
class Floor:
    """Ours over stock: by the formula, and as torch's counter sees it."""

    formula: float
    counted: float


def counted(work: Work) -> int:
    """FLOPs by torch's counter, which knows no flash kernel of a CPU: attention is multiplied out for it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def formula(pair: Pair, new: int, past: int, logits: int, images: int = 1, learn: bool = False) -> float:
    """FLOPs of ours over stock's for one sample: `new` tokens behind `past` ones, `logits` positions through the head.

    A multiplication and an addition are two. `learn`: with the backward pass, twice the forward one but for the tower, which has none,
    and the encoders, which hand none on (guidance is detached).
    """
    s, passes = pair.sizes, 3 if learn else 1
    attention = 4 * (past + new) * s.width
    block = 2 * (4 * s.width**2 + 3 * s.width * s.ffn) + attention
    stock = passes * (new * s.blocks * block + 2 * logits * s.width * s.vocabulary)
    seen = s.patches + 1
    tower = 2 * (4 * s.vision_width**2 + 2 * s.vision_width * s.vision_ffn) + 4 * seen * s.vision_width
    projector = 2 * s.patches * (s.vision_width * s.width + s.width**2)
    stock += images * (s.vision_blocks * seen * tower + 2 * s.patches * 3 * s.patch**2 * s.vision_width + passes * projector)
    extra = 0
    for expert in pair.experts:
        c, language = expert.config, expert is pair.ours.model.language_expert
        width = expert.rows * expert.in_width + c.bottleneck * expert.out_width
        encode, decode = (2 * expert.layers * c.code_width * size for size in (expert.guidance_width, width))
        written = (1 if past == 0 else 0) if language else images
        applied = new if language else images * s.patches
        extra += written * (encode * (2 if learn else 1) + passes * decode) + passes * applied * expert.layers * 2 * width
    return 1 + extra / stock


def decode_bytes(pair: Pair, batch: int, length: int) -> float:
    """Bytes that a decoding step reads, ours over stock's: the blocks' and the head's weights, all keys and values, generated weights."""
    s = pair.sizes
    head = pair.ours.lm_head.weight
    weights = sum(p.numel() for p in pair.ours.model.language_model.layers.parameters()) + head.numel()
    states = 2 * batch * length * s.blocks * s.width
    expert = pair.ours.model.language_expert
    written = batch * expert.layers * (expert.rows * expert.in_width + expert.config.bottleneck * expert.out_width)
    return 1 + written / (weights + states)


def train_all_but_the_tower(model: nn.Module) -> None:
    """What learns in stage 2 with a full language model."""
    model.requires_grad_(True)
    model.get_submodule("model.vision_tower").requires_grad_(False)
