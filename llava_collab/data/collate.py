"""Samples -> one padded batch, of one sample a row or of several.

Shapes: B rows, T tokens, N images of all samples together, P image tokens, D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llava_collab.data.conversation import IGNORE_INDEX


class Batch(dict[str, Any]):
    """A dict that can be sent to a device; what is no tensor stays as it is."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on `device`."""
        return Batch({k: v.to(device, non_blocking=non_blocking) if isinstance(v, torch.Tensor) else v for k, v in self.items()})


@dataclass(frozen=True)
class Collator:
    """Pads what `ConversationDataset` gives. A dataclass at module level, so that workers started by any method can receive it.

    Batch: `input_ids`, `attention_mask`, `labels` int64 [B,T] and `guidance_mask` bool [B,T]; `pixel_values` [N,3,H,W] or
    `image_features` [N,P,D], images of all samples in order, left out where no sample has one; `sample_ids` list[str], in order.
    Of packed rows also `segment_ids` and `position_ids` int64 [B,T]: the sample's number in its row from 1 (padding 0), and the
    position in the sample from 0.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """One sample a row. Raises `ValueError` for no samples, or where some bring pixels and others cached features."""
        return self._batch([[sample] for sample in samples])

    def pack(self, rows: Sequence[Sequence[dict[str, Any]]]) -> Batch:
        """Each row's samples end to end, in order. Raises `ValueError` as a call does, and where padding goes to the left."""
        if self.padding_side != "right":
            raise ValueError("packed rows are padded on the right: they are for training, not for generation")
        batch = self._batch(rows)
        lengths = [[len(sample["input_ids"]) for sample in row] for row in rows]
        numbers = [torch.arange(1, len(row) + 1).repeat_interleave(torch.tensor(row)) for row in lengths]
        batch["segment_ids"] = self._pad(numbers, 0)
        batch["position_ids"] = self._pad([torch.cat([torch.arange(length) for length in row]) for row in lengths], 0)
        # a sample's first token has no token before it to be predicted from: what stands there is another sample's last
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
        return batch

    def _batch(self, rows: Sequence[Sequence[dict[str, Any]]]) -> Batch:
        samples = [sample for row in rows for sample in row]
        if not samples:
            raise ValueError("an empty batch; the sampler gave no indices")

        def text(key: str) -> list[torch.Tensor]:
            return [torch.cat([sample[key] for sample in row]) for row in rows]

        batch = Batch(
            input_ids=self._pad(text("input_ids"), self.pad_token_id),
            attention_mask=self._pad([torch.ones_like(ids) for ids in text("input_ids")], 0),
            labels=self._pad(text("labels"), IGNORE_INDEX),
            guidance_mask=self._pad(text("guidance_mask"), False),
        )
        kinds = [kind for kind in ("pixel_values", "image_features") if any(kind in s for s in samples)]
        if len(kinds) > 1:
            ids = ", ".join(s["sample_id"] for s in samples)
            raise ValueError(f"some samples bring pixels, others cached features ({ids}); fill the feature cache for all, or use none")
        for kind in kinds:
            batch[kind] = torch.cat([s[kind] for s in samples if kind in s])
        batch["sample_ids"] = [s["sample_id"] for s in samples]
        return batch

    def _pad(self, rows: list[torch.Tensor], value: int | bool) -> torch.Tensor:
        length = max(len(row) for row in rows)
        out_BT = rows[0].new_full((len(rows), length), value)
        for b, row in enumerate(rows):
            if self.padding_side == "right":
                out_BT[b, : len(row)] = row
            else:
                out_BT[b, length - len(row) :] = row
        return out_BT
