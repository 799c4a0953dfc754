"""Samples -> encoded items. All texts are encoded once, up front; pictures are opened at access, in the loader's workers.

A bad sample never costs a run, and never silently: it is replaced by the next good one (always the same) and reported with the item
that takes its place (`skips` counts). n images of a sample, P image tokens, D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_collab.data.conversation import IGNORE_INDEX, IMAGE_MARK, SampleError, check_image_count
from llava_collab.data.features import FeatureCache
from llava_collab.data.images import Picture, load_image, resolve_image
from llava_collab.data.samples import Sample
from llava_collab.data.skips import Skip, SkipList, TooManyBadSamples
from llava_collab.types import Turn


class ConversationDataset(Dataset[dict[str, Any]]):
    """`[i]` -> `sample_id`, `category`, `input_ids` and `labels` int64 [T], `guidance_mask` bool [T], and, if the sample has images,
    `pixel_values` [n,3,H,W], or `image_features` [n,P,D] where a `feature_cache` is given; `skipped`, a `Skip` for each bad sample that
    this item stands for.

    `processor` gives `encode_text(turns, n_images=, max_length=, sample_id=) -> EncodedText` and `pixel_values(images)`.
    `blind` takes images and their marks away: the control that shows what a text alone can guess.

    `lengths` and `has_image` are there for the sampler. `skips` counts what is bad: here all that shows before a picture is opened; whoever
    takes items adds what they report (a worker can't: it knows its own items only).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Any,
        *,
        max_length: int | None,
        blind: bool = False,
        feature_cache: FeatureCache | None = None,
        skips: SkipList | None = None,
    ) -> None:
        """`skips`: an empty list that counts (default: one with the default limit).

        Raises `TooManyBadSamples`, and `ValueError` for no samples at all.
        """
        if not samples:
            raise ValueError("no samples; is the data file empty?")
        self.samples = [_without_images(sample) for sample in samples] if blind else list(samples)
        self.processor = processor
        self.feature_cache = feature_cache
        n = len(samples)
        self.skips = SkipList(n) if skips is None else skips
        self._met: dict[int, Skip] = {}  # what this process found bad; it is counted when the item that reports it is taken
        rows = tqdm(self.samples, desc="encoding", unit="sample", disable=n <= 5000)
        self._texts = [self._encode(i, sample, max_length) for i, sample in enumerate(rows)]
        self.skips.add(self._met.values())
        shown = [self._good(i) for i in range(n)]
        self.lengths = [len(self._text(i).ids) for i in shown]
        self.has_image = [bool(self.samples[i].images) for i in shown]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `TooManyBadSamples` where not one sample is good, `IndexError` past the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        passed: list[Skip] = []
        while True:
            i = self._good(index % len(self), passed)
            try:
                return self._item(i) | {"skipped": passed}
            except SampleError as error:
                self._met[i] = self._skip(i, error)
                passed.clear()  # the way to the next good sample begins at the same place

    def _encode(self, i: int, sample: Sample, max_length: int | None) -> _Text | None:
        try:
            check_image_count(sample.turns, len(sample.images), sample_id=sample.id)
            for path in sample.images:
                if resolve_image(path) is None:
                    raise SampleError(sample.id, "missing_image", f"no image file {path}; run the data check on this file", str(path))
            encoded = self.processor.encode_text(sample.turns, n_images=len(sample.images), max_length=max_length, sample_id=sample.id)
            return _Text(encoded.input_ids, encoded.labels, encoded.guidance_mask)
        except SampleError as error:
            self._met[i] = self._skip(i, error)
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

    def _features(self, path: Picture, sample_id: str, cache: FeatureCache) -> torch.Tensor:
        features_PD = cache.get(path)
        if features_PD is None:
            load_image(path, sample_id)  # a picture that can't be opened is why it isn't in the cache: a bad sample
            raise RuntimeError(f"sample {sample_id}: no features of {path} in {cache.folder}; fill the cache before training")
        return features_PD

    def _text(self, i: int) -> _Text:
        text = self._texts[i]
        assert text is not None, "only good samples are asked for"
        return text

    def _good(self, i: int, passed: list[Skip] | None = None) -> int:
        """The first sample from i on, round the end, that is not known to be bad; the bad ones before it are added to `passed`."""
        for k in range(len(self)):
            at = (i + k) % len(self)
            skip = self._met.get(at) or self.skips.get(at)
            if skip is None:
                return at
            if passed is not None:
                passed.append(skip)
        raise TooManyBadSamples(f"all {len(self)} samples are bad:\n{self.skips.text()}")

    def _skip(self, i: int, error: SampleError) -> Skip:
        return Skip.of(i, self.samples[i].id, self.samples[i].source, error)


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
