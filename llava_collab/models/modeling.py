"""HyperLLaVA in the Hugging Face form: stock LLaVA plus the visual and the language expert (arXiv 2403.13447).

Shapes: B samples, T tokens, N images, P tokens an image, V tower width, D model width, S supervised tokens.

With both experts off every tensor equals `LlavaForConditionalGeneration`'s. With the language expert on, a prompt's guidance writes
weights at prefill; they are returned with the output and travel through `generate` in the model kwargs, next to the cache.
What would silently be wrong then (a cache without its weights, chunked prefill, assisted decoding) raises a ValueError.
In training a row may hold several samples (`segment_ids`), which then see nothing of each other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..adapters.install import install_adapters
from ..adapters.layer import LowRankExperts
from ..adapters.routing import RoutingContext, checkpoint_context, current
from .configuration import HyperLlavaConfig
from .experts import ExpertContext, HyperLlavaProjector, check_expert_weights, install_experts, keep_beside, prompt_mask
from .hypernetwork import ExpertWeights, HyperNetwork
from .packing import Segments, read_segments, segment_starts, unpackable


@dataclass
class HyperLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output plus `expert_weights`, the language expert's weights of this call (None when it is off), and `balance_loss`, the
    adapter's (None where it has none)."""

    expert_weights: tuple[Tensor, Tensor] | None = None
    balance_loss: Tensor | None = None


@dataclass
class HyperLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output plus `expert_weights`, the language expert's weights of this call (None when it is off), and `balance_loss`, the
    adapter's (None where it has none)."""

    expert_weights: tuple[Tensor, Tensor] | None = None
    balance_loss: Tensor | None = None


