"""Packed rows: several samples end to end in one row, each of which must come out as it would alone.

Shapes: B rows, T positions, S segments (samples) of all rows in order, L positions of the longest segment, N tokens of all segments.

Between tokens only attention looks about; transformers keeps it inside a segment where positions start again at 0 and no attention mask
is given (`masking_utils.find_packed_sequence_indices`), for eager, sdpa and sliding windows alike. Flash kernels get the boundaries
themselves, since they are not found for batches of several rows. What belongs to a sample and not to a token (guidance, generated
weights) is worked out on a copy with one segment a row, `spread`, and brought back by `join`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders that look at other positions through attention alone, by masks made as above."""


@dataclass(frozen=True)
class Segments:
    """Where the segments of a packed batch are."""

    ids_BT: Tensor
    """int64: 0 for padding, else the number of the segment in its row, from 1."""
    position_BT: Tensor
    """int64: the position in the segment, from 0; 0 for padding."""
    count: int
    """S"""
    longest: int
    """L"""
    token_N: Tensor
    """Where each token is in the flattened [B, T]."""
    place_N: Tensor
    """Where each token is in the flattened [S, L]."""

    def spread(self, x_BTx: Tensor, fill: float = 0) -> Tensor:
        """[B, T, ...] to [S, L, ...]: one segment a row, padded on the right with `fill`. Raises ValueError for another [B, T]."""
        if x_BTx.shape[:2] != self.ids_BT.shape:
            raise ValueError(f"a tensor of shape {tuple(x_BTx.shape)} beside segment_ids of shape {tuple(self.ids_BT.shape)}")
        out = x_BTx.new_full((self.count * self.longest, *x_BTx.shape[2:]), fill)
        out.index_copy_(0, self.place_N, x_BTx.flatten(0, 1).index_select(0, self.token_N))
        return out.unflatten(0, (self.count, self.longest))

    def join(self, x_SLx: Tensor) -> Tensor:
        """[S, L, ...] back to [B, T, ...]; padding gets zeros."""
        out = x_SLx.new_zeros((self.ids_BT.numel(), *x_SLx.shape[2:]))
        out.index_copy_(0, self.token_N, x_SLx.flatten(0, 1).index_select(0, self.place_N))
        return out.unflatten(0, tuple(self.ids_BT.shape))

    def samples(self) -> Tensor:
        """int64 [B, T]: which segment of all rows each position is of, from 0 (0 too for padding)."""
        empty = torch.zeros(self.ids_BT.numel(), dtype=torch.int64, device=self.ids_BT.device)
        return empty.index_copy(0, self.token_N, self.place_N // self.longest).view_as(self.ids_BT)

    def boundaries(self) -> dict[str, Any]:
        """What flash kernels take: where each segment, or run of padding, starts in the flattened [B, T], and the longest of them."""
        starts_BT = self.ids_BT != F.pad(self.ids_BT, (1, 0), value=-1)[:, :-1]
        starts = starts_BT.flatten().nonzero().flatten()
        starts = F.pad(starts, (0, 1), value=self.ids_BT.numel()).to(torch.int32)
        longest = int(starts.diff().max())
        return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def segment_starts(ids_BT: Tensor) -> Tensor:
    """bool [B, T]: each segment's first token, which nothing predicts."""
    return (ids_BT != F.pad(ids_BT, (1, 0))[:, :-1]) & (ids_BT > 0)


def read_segments(
    segment_ids: Tensor, shape_BT: torch.Size, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Segments:
    """The segments of a batch. Raises ValueError for ids that no packed batch has, and for a mask or positions that say something else."""
    if segment_ids.shape != shape_BT:
        raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}, the batch {tuple(shape_BT)}")
    ids_BT = segment_ids.long()
    before_BT = F.pad(ids_BT, (1, 0))[:, :-1]
    starts_BT, padding_BT = segment_starts(ids_BT), ids_BT == 0
    column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    position_BT = (column_T - torch.where(starts_BT, column_T, 0).cummax(1).values).masked_fill(padding_BT, 0)
    next_BT = (ids_BT == before_BT + 1) & ((before_BT > 0) | (column_T == 0))
    right = ((ids_BT == before_BT) | next_BT | padding_BT).all()
    same_mask = same_positions = torch.ones_like(right)
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and given.shape != shape_BT:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, segment_ids {tuple(shape_BT)}; leave it out: it follows from them")
    if attention_mask is not None:
        same_mask = (attention_mask.bool() != padding_BT).all()
    if position_ids is not None:
        same_positions = ((position_ids == position_BT) | padding_BT).all()
    facts = torch.stack([right, same_mask, same_positions, starts_BT.sum(), position_BT.max() + 1])  # one wait for the device, not five
    in_order, mask_fits, positions_fit, count, longest = facts.tolist()
    if not in_order or not count:
        raise ValueError(
            "segment_ids must number a row's segments 1, 2, 3, ... from its start, each in one piece, and be 0 for padding behind"
        )
    if not mask_fits:
        raise ValueError("attention_mask must be 1 exactly where segment_ids is not 0; leave it out: it follows from them")
    if not positions_fit:
        raise ValueError("position_ids must start again at 0 in every segment; leave them out: they follow from segment_ids")
    token_N = (~padding_BT).flatten().nonzero().flatten()
    segment_N = starts_BT.flatten().cumsum(0)[token_N] - 1
    return Segments(ids_BT, position_BT, count, longest, token_N, segment_N * longest + position_BT.flatten()[token_N])


def unpackable(text_config: Any) -> str | None:
    """Why a decoder of this configuration can't take packed rows; None if it can."""
    if text_config.model_type not in DECODERS:
        return f"a {text_config.model_type} decoder may carry more from one sample to the next than attention does"
    attention = text_config._attn_implementation
    if attention not in ("eager", "sdpa") and not attention.startswith("flash_attention"):
        return f"attention of the kind {attention!r} is not known to stay inside a sample; eager, sdpa and flash_attention_* do"
    return None
