"""Text and images in, model inputs out: one encoding function for training and for generation.

Shapes: B samples, T tokens, N images, P tokens an image, V tower width.

`encode` builds ids, labels and guidance mask in one pass (see `data.conversation`); `encode_requests` is what generation uses, so a
prompt's ids and mask are exactly those of training. Images follow LLaVA's `image_aspect_ratio: pad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, LlavaProcessor

from ..data.collate import Collator
from ..data.conversation import IMAGE_MARK, EncodedText, SampleError, encode_turns
from ..data.features import FeatureCache
from ..data.images import expand_to_square
from ..data.samples import load_image
from ..types import Request, Turn
from .configuration import HyperLlavaConfig


class HyperLlavaProcessor(LlavaProcessor):
    """LLaVA's processor with guidance masks. `image_aspect_ratio`: "pad" (to a square of the mean colour) or "none"."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_MARK,
        num_additional_image_tokens: int = 0,
        image_aspect_ratio: str = "pad",
        **kwargs: Any,
    ) -> None:
        if image_aspect_ratio not in ("pad", "none"):
            raise ValueError(f"image_aspect_ratio must be 'pad' or 'none', got {image_aspect_ratio!r}")
        self.image_aspect_ratio = image_aspect_ratio
        self.feature_cache: FeatureCache | None = None
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As stored; a feature cache belongs to a process, not to a checkpoint."""
        cache, self.feature_cache = self.feature_cache, None
        try:
            stored = super().to_dict(*args, **kwargs)
        finally:
            self.feature_cache = cache
        stored.pop("feature_cache", None)
        return stored

    @property
    def tokens_per_image(self) -> int:
        """P: how many placeholder tokens one image takes."""
        crop = getattr(self.image_processor, "crop_size", None)
        crop = crop if getattr(self.image_processor, "do_center_crop", True) and crop else self.image_processor.size
        if self.patch_size is None:
            raise ValueError("this processor has no patch_size; it can't tell how many tokens an image takes")
        tokens = (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size) + self.num_additional_image_tokens
        return tokens - (self.vision_feature_select_strategy == "default")

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, 3, H, W] of RGB images, padded to squares as LLaVA does."""
        if self.image_aspect_ratio == "pad":
            background = tuple(int(x * 255) for x in self.image_processor.image_mean)
            images = [expand_to_square(image, background) for image in images]
        return self.image_processor(list(images), return_tensors="pt")["pixel_values"]

    def encode_text(
        self,
        turns: Sequence[Turn],
        *,
        n_images: int,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        sample_id: str = "",
    ) -> EncodedText:
        """Ids, labels and guidance mask of a conversation. Raises SampleError, with a reason, for one that can't be right."""
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if marks != n_images:
            raise SampleError(sample_id, "image_count", f"{marks} `{IMAGE_MARK}` marks for {n_images} images")
        return encode_turns(
            self.tokenizer,
            turns,
            chat_template=str(self.chat_template or self.tokenizer.chat_template),
            tokens_per_image=self.tokens_per_image,
            image_token=self.image_token,
            max_length=max_length,
            add_generation_prompt=add_generation_prompt,
            sample_id=sample_id,
        )

    def encode(
        self,
        turns: Sequence[Turn],
        images: Sequence[Path | Image.Image],
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        sample_id: str = "",
    ) -> dict[str, Any]:
        """One sample as `Collator` takes it: 1-D `input_ids`, `labels`, `guidance_mask`; `pixel_values` [n, 3, H, W] or `image_features`.

        Raises SampleError for turns or images that can't be right.
        """
        text = self.encode_text(
            turns, n_images=len(images), add_generation_prompt=add_generation_prompt, max_length=max_length, sample_id=sample_id
        )
        sample: dict[str, Any] = {
            "sample_id": sample_id,
            "input_ids": torch.tensor(text.input_ids),
            "labels": torch.tensor(text.labels),
            "guidance_mask": torch.tensor(text.guidance_mask),
        }
        if images:
            features = self._cached_features(images)
            if features is not None:
                sample["image_features"] = features
            else:
                opened = [load_image(image) if isinstance(image, str | Path) else image.convert("RGB") for image in images]
                sample["pixel_values"] = self.pixel_values(opened)
        return sample

    def _cached_features(self, images: Sequence[Path | Image.Image]) -> Tensor | None:
        if self.feature_cache is None or not all(isinstance(image, str | Path) for image in images):
            return None
        found = [self.feature_cache.get(image) for image in images if not isinstance(image, Image.Image)]
        return torch.stack(found) if all(f is not None for f in found) else None  # pyright: ignore[reportArgumentType]

    def encode_requests(self, requests: Sequence[Request]) -> BatchFeature:
        """A left-padded batch for `generate`: ids, attention mask, guidance mask, and pixels or cached features."""
        samples = [self.encode(r.turns, r.images, add_generation_prompt=True, sample_id=r.id) for r in requests]
        if len({key for sample in samples for key in ("pixel_values", "image_features") if key in sample}) > 1:
            raise ValueError("some of these images have cached features and some not: fill the cache first, or do without it")
        batch = Collator(self._pad_token_id, padding_side="left")(samples)
        return BatchFeature({key: value for key, value in batch.items() if key not in ("labels", "sample_ids", "categories")})

    def encode_answers(self, request: Request, answers: Sequence[str]) -> BatchFeature:
        """One prompt before each of several answers, padded on the right, as in training: `labels` are the answers' tokens and their ends.

        Raises SampleError as `encode` does.
        """
        samples = [self.encode((*request.turns, Turn("assistant", answers[0])), request.images, sample_id=request.id)]
        for answer in answers[1:]:
            text = self.encode_text((*request.turns, Turn("assistant", answer)), n_images=len(request.images), sample_id=request.id)
            fields = {key: torch.tensor(getattr(text, key)) for key in ("input_ids", "labels", "guidance_mask")}
            samples.append(samples[0] | fields)
        batch = Collator(self._pad_token_id)(samples)
        return BatchFeature({key: value for key, value in batch.items() if key not in ("sample_ids", "categories")})

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def decode_answers(self, ids_BT: Tensor, max_tokens: Sequence[int]) -> tuple[list[str], list[int]]:
        """Texts up to the end-of-turn token (at most `max_tokens` each), and how many tokens each one took."""
        texts, lengths = [], []
        for row, limit in zip(ids_BT.tolist(), max_tokens, strict=True):
            row = row[:limit]
            end = next((i for i, token in enumerate(row) if token in self._stop_ids), len(row))
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
            lengths.append(min(end + 1, len(row)))
        return texts, lengths

    @property
    def _stop_ids(self) -> set[int]:
        return {self.tokenizer.eos_token_id, self._pad_token_id}

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers', and with `tokenize=True, return_dict=True` through `encode`, so that `guidance_mask` comes along.

        `conversation`: Hugging Face messages (one conversation, or a list of them); content a string or typed parts whose images are
        PIL images or paths.
        """
        if chat_template is not None or not kwargs.get("tokenize") or not kwargs.get("return_dict"):
            return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
        side = "left" if kwargs.get("add_generation_prompt") else "right"
        samples = []
        for number, messages in enumerate(conversations):
            turns, images = _read_messages(messages)
            add = bool(kwargs.get("add_generation_prompt"))
            samples.append(self.encode(turns, images, add_generation_prompt=add, sample_id=str(number)))
        batch = Collator(self._pad_token_id, padding_side=side)(samples)
        return BatchFeature({key: value for key, value in batch.items() if key not in ("labels", "sample_ids", "categories")})


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Path | Image.Image]]:
    turns: list[Turn] = []
    images: list[Path | Image.Image] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "image":
                image = part.get("image", part.get("path"))
                if image is None:
                    raise ValueError("an image part needs `image` (a PIL image) or `path`")
                images.append(Path(image) if isinstance(image, str) else image)
                text += IMAGE_MARK + "\n"
            else:
                text += part["text"]
        turns.append(Turn(message["role"], text))
    return turns, images


AutoProcessor.register(HyperLlavaConfig, HyperLlavaProcessor, exist_ok=True)
