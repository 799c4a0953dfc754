"""Where the two experts stand: beside the projector's first layer (Eq. 6) and beside the FFN of the posterior blocks (Eq. 7).

Shapes: B samples, N images, P image tokens, T text tokens, D width, V vision width.

The decoder is transformers' own. An expert block takes over a stock block's sub-modules under their names, so state dicts do not
change; what a sample's generated weights need to reach it, an `ExpertContext`, travels as a keyword argument of one call.
Nothing about a sample is ever kept on a module, so two interleaved calls cannot see each other's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..adapters.install import Mixin
from .configuration import HyperLlavaConfig, LanguageExpertConfig
from .hypernetwork import ExpertWeights, Generated, HyperNetwork, apply_expert, last_marked, masked_mean
from .packing import Segments


class HyperLlavaProjector(LlavaMultiModalProjector):
    """LLaVA-1.5's two-layer projector with a visual expert on its first layer, its second, or both (Eq. 6).

        first   L2(L1 f + E_V1 f)        second   L2(L1 f) + E_V2(L1 f)        both   L2(L1 f + E_V1 f) + E_V2(L1 f)

    Guidance is made of an image's own features (their mean, or the class token), so every image writes its own experts, also in
    samples of many images. L1 f stands for what the static second layer reads, behind the GELU; E_V2 sees it without E_V1's part.
    """

    def __init__(self, config: HyperLlavaConfig) -> None:
        super().__init__(config)
        self.visual_expert: HyperNetwork | None = None
        self.visual_expert_2: HyperNetwork | None = None
        settings = config.visual
        self.class_token = settings is not None and settings.guidance == "cls"
        if settings is None:
            return
        width, inner, out = self.linear_1.in_features, self.linear_1.out_features, self.linear_2.out_features
        if settings.layers in ("first", "both"):
            self.visual_expert = HyperNetwork(width, width, inner, layers=1, config=settings)
        if settings.layers in ("second", "both"):
            self.visual_expert_2 = HyperNetwork(width, inner, out, layers=1, config=settings)
        self.after_gelu = settings.insertion == "after_gelu"
        self.detach = settings.detach

    @property
    def experts(self) -> tuple[HyperNetwork, ...]:
        """Those that are there, first layer's first."""
        return tuple(expert for expert in (self.visual_expert, self.visual_expert_2) if expert is not None)

    def guidance(self, image_features: Tensor) -> Tensor:
        """[N, V], one vector an image."""
        guidance_NV = image_features[:, 0] if self.class_token else image_features.mean(1)
        return guidance_NV.detach() if self.detach else guidance_NV

    def forward(self, image_features: Tensor, weights: tuple[tuple[Tensor, Tensor], ...] | None = None) -> Tensor:
        """[N, P, V] tower features to [N, P, D] embeddings; with `guidance: cls` a class token [N, 1 + P, V] in front, which is read only.

        `weights`: use these instead of each image's own (one for each of `experts`), to see what they are worth.
        """
        if not self.experts:
            return super().forward(image_features)
        guidance_NV = self.guidance(image_features)
        given = iter(weights or (None,) * len(self.experts))
        image_features = image_features[:, 1:] if self.class_token else image_features
        hidden_NPD = self.linear_1(image_features)
        read_NPD = static_NPD = self.act(hidden_NPD) if self.after_gelu or self.visual_expert_2 is not None else None
        if self.visual_expert is not None:
            shift_NPD = _visual(self.visual_expert, guidance_NV, next(given), image_features, hidden_NPD)
            read_NPD = static_NPD + shift_NPD if self.after_gelu and static_NPD is not None else self.act(hidden_NPD + shift_NPD)
        out_NPD = self.linear_2(read_NPD)
        if self.visual_expert_2 is not None and static_NPD is not None:
            out_NPD = out_NPD + _visual(self.visual_expert_2, guidance_NV, next(given), static_NPD, out_NPD)
        return out_NPD


