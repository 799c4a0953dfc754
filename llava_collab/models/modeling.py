"""HyperLLaVA in the Hugging Face form: stock LLaVA plus the visual and the language expert (arXiv 2403.13447).

Shapes: B samples, T tokens, N images, P tokens an image, V tower width, D model width, S supervised tokens.

With both experts off every tensor equals `LlavaForConditionalGeneration`'s. With the language expert on, a prompt's guidance writes
weights at prefill; they are returned with the output and travel through `generate` in the model kwargs, next to the cache.
What would silently be wrong then (a cache without its weights, chunked prefill, assisted decoding) raises a ValueError.
In training a row may hold several samples (`segment_ids`), which then see nothing of each other.
"""

from __future__ import annotations

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

from .configuration import HyperLlavaConfig
from .experts import ExpertContext, HyperLlavaProjector, check_expert_weights, install_experts, keep_beside, prompt_mask
from .hypernetwork import ExpertWeights, HyperNetwork
from .packing import Segments, read_segments, segment_starts, unpackable


@dataclass
class HyperLlavaModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output plus `expert_weights`, the language expert's weights of this call (None when it is off)."""

    expert_weights: tuple[Tensor, Tensor] | None = None


@dataclass
class HyperLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output plus `expert_weights`, the language expert's weights of this call (None when it is off)."""

    expert_weights: tuple[Tensor, Tensor] | None = None


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
        context = self._expert_context(
            input_ids, inputs_embeds, attention_mask, past_key_values, guidance_mask, expert_weights, segments, labels
        )
        if context is not None:
            kwargs["expert_context"] = context
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
        outputs: Any = super().forward(**stock, **kwargs)
        return HyperLlavaModelOutputWithPast(**outputs, expert_weights=context.generated.weights if context and context.generated else None)

    def _expert_context(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        guidance_mask: Tensor | None,
        expert_weights: tuple[Tensor, Tensor] | None,
        segments: Segments | None,
        labels: Tensor | None,
    ) -> ExpertContext | None:
        if self.language_expert is None:
            return None
        tokens = _tokens(input_ids, inputs_embeds)
        shape = tokens.shape[:2]
        if segments is not None:  # what is asked of a row below is asked of a segment
            shape = torch.Size((segments.count, segments.longest))
            attention_mask = segments.spread(segments.ids_BT > 0)
            guidance_mask = segments.spread(guidance_mask) if guidance_mask is not None else None
            labels = segments.spread(labels, -100) if labels is not None else None
        if expert_weights is not None:
            weights = check_expert_weights(ExpertWeights(*expert_weights), shape[0])
            return ExpertContext(self.language_expert, None, weights, segments)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "a filled key-value cache was passed without the `expert_weights` of the call that filled it: its states were made with "
                "weights that this call can't know. Pass the `expert_weights` of that call's output, or prefill the whole prompt again"
            )
        mask_BT = prompt_mask(guidance_mask, attention_mask, labels, shape, tokens.device)
        return ExpertContext(self.language_expert, mask_BT, None, segments)

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
        if self.config.visual is not None and self.config.visual.guidance == "cls":
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
        return HyperLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            expert_weights=outputs.expert_weights,
        )

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`. ValueError for packed rows and, the language expert on, for decoding whose weights would be wrong."""
        if kwargs.get("segment_ids") is not None:
            raise ValueError("generate takes one sample a row: packed rows (segment_ids) are for training, a row goes on only at its end")
        if self.config.language_expert is not None:
            self._refuse_unsound_decoding(generation_config or self.generation_config, kwargs)
            mask = kwargs.get("attention_mask")
            if kwargs.get("guidance_mask") is None and mask is not None and mask.dim() == 2:
                kwargs["guidance_mask"] = mask.bool()  # now, because a static cache turns the attention mask into a 4-D one
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
                    f"`{name}`: assisted decoding is not possible with the language expert on, whose weights are fixed at prefill of "
                    "this model's own prompt. Drop it, or load the model with language_expert=null"
                )
        if asked("prefill_chunk_size") is not None:
            raise ValueError(
                "`prefill_chunk_size`: the language expert pools guidance over the whole prompt, so the prompt can't be prefilled in chunks"
            )

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.expert_weights is not None:
            if model_kwargs.get("expert_weights") is None:
                model_kwargs["expert_weights"] = keep_beside(outputs.past_key_values, tuple(outputs.expert_weights))
            model_kwargs.pop("guidance_mask", None)  # frozen with the weights; the prompt's shape is not the next call's
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
