"""Samples -> encoded items. All texts are encoded once, up front; pictures are opened at access, in the loader's workers.

A bad sample never costs a run, and never silently: it is replaced by the next good one (always the same), counted by reason and
named; past a limit everything stops with the table of reasons. n images of a sample, P image tokens, D width of the vision tower.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_collab.data.conversation import IGNORE_INDEX, IMAGE_MARK, SampleError, check_image_count
from llava_collab.data.features import FeatureCache
from llava_collab.data.images import load_image, resolve_image
from llava_collab.data.samples import Sample
from llava_collab.types import Turn

logger = logging.getLogger(__name__)


REASONS = (
    "other", "empty_answer", "image_count", "image_place", "too_long", "missing_image", "truncated_image", "image_too_large",
    "starts_with_assistant", "turn_order", "ends_with_user", "unknown_role", "no_supervision", "empty_prompt", "special_token",
    "template_prefix", "bad_record",
)  # fmt: skip


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the limit allows; the message holds the table of reasons."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """`[i]` -> `sample_id`, `category`, `input_ids` and `labels` int64 [T], `guidance_mask` bool [T], and, if the sample has images,
    `pixel_values` [n,3,H,W], or `image_features` [n,P,D] where a `feature_cache` is given.

    `processor` gives `encode_text(turns, n_images=, max_length=, sample_id=) -> EncodedText` and `pixel_values(images)`.
    `blind` takes images and their marks away: the control that shows what a text alone can guess.

    `lengths` and `has_image` are there for the sampler. `skipped` maps a reason to the ids of bad samples; which ones are bad is
    shared memory, so the workers of a loader and the main process see the same table.
    The limit is `max_bad_fraction` of all samples; small sets may lose up to a tenth, at most five. 0 means none at all.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Any,
        *,
        max_length: int | None,
        blind: bool = False,
        feature_cache: FeatureCache | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        """Raises `TooManyBadSamples`, and `ValueError` for no samples at all."""
        if not samples:
            raise ValueError("no samples; is the data file empty?")
        self.samples = [_without_images(sample) for sample in samples] if blind else list(samples)
        self.processor = processor
        self.feature_cache = feature_cache
        n = len(samples)
        self.max_bad = max(int(max_bad_fraction * n), min(5, n // 10)) if max_bad_fraction > 0 else 0
        self._reasons = torch.zeros(n, dtype=torch.int16).share_memory_()  # 0: good; else 1 + the index of the reason in REASONS
        self._texts: list[_Text | None] = []
        rows = tqdm(self.samples, desc="encoding", unit="sample", disable=n <= 5000)
        for i, sample in enumerate(rows):
            self._texts.append(self._encode(i, sample, max_length))
        self._stop_past_limit()
        shown = [self._good(i) for i in range(n)]
        self.lengths = [len(self._text(i).ids) for i in shown]
        self.has_image = [bool(self.samples[i].images) for i in shown]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `TooManyBadSamples` when this access finds the one bad sample too many; `IndexError` past the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        while True:
            i = self._good(index % len(self))
            try:
                return self._item(i)
            except SampleError as error:
                self._mark(i, error)
                self._stop_past_limit()

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Ids of the samples found bad so far, by reason."""
        table: dict[str, list[str]] = {}
        for i in torch.nonzero(self._reasons).flatten().tolist():
            table.setdefault(REASONS[int(self._reasons[i]) - 1], []).append(self.samples[i].id)
        return table

    def _encode(self, i: int, sample: Sample, max_length: int | None) -> _Text | None:
        try:
            check_image_count(sample.turns, len(sample.images), sample_id=sample.id)
            for path in sample.images:
                if resolve_image(path) is None:
                    raise SampleError(sample.id, "missing_image", f"no image file {path}; run the data check on this file")
            encoded = self.processor.encode_text(sample.turns, n_images=len(sample.images), max_length=max_length, sample_id=sample.id)
            return _Text(encoded.input_ids, encoded.labels, encoded.guidance_mask)
        except SampleError as error:
            self._mark(i, error)
            return None

    def _item(self, i: int) -> dict[str, Any]:
        sample, text = self.samples[i], self._text(i)
        ids = torch.from_numpy(text.ids.astype(np.int64))
        item: dict[str, Any] = {
            "sample_id": sample.id,
            "category": sample.category,
            "input_ids": ids,
            "labels": ids.where(torch.from_numpy(text.supervised), IGNORE_INDEX),
            "guidance_mask": torch.from_numpy(text.guidance.copy()),
        }
        if sample.images and self.feature_cache is not None:
            item["image_features"] = torch.stack([self._features(path, sample.id, self.feature_cache) for path in sample.images])
        elif sample.images:
            item["pixel_values"] = self.processor.pixel_values([load_image(path, sample.id) for path in sample.images])
        return item

    def _features(self, path: Any, sample_id: str, cache: FeatureCache) -> torch.Tensor:
        features_PD = cache.get(path)
        if features_PD is None:
            load_image(path, sample_id)  # a picture that can't be opened is why it isn't in the cache: a bad sample
            raise RuntimeError(f"sample {sample_id}: no features of {path} in {cache.folder}; fill the cache before training")
        return features_PD

    def _text(self, i: int) -> _Text:
        text = self._texts[i]
        assert text is not None, "only good samples are asked for"
        return text

    def _good(self, i: int) -> int:
        """The first good sample from i on, round the end."""
        for k in range(len(self)):
            if self._reasons[(i + k) % len(self)] == 0:
                return (i + k) % len(self)
        raise TooManyBadSamples(f"all {len(self)} samples are bad:\n{self._table()}")

    def _mark(self, i: int, error: SampleError) -> None:
        reason = error.reason if error.reason in REASONS else "other"
        self._reasons[i] = 1 + REASONS.index(reason)
        logger.warning("skipped %s (sample %d)", SampleError(self.samples[i].id, error.reason, error.message), i)

    def _stop_past_limit(self) -> None:
        bad = int(torch.count_nonzero(self._reasons))
        if bad > self.max_bad:
            raise TooManyBadSamples(f"{bad} of {len(self)} samples are bad, {self.max_bad} are allowed:\n{self._table()}")

    def _table(self) -> str:
        rows = [f"{len(ids):>7}  {reason:<22} {', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''}" for reason, ids in self.skipped.items()]
        return "\n".join(["  count  reason                 samples", *rows])


class _Text:
    """An encoded text in 6 bytes a token, not the 24 of three lists: half a million samples of LLaVA have to fit in memory."""

    __slots__ = ("guidance", "ids", "supervised")

    def __init__(self, ids: list[int], labels: list[int], guidance: list[bool]) -> None:
        self.ids = np.asarray(ids, dtype=np.int32)
        self.supervised = np.asarray(labels, dtype=np.int32) != IGNORE_INDEX
        self.guidance = np.asarray(guidance, dtype=bool)


def _without_images(sample: Sample) -> Sample:
    """The sample as a text alone. Marks go together with the line break that set them off."""
    turns = []
    for turn in sample.turns:
        if turn.role == "user" and IMAGE_MARK in turn.text:
            text = turn.text.replace(f"{IMAGE_MARK}\n", "").replace(f"\n{IMAGE_MARK}", "").replace(IMAGE_MARK, "")
            turn = Turn(turn.role, text.strip())
        turns.append(turn)
    return replace(sample, images=(), turns=tuple(turns))
