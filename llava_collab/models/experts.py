"""Where the two experts stand: beside the projector's first layer (Eq. 6) and beside the FFN of the posterior blocks (Eq. 7).

Shapes: B samples, N images, P image tokens, T text tokens, D width, V vision width.

The decoder is transformers' own. An expert block takes over a stock block's sub-modules under their names, so state dicts do not
change; what a sample's generated weights need to reach it, an `ExpertContext`, travels as a keyword argument of one call.
Nothing about a sample is ever kept on a module, so two interleaved calls cannot see each other's weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration import ExpertConfig, HyperLlavaConfig
from .hypernetwork import ExpertWeights, HyperNetwork, apply_expert, masked_mean


class HyperLlavaProjector(LlavaMultiModalProjector):
    """LLaVA-1.5's two-layer projector with the visual expert on its first layer: `L2(gelu(L1 f + E_V1 f))` (Eq. 6, "use 1st").

    Guidance is the mean over an image's own patch features, so every image writes its own expert, also in samples of many images.
    The sum stands before the GELU, where the expert is a true shift of the first layer's parameters (the paper does not say).
    """

    def __init__(self, config: HyperLlavaConfig) -> None:
        super().__init__(config)
        if config.visual_expert is not None:
            self.visual_expert: HyperNetwork | None = HyperNetwork(
                guidance_width=self.linear_1.in_features,
                in_width=self.linear_1.in_features,
                out_width=self.linear_1.out_features,
                layers=1,
                config=ExpertConfig(**config.visual_expert),
            )
        else:
            self.visual_expert = None

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, P, V] tower features to [N, P, D] embeddings."""
        hidden_NPD = self.linear_1(image_features)
        if self.visual_expert is not None:
            weights = self.visual_expert(image_features.detach().mean(1))
            expert_NPD = apply_expert(image_features, *weights.layer(0))
            self.visual_expert.record_ratio(expert_NPD, hidden_NPD)
            hidden_NPD = hidden_NPD + expert_NPD
        return self.linear_2(self.act(hidden_NPD))


class ExpertContext:
    """One forward call's language-expert weights: given (decoding), or generated when the first expert block is reached.

    The guidance is the state entering that block (the output of the intermediate layer), averaged over the first turn's prompt
    tokens and detached. Answer tokens never enter it: they would leak the label.
    """

    def __init__(self, generator: HyperNetwork, guidance_mask_BT: Tensor | None, weights: ExpertWeights | None) -> None:
        self.generator = generator
        self.guidance_mask_BT = guidance_mask_BT
        self.weights = weights

    def fill(self, hidden_BTD: Tensor) -> ExpertWeights:
        """The weights, made from `hidden_BTD` unless they are there already: one generator call a forward."""
        if self.weights is None:
            assert self.guidance_mask_BT is not None
            self.weights = self.generator(masked_mean(hidden_BTD, self.guidance_mask_BT).detach())
        return self.weights


class ExpertBlock(nn.Module):
    """Mixed in front of a decoder block's class: `h = h + FFN(n) + E_L(n)`, n the block's second RMSNorm output (Eq. 7).

    Eq. 7 taken literally would also add n itself, which would change the pretrained block; the figure shows the usual residual.
    """

    expert_index: int
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def __call__(self, hidden_states: Tensor, *, expert_context: ExpertContext | None = None, **kwargs: Any) -> Tensor:
        # In __call__, not in forward: gradient checkpointing wraps forward (or __call__ of the stock class) and would generate the
        # weights again in the backward pass. The checkpointed part gets them as positional tensors, right for both kinds of checkpoint.
        if expert_context is None:
            raise RuntimeError("an expert block was called without its context; call the HyperLLaVA model, not its language model alone")
        weights = expert_context.fill(hidden_states).layer(self.expert_index)
        return super().__call__(hidden_states, *weights, generator=expert_context.generator, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        down_BKD: Tensor,
        up_BOK: Tensor,
        generator: HyperNetwork,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended_BTD, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_BTD = hidden_states + attended_BTD
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        static_BTD = self.mlp(normed_BTD)
        expert_BTD = apply_expert(normed_BTD, down_BKD, up_BOK)
        generator.record_ratio(expert_BTD, static_BTD)
        return hidden_BTD + static_BTD + expert_BTD


_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@cache
def _expert_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Expert{stock.__name__}", (ExpertBlock, stock), {"__module__": __name__})


def install_experts(language_model: Any, layers: range) -> None:
    """Turn the given decoder blocks into expert blocks, in place (same modules, same names, same parameters).

    Raises ValueError for a block that is not of the Llama kind (Llama, Vicuna, Mistral, Qwen2, Qwen3, SmolLM2).
    """
    for index, layer in enumerate(layers):
        block = language_model.layers[layer]
        children = {name for name, _ in block.named_children()}
        if children != set(_PARTS):
            raise ValueError(
                f"a language expert needs blocks made of exactly {_PARTS}; {type(block).__name__} of {type(language_model).__name__} has "
                f"{sorted(children)}. Use a Llama, Vicuna, Mistral, Qwen2, Qwen3 or SmolLM2 decoder, or set language_expert to null"
            )
        block.__class__ = _expert_class(type(block))
        block.expert_index = index


def check_expert_weights(weights: ExpertWeights, batch: int) -> ExpertWeights:
    """`weights` as an `ExpertWeights`; raises ValueError if they were made for another number of samples."""
    weights = ExpertWeights(*weights)
    if weights.down_BLKD.shape[0] != batch:
        raise ValueError(f"expert_weights are of {weights.down_BLKD.shape[0]} samples, the batch has {batch}: they belong to another call")
    return weights


def prompt_mask(
    guidance_mask_BT: Tensor | None, attention_mask: Tensor | None, labels_BT: Tensor | None, shape_BT: torch.Size, device: torch.device
) -> Tensor:
    """The positions that guidance is pooled over, bool [B, T]: attended, before the first supervised token.

    An explicit `guidance_mask` (from the processor) is authoritative but never reaches padding; without labels the whole attended
    prompt counts. Raises ValueError where the shape differs from the batch's.
    """
    if attention_mask is not None and attention_mask.dim() != 2 and guidance_mask_BT is None:
        raise ValueError("with a 4-D attention mask, pass `guidance_mask` [B, T] too: which tokens are the prompt can't be read off it")
    attended_BT = torch.ones(shape_BT, dtype=torch.bool, device=device)
    if attention_mask is not None and attention_mask.dim() == 2:
        attended_BT = attention_mask.bool()
    if guidance_mask_BT is None:
        mask_BT = attended_BT
        if labels_BT is not None:
            mask_BT = mask_BT & ((labels_BT != -100).cumsum(1) == 0)
    else:
        mask_BT = guidance_mask_BT.bool() & attended_BT if guidance_mask_BT.shape == attended_BT.shape else guidance_mask_BT.bool()
    if mask_BT.shape != shape_BT:
        raise ValueError(f"guidance_mask has shape {tuple(mask_BT.shape)}, the prompt {tuple(shape_BT)}")
    return mask_BT
