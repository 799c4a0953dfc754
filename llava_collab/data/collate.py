"""Samples -> one padded batch.

Shapes: B samples, T tokens, N images of all samples together, P image tokens, D width of the vision tower.
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
    `image_features` [N,P,D], images of all samples in order, left out where no sample has one; `sample_ids` list[str].
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Raises `ValueError` for no samples, or where some bring pixels and others cached features."""
        if not samples:
            raise ValueError("an empty batch; the sampler gave no indices")
        batch = Batch(
            input_ids=self._pad([s["input_ids"] for s in samples], self.pad_token_id),
            attention_mask=self._pad([torch.ones_like(s["input_ids"]) for s in samples], 0),
            labels=self._pad([s["labels"] for s in samples], IGNORE_INDEX),
            guidance_mask=self._pad([s["guidance_mask"] for s in samples], False),
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
