"""`LlavaStudent`: a model folder that learns from samples as data files hold them, or teaches on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.collate import Batch, Collator
from ..data.samples import Sample
from ..models.build import feature_cache, load
from .distill import TokenStudent


class LlavaStudent(TokenStudent):
    """A `TokenStudent` whose inputs are `Sample`s. Each model encodes them as its own tower and template want them, so a student and its
    teacher need the same tokenizer, and nothing else in common. What the tower sees of `images` is computed once and kept.
    """

    network: Any
    processor: Any

    def __init__(self, folder: Path, images: Iterable[Path], device: torch.device) -> None:
        network, processor = load(folder, dtype=torch.float32)
        processor.feature_cache = feature_cache(network, processor, images, 32)
        super().__init__(network.to(device), self.encoded)  # pyright: ignore[reportArgumentType]
        self.processor = processor

    def encoded(self, samples: Sequence[Sample]) -> Batch:
        """A padded batch. Raises SampleError for turns or images that can't be right."""
        rows = [self.processor.encode(sample.turns, sample.images, sample_id=sample.id) for sample in samples]
        return Collator(self.processor.tokenizer.pad_token_id)(rows)

    def save(self, folder: Path) -> None:
        """Write a model folder, as `models.build.load` reads it."""
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)