def _visual(expert: HyperNetwork, guidance_NV: Tensor, given: Any, x_NPD: Tensor, beside_NPD: Tensor) -> Tensor:
    (weights,) = expert(guidance_NV, None if given is None else ExpertWeights(*given), _computed_in(x_NPD)).layers()
    out_NPD = apply_expert(x_NPD, weights, expert.config.activation).to(x_NPD.dtype)
    expert.record_ratio(out_NPD, beside_NPD)
    return out_NPD


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class ExpertContext:
    """One forward call's language-expert weights: given (decoding), or generated when the guidance layer is reached.

    The guidance is the state entering that block, pooled over the first turn's prompt tokens. Answer tokens never enter it: they
    would leak the label. In packed rows every segment has guidance and weights of its own: mask and weights are then [S, L], [S, ...].
    """

    def __init__(
        self, generator: HyperNetwork, guidance_mask_BT: Tensor | None, weights: ExpertWeights | None, segments: Segments | None = None
    ) -> None:
        self.generator = generator
        self.settings: LanguageExpertConfig = generator.config  # pyright: ignore[reportAttributeAccessIssue]
        self.guidance_mask_BT = guidance_mask_BT
        self.segments = segments
        self.given = weights
        self.generated: Generated | None = None
        self._layers: tuple[tuple[Tensor, ...], ...] = ()

    def guidance(self, hidden_BTD: Tensor) -> Tensor:
        """[B, D] fp32, one vector a sample ([S, D] of packed rows)."""
        assert self.guidance_mask_BT is not None
        if self.segments is not None:
            hidden_BTD = self.segments.spread(hidden_BTD)
        pool = last_marked if self.settings.guidance == "last_prompt_token" else masked_mean
        guidance_BD = pool(hidden_BTD, self.guidance_mask_BT)
        return guidance_BD.detach() if self.settings.detach else guidance_BD

    def fill(self, hidden_BTD: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Every layer's weights, made from `hidden_BTD` unless they are there already: one generator call a forward."""
        if self.generated is None:
            guidance_BD = self.guidance(hidden_BTD) if self.given is None else None
            generated: Generated = self.generator(guidance_BD, self.given, _computed_in(hidden_BTD))
            self.generated, self._layers = generated, generated.layers()
        return self._layers


class GuidanceBlock(Mixin):
    """Mixed in front of the class of a stock block where guidance is pooled before the first expert block: it only fills the context."""

    def __call__(self, hidden_states: Tensor, *args: Any, expert_context: ExpertContext | None = None, **kwargs: Any) -> Tensor:
        _present(expert_context).fill(hidden_states)
        return super().__call__(hidden_states, *args, expert_context=expert_context, **kwargs)


class ExpertBlock(Mixin):
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
        context = _present(expert_context)
        weights = context.fill(hidden_states)[self.expert_index]
        return super().__call__(hidden_states, *weights, generator=context.generator, segments=context.segments, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        *weights: Tensor,
        generator: HyperNetwork,
        segments: Segments | None = None,
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
        if self._adds_in_place(hidden_BTD) and segments is None:
            return apply_expert(normed_BTD, weights, generator.config.activation, onto_BTO=hidden_BTD + static_BTD)
        own = normed_BTD if segments is None else segments.spread(normed_BTD)
        expert = apply_expert(own, weights, generator.config.activation)
        expert_BTD = expert if segments is None else segments.join(expert)
        generator.record_ratio(expert_BTD, static_BTD)
        return hidden_BTD + static_BTD + expert_BTD

    def _adds_in_place(self, hidden_BTD: Tensor) -> bool:
        """Whether the up-projection adds itself to the rest: one kernel and two passes over memory less. Not in training, where the sum
        needs its parts, nor compiled, where the sum is fused with what follows; fp32 keeps the order of sums that training has.
        """
        half = hidden_BTD.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(hidden_BTD.device.type)
        return half and not self.training and not torch.compiler.is_compiling()


def _present(context: ExpertContext | None) -> ExpertContext:
    if context is None:
        raise RuntimeError("an expert block was called without its context; call the HyperLLaVA model, not its language model alone")
    return context


_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_CURE = "Use a Llama, Vicuna, Mistral, Qwen2, Qwen3 or SmolLM2 decoder, or set language_expert to null"


def _llama_block(language_model: Any, layer: int) -> Any:
    if not hasattr(language_model, "layers"):
        raise ValueError(f"a language expert needs a decoder with `layers`; {type(language_model).__name__} has none. {_CURE}")
    block = language_model.layers[layer]
    children = {name for name, _ in block.named_children()}
    if children != set(_PARTS) or hasattr(block, "residual_multiplier"):  # Granite: the same parts, but scaled
        raise ValueError(
            f"a language expert needs blocks made of exactly {_PARTS}, added up unscaled; {type(block).__name__} of "
            f"{type(language_model).__name__} has {sorted(children)}. {_CURE}"
        )
    return block


def install_experts(language_model: Any, layers: Sequence[int], guidance_layer: int | None) -> None:
    """Turn the given decoder blocks into expert blocks, in place (same modules, same names, same parameters).

    Raises ValueError for a block that is not of the Llama kind (Llama, Vicuna, Mistral, Qwen2, Qwen3, SmolLM2).
    """
    for index, layer in enumerate(layers):
        block = _llama_block(language_model, layer)
        block.__class__ = ExpertBlock.onto(type(block))
        block.expert_index = index
    if guidance_layer is not None and guidance_layer < layers[0]:
        block = language_model.layers[guidance_layer]
        block.__class__ = GuidanceBlock.onto(type(block))


def check_expert_weights(weights: ExpertWeights, batch: int) -> ExpertWeights:
    """`weights` as an `ExpertWeights`; raises ValueError if they were made for another number of samples."""
    weights = ExpertWeights(*weights)
    if weights.down.shape[0] != batch:
        raise ValueError(f"expert_weights are of {weights.down.shape[0]} samples, the batch has {batch}: they belong to another call")
    return weights


def keep_beside(cache: Any, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`weights` at the same address in every `generate` with this cache, if it is a static one: its own tensors are kept so too.

    A CUDA graph reads such tensors where they are; others it would copy at every step, which takes as long as applying the experts.
    """
    if cache is None or not cache.is_compileable:
        return weights
    held = getattr(cache, "expert_weights", ())
    if [(h.shape, h.dtype, h.device) for h in held] == [(w.shape, w.dtype, w.device) for w in weights]:
        for kept, new in zip(held, weights, strict=True):
            kept.copy_(new)
        return held
    cache.expert_weights = tuple(weight.clone(memory_format=torch.contiguous_format) for weight in weights)
    for kept in cache.expert_weights:
        torch._dynamo.mark_static_address(kept)
    return cache.expert_weights


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
