"""Plans of packed rows, and the batches made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_collab.data.collate import Collator
from llava_collab.data.conversation import IGNORE_INDEX
from llava_collab.data.packing import SLACK, one_a_row, packed, padding_share, positions


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 9), st.integers(60, 200))
def test_plans_hold_every_sample_once_and_never_take_more_than_unpacked(lengths: list[int], size: int, longest_row: int) -> None:
    plan, plain = packed(lengths, size, longest_row), one_a_row(lengths, size)
    for made in (plan, plain):
        assert sorted(index for rows in made for row in rows for index in row) == list(range(len(lengths)))
        assert len(made) == -(-len(lengths) // size), "as many micro-batches packed as unpacked"
        assert all(row for rows in made for row in rows)
    for rows in plan:
        members = [lengths[index] for row in rows for index in row]
        assert len(members) <= size
        assert max(sum(lengths[index] for index in row) for row in rows) <= longest_row
        assert positions(lengths, [rows]) <= len(members) * max(members)
    assert positions(lengths, plain) == sum(len(rows) * max(lengths[row[0]] for row in rows) for rows in plain)


def test_rows_are_no_longer_than_they_need_be() -> None:
    lengths = [100, 50, 50, 60, 40, 70, 30]  # 400: four rows of 100 without any padding, though one of 400 would fit
    [rows] = packed(lengths, 8, 400)
    assert sorted(sum(lengths[index] for index in row) for row in rows) == [100] * 4
    assert packed([7, 7, 7], 3, 7) == [[[0], [1], [2]]] and packed([], 4, 10) == []
    [rows] = packed([90, 10, 10], 3, 100)  # 90 + 20 is too long: two rows, 90 % full
    assert sorted(map(sorted, rows)) == [[0], [1, 2]]
    assert padding_share([(lengths, packed(lengths, 8, 400))]) == 0.0 < SLACK
    assert padding_share([([3, 1], one_a_row([3, 1], 2)), ([2, 2], one_a_row([2, 2], 2))]) == pytest.approx(2 / 10)
    assert padding_share([]) == 0.0


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a row of 10"):
        packed([3, 11], 2, 10)


def sample(name: str, ids: list[int], prompt: int, images: int = 0) -> dict[str, Any]:
    tensor = torch.tensor(ids)
    made = {"sample_id": name, "input_ids": tensor, "labels": tensor.clone(), "guidance_mask": torch.arange(len(ids)) < prompt}
    made["labels"][1:prompt] = IGNORE_INDEX  # the first token has a label, which a shifted loss never sees
    return made | ({"pixel_values": torch.full((images, 3, 2, 2), float(ids[0]))} if images else {})


def test_a_packed_batch() -> None:
    made = [sample("a", [11, 12, 13], 2, images=2), sample("b", [21, 22], 1), sample("c", [31, 32, 33], 2, images=1)]
    batch = Collator(pad_token_id=0).pack([[made[0], made[1]], [made[2]]])
    ignored = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22], [31, 32, 33, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]] and batch["segment_ids"].dtype == torch.int64
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]] and batch["position_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [[ignored, ignored, 13, ignored, 22], [ignored, ignored, 33, ignored, ignored]]
    assert batch["guidance_mask"].tolist() == [[True, True, False, True, False], [True, True, False, False, False]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [11, 11, 31], "images in the order of their samples in the rows"
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert made[0]["labels"][0] == 11, "the samples are left as they were"
    assert "pixel_values" not in Collator(0).pack([[made[1]]])


def test_what_can_not_be_packed() -> None:
    made = [sample("a", [1, 2], 1, images=1), sample("b", [3, 4], 1) | {"image_features": torch.zeros(1, 2, 2)}]
    with pytest.raises(ValueError, match=r"cached features \(a, b\)"):
        Collator(0).pack([made])
    with pytest.raises(ValueError, match="empty batch"):
        Collator(0).pack([])
    with pytest.raises(ValueError, match="padded on the right"):
        Collator(0, padding_side="left").pack([made[:1]])