class _HyperLlava:
    """What both classes add to transformers' machinery."""

    config: HyperLlavaConfig  # here, not in the classes: transformers would take the annotation, a string, for the class itself
    config_class = HyperLlavaConfig
    _keep_in_fp32_modules_strict = ["visual_expert", "visual_expert_2", "language_expert"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HyperNetwork):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]

    def initialize_weights(self) -> None:
        """transformers', and then the low-rank experts: it asks the decoder to initialise what is in the decoder, which knows none."""
        super().initialize_weights()  # pyright: ignore[reportAttributeAccessIssue]
        for module in self.modules():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(module, LowRankExperts):
                module.reset_parameters()  # of what was read from a file nothing is changed

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """transformers'; where the adapter asks for a `RoutingContext`, the backward pass finds it again."""
        if self.config.low_rank is not None and self.config.low_rank.needs_context:
            gradient_checkpointing_kwargs = (gradient_checkpointing_kwargs or {}) | {
                "use_reentrant": False,
                "context_fn": checkpoint_context,
            }
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class HyperLlavaModel(_HyperLlava, LlavaModel):
    """Vision tower, projector with the visual expert, decoder with the language expert; no head."""

    def __init__(self, config: HyperLlavaConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LlavaModel's own __init__ would build the decoder and the projector twice
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = HyperLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.language_expert: HyperNetwork | None = None
        settings = config.language
        if settings is not None:
            width, blocks = config.get_text_config().hidden_size, settings.blocks(config.get_text_config().num_hidden_layers)
            self.language_expert = HyperNetwork(width, width, width, len(blocks), settings)
            install_experts(self.language_model, blocks, settings.guidance_layer)
        self.low_rank = config.low_rank
        if self.low_rank is not None:
            install_adapters(self, self.low_rank)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_features: Tensor | None = None,
        visual_expert_weights: tuple[tuple[Tensor, Tensor], ...] | None = None,
        guidance_mask: Tensor | None = None,
        expert_weights: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> HyperLlavaModelOutputWithPast:
        """Stock LLaVA's arguments, and:

        image_features: [N, P, V] outputs of the vision tower (`extract_features`), instead of `pixel_values`.
        visual_expert_weights: with `image_features`, weights for the visual experts instead of each image's own.
        guidance_mask: bool [B, T], the first turn's prompt tokens; by default all attended tokens before the first label.
        expert_weights: the prefill's, required with a non-empty cache. labels: only used to find the prompt.
        segment_ids: int64 [B, T], for rows of several samples: 1, 2, ... within the row, 0 for padding behind. `attention_mask` and
            `position_ids` follow from it, there is no cache, and `expert_weights` has a row a segment, the first row's segments first.
        """
        if mm_encoder_outputs is not None:  # not an argument of every supported transformers version
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        segments = None
        if segment_ids is not None:
            if past_key_values is not None or kwargs.get("use_cache"):
                raise ValueError("packed rows (segment_ids) keep no cache: leave out past_key_values and use_cache")
            shape_BT = _tokens(input_ids, inputs_embeds).shape[:2]
            segments = self._packed(read_segments(segment_ids, shape_BT, attention_mask, position_ids), kwargs)
            attention_mask, position_ids = None, segments.position_BT
        call = _Call(_tokens(input_ids, inputs_embeds), attention_mask, guidance_mask, labels, segments, past_key_values)
        context = self._expert_context(call, expert_weights)
        if context is not None:
            kwargs["expert_context"] = context
        routing = self._routing_context(call)
        if image_features is not None:
            if pixel_values is not None:
                raise ValueError("pass `pixel_values` or `image_features`, not both")
            inputs_embeds = self._embed_with_features(input_ids, inputs_embeds, image_features, visual_expert_weights)
            input_ids = None
        elif self.training and pixel_values is None and not mm_encoder_outputs:
            inputs_embeds, input_ids = self._touch_projector(input_ids, inputs_embeds), None
        stock: dict[str, Any] = dict(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            return_dict=True,
        )
        with routing as opened:
            outputs: Any = super().forward(**stock, **kwargs)
        return HyperLlavaModelOutputWithPast(
            **outputs,
            expert_weights=context.generated.weights if context and context.generated else None,
            balance_loss=opened.balance_loss() if opened is not None else None,
        )

    def _expert_context(self, call: _Call, expert_weights: tuple[Tensor, Tensor] | None) -> ExpertContext | None:
        if self.language_expert is None:
            return None
        if expert_weights is not None:
            weights = check_expert_weights(ExpertWeights(*expert_weights), call.samples)
            return ExpertContext(self.language_expert, None, weights, call.segments)
        if call.cached:
            raise ValueError(
                "a filled key-value cache was passed without the `expert_weights` of the call that filled it: its states were made with "
                "weights that this call can't know. Pass the `expert_weights` of that call's output, or prefill the whole prompt again"
            )
        return ExpertContext(self.language_expert, call.prompt(), None, call.segments)

    def _routing_context(self, call: _Call) -> AbstractContextManager[RoutingContext | None]:
        """What the adapter must know of a call, unless it needs nothing or a caller (a generation, a chat) holds one open."""
        adapter = self.low_rank
        if adapter is None or not adapter.needs_context:
            return nullcontext()
        held, by_sample = current(), adapter.routing == "sample"
        if (held is not None and not held.pending) or not (by_sample or torch.is_grad_enabled()):
            return nullcontext(held)
        if call.cached and by_sample:
            raise ValueError(
                "a filled key-value cache was passed outside the RoutingContext of the call that filled it, and the adapter's experts are "
                "routed by sample: keep both calls inside one `with RoutingContext(...)`, as `generate` does, or prefill the prompt again"
            )
        prompt = call.prompt() if by_sample else None
        if call.segments is not None:
            prompt = call.segments.join(prompt) if prompt is not None else None
            opened = RoutingContext(call.segments.ids_BT > 0, prompt, call.segments.samples())
        else:
            mask = call.attention_mask
            opened = RoutingContext(mask if mask is not None and mask.dim() == 2 else None, prompt)
        return opened if held is None else nullcontext(held.take(opened))

    def _packed(self, segments: Segments, kwargs: dict[str, Any]) -> Segments:
        """`segments`, with what the decoder needs beside positions added to its keyword arguments."""
        config: Any = self.language_model.config
        if (trouble := unpackable(config)) is not None:
            raise ValueError(f"packed rows (segment_ids) are not possible here: {trouble}")
        kwargs["use_cache"] = False  # with a cache transformers no longer looks for samples in a row
        if config._attn_implementation.startswith("flash_attention"):
            kwargs |= segments.boundaries()
        return segments

    def get_image_features(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock LLaVA's; the class token stays in front where it is the visual expert's guidance (the projector takes it off)."""
        if self.multi_modal_projector.class_token:
            kwargs["vision_feature_select_strategy"] = "full"
        return super().get_image_features(pixel_values, *args, **kwargs)

    def _embed_with_features(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Tensor,
        weights: tuple[tuple[Tensor, Tensor], ...] | None,
    ) -> Tensor:
        embeds_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        parameter = self.multi_modal_projector.linear_1.weight
        image_NPD = self.multi_modal_projector(image_features.to(parameter.device, parameter.dtype), weights).to(embeds_BTD.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds=embeds_BTD, image_features=image_NPD)  # pyright: ignore
        return embeds_BTD.masked_scatter(mask, image_NPD)

    def _touch_projector(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Run the projector on a zero image and add 0 times the result: a text-only rank must run the modules the others run."""
        embeds_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        linear = self.multi_modal_projector.linear_1
        dummy_NPV = torch.zeros(1, 2, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
        return embeds_BTD + 0.0 * self.multi_modal_projector(dummy_NPV).sum().to(embeds_BTD.dtype)


class HyperLlavaForConditionalGeneration(_HyperLlava, LlavaForConditionalGeneration):
    """HyperLLaVA with its language-modelling head."""

    def __init__(self, config: HyperLlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # not LlavaForConditionalGeneration's: it builds a stock LlavaModel
        self.model = HyperLlavaModel(config)
        self.lm_head = nn.Linear(config.get_text_config().hidden_size, config.get_text_config().vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_features: Tensor | None = None,
        visual_expert_weights: tuple[tuple[Tensor, Tensor], ...] | None = None,
        guidance_mask: Tensor | None = None,
        expert_weights: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        supervised_logits_only: bool = False,
        **kwargs: Any,
    ) -> HyperLlavaCausalLMOutputWithPast:
        """`HyperLlavaModel.forward`'s arguments, and:

        num_items_in_batch: the global count of supervised tokens (over micro-batches and ranks) that the summed loss is divided by.
        supervised_logits_only: compute logits only where the next token is supervised; `logits` is then [S, vocabulary].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            image_features=image_features,
            visual_expert_weights=visual_expert_weights,
            guidance_mask=guidance_mask,
            expert_weights=expert_weights,
            segment_ids=segment_ids,
            labels=labels,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        loss = None
        if labels is not None and segment_ids is not None:  # or a sample's last token would learn to predict the next sample's first
            labels = labels.masked_fill(segment_starts(segment_ids), -100)
        if labels is not None and supervised_logits_only:
            next_BT = F.pad(labels, (0, 1), value=-100)[:, 1:]
            keep_BT = next_BT != -100
            logits = self.lm_head(hidden_BTD[keep_BT])
            total = F.cross_entropy(logits.float(), next_BT[keep_BT], reduction="sum")
            loss = total / (keep_BT.sum() if num_items_in_batch is None else num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BTD[:, kept])
            if labels is not None:
                size = self.config.get_text_config().vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, num_items_in_batch=num_items_in_batch)
        if loss is not None and labels is not None and outputs.balance_loss is not None:
            # weighed by tokens, so that a step's micro-batches add up to one mean
            own = (labels[:, 1:] != -100).sum()
            loss = loss + outputs.balance_loss * (1 if num_items_in_batch is None else own / num_items_in_batch)
        return HyperLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            expert_weights=outputs.expert_weights,
            balance_loss=outputs.balance_loss,
        )

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`. ValueError for packed rows and for decoding whose weights, written for the prompt, would be wrong."""
        if kwargs.get("segment_ids") is not None:
            raise ValueError("generate takes one sample a row: packed rows (segment_ids) are for training, a row goes on only at its end")
        by_sample = self.model.low_rank is not None and self.model.low_rank.routing == "sample"
        if self.config.language_expert is not None or by_sample:
            self._refuse_unsound_decoding(generation_config or self.generation_config, kwargs)
            mask = kwargs.get("attention_mask")
            if kwargs.get("guidance_mask") is None and mask is not None and mask.dim() == 2:
                kwargs["guidance_mask"] = mask.bool()  # now, because a static cache turns the attention mask into a 4-D one
        with RoutingContext(pending=True) if by_sample and current() is None else nullcontext():
            return super().generate(inputs, generation_config, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def merge(self) -> NoReturn:
        """Always raises NotImplementedError: generated experts can't be folded into the static weights, as LoRA's can."""
        raise NotImplementedError(
            "there is no merge: the experts' weights are written anew for each sample, and an activation stands between their two "
            "matrices, so no static weights equal them. To look at what one sample gets: `llava-collab export`"
        )

    @staticmethod
    def _refuse_unsound_decoding(config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        def asked(name: str) -> Any:
            return kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, None)

        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if asked(name) is not None:
                raise ValueError(
                    f"`{name}`: assisted decoding is not possible with the language expert, or an adapter routed by sample: their weights "
                    "are fixed at prefill of this model's own prompt. Drop it, or load the model with language_expert=null"
                )
        if asked("prefill_chunk_size") is not None:
            raise ValueError("`prefill_chunk_size`: weights are written from the whole prompt, so it can't be prefilled in chunks")

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        model_kwargs.pop("guidance_mask", None)  # what it was for is done; the prompt's shape is not the next call's
        if outputs.expert_weights is not None:
            if model_kwargs.get("expert_weights") is None:
                model_kwargs["expert_weights"] = keep_beside(outputs.past_key_values, tuple(outputs.expert_weights))
        if model_kwargs.get("use_cache", True):
            for name in ("image_features", "visual_expert_weights"):
                model_kwargs.pop(name, None)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any) -> tuple[Any, dict]:
        """Images are on an axis of their own: repeat each sample's images as a group, not each image."""
        images = {name: kwargs.pop(name) for name in ("pixel_values", "image_features") if kwargs.get(name) is not None}
        if images and expand_size > 1:
            if input_ids is None:
                raise ValueError("beams or several sequences with images need `input_ids`, to tell which images are whose")
            count = next(iter(images.values())).shape[0]
            marks_B = (input_ids == self.config.image_token_id).sum(1)
            images_B = marks_B // max(1, int(marks_B.sum()) // count)
            groups = torch.arange(count, device=marks_B.device).split(images_B.tolist())
            index = torch.cat([group for group in groups for _ in range(expand_size)])
            images = {name: value[index.to(value.device)] for name, value in images.items()}
        expand = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        input_ids, kwargs = expand(expand_size=expand_size, input_ids=input_ids, **kwargs)
        return input_ids, kwargs | images


@dataclass(frozen=True)
class _Call:
    """What one call says of its positions."""

    tokens: Tensor
    attention_mask: Tensor | None
    guidance_mask: Tensor | None
    labels: Tensor | None
    segments: Segments | None
    cache: Cache | None

    @property
    def cached(self) -> bool:
        return self.cache is not None and self.cache.get_seq_length() > 0

    @property
    def samples(self) -> int:
        return self.tokens.shape[0] if self.segments is None else self.segments.count

    def prompt(self) -> Tensor:
        """bool [B, T], or [S, L] of packed rows: the positions of the first turn's prompt (see `prompt_mask`)."""
        shape, mask, guidance, labels = self.tokens.shape[:2], self.attention_mask, self.guidance_mask, self.labels
        if self.segments is not None:  # what is asked of a row is asked of a segment
            shape = torch.Size((self.segments.count, self.segments.longest))
            mask = self.segments.spread(self.segments.ids_BT > 0)
            guidance = self.segments.spread(guidance) if guidance is not None else None
            labels = self.segments.spread(labels, -100) if labels is not None else None
        return prompt_mask(guidance, mask, labels, shape, self.tokens.device)


def _tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise ValueError("pass `input_ids` or `inputs_embeds`")
    return tokens


def _register() -> None:
    AutoConfig.register("hyper_llava", HyperLlavaConfig, exist_ok=True)
    AutoModel.register(HyperLlavaConfig, HyperLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(HyperLlavaConfig, HyperLlavaForConditionalGeneration, exist_ok=True)
    # On disk LLaVA uses other names than in memory. By class name for our classes (by model_type alone, a file whose config says
    # "llava" would load with a randomly initialised head), by model_type for the stock class when it reads our files.
    names = (("HyperLlavaModel", "LlavaModel"), ("HyperLlavaForConditionalGeneration", "llava"), ("hyper_llava", "llava"))
    for name, stock in names:
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


_register()
