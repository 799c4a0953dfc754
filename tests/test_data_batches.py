"""Batches: dataset with its policy for bad samples, collator, resumable sampler, feature cache."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_collab.data.collate import Collator
from llava_collab.data.conversation import IGNORE_INDEX, EncodedText, SampleError
from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.features import FeatureCache
from llava_collab.data.sampler import GroupedBatchSampler, Window
from llava_collab.data.samples import Sample
from llava_collab.data.skips import Skip, SkipList, TooManyBadSamples
from llava_collab.types import Turn


class FakeProcessor:
    """What the dataset asks of a processor: a token a character, two tokens an image, pixels that are the first colour."""

    def encode_text(self, turns: Sequence[Turn], *, n_images: int, max_length: int | None, sample_id: str) -> EncodedText:
        question = [9] * (2 * n_images) + [ord(c) for c in turns[0].text.replace("<image>", "")]
        answer = [ord(c) for c in turns[1].text]
        if max_length is not None and len(question + answer) > max_length:
            raise SampleError(sample_id, "too_long", "too long")
        labels = [IGNORE_INDEX] * len(question) + answer
        return EncodedText(question + answer, labels, [True] * len(question) + [False] * len(answer))

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.full((3, 2, 2), float(image.getpixel((0, 0))[0])) for image in images])  # type: ignore[index]


def make_samples(folder: Path, n: int) -> list[Sample]:
    """Every third sample has no image, sample 1 has two; image i is of grey i."""
    samples = []
    for i in range(n):
        count = 0 if i % 3 == 2 else 2 if i == 1 else 1
        paths = tuple(folder / f"{i}-{k}.png" for k in range(count))
        for path in paths:
            Image.new("RGB", (4, 4), (i, i, i)).save(path)
        turns = (Turn("user", "<image>" * count + "q" * (i + 1)), Turn("assistant", "yes"))
        samples.append(Sample(f"s{i}", paths, turns, category="Visual QA"))
    return samples


def test_items_and_their_batch(tmp_path: Path) -> None:
    dataset = ConversationDataset(make_samples(tmp_path, 4), FakeProcessor(), max_length=None)
    assert dataset.lengths == [6, 9, 6, 9] and dataset.has_image == [True, True, False, True] and dataset.skips.by_reason() == {}
    item = dataset[1]
    assert item["sample_id"] == "s1" and item["category"] == "Visual QA"
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64 and item["guidance_mask"].dtype == torch.bool
    assert item["labels"].tolist() == [IGNORE_INDEX] * 6 + [ord(c) for c in "yes"]
    assert item["guidance_mask"].tolist() == [True] * 6 + [False] * 3
    assert item["pixel_values"].shape == (2, 3, 2, 2) and "pixel_values" not in dataset[2]

    batch = Collator(pad_token_id=0)([dataset[i] for i in range(4)]).to("cpu")
    assert batch["sample_ids"] == ["s0", "s1", "s2", "s3"]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 1, 3]  # images of all samples, in order
    assert batch["attention_mask"].sum(1).tolist() == [6, 9, 6, 9]
    assert batch["input_ids"][0, 6:].tolist() == [0] * 3 and batch["labels"][0, 6:].tolist() == [IGNORE_INDEX] * 3
    assert not batch["guidance_mask"][0, 6:].any()

    left = Collator(pad_token_id=0, padding_side="left")([dataset[i] for i in range(4)])
    assert torch.equal(left["input_ids"][0, 3:], batch["input_ids"][0, :6]) and left["attention_mask"][0].tolist() == [0] * 3 + [1] * 6
    assert "pixel_values" not in Collator(0)([dataset[2]])
    with pytest.raises(ValueError, match="empty batch"):
        Collator(0)([])
    with pytest.raises(ValueError, match="cached features"):
        Collator(0)([dataset[0], {**dataset[2], "image_features": torch.zeros(1, 2, 2)}])


def test_blind_takes_images_and_marks(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 2)
    dataset = ConversationDataset(samples, FakeProcessor(), max_length=None, blind=True)
    assert "pixel_values" not in dataset[1] and dataset.has_image == [False, False]
    assert dataset[1]["input_ids"].tolist() == [ord(c) for c in "qqyes"]


def test_bad_samples_are_replaced_by_the_next_good_one(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 60)
    samples[10].images[0].unlink()  # found up front
    samples[9].images[0].write_bytes(samples[9].images[0].read_bytes()[:50])  # found at access
    samples[59] = Sample("s59", (), (Turn("user", "<image>"), Turn("assistant", "yes")))
    dataset = ConversationDataset(samples, FakeProcessor(), max_length=None)
    assert dataset.skips.by_reason() == {"missing_image": ["s10"], "image_count": ["s59"]}
    assert dataset.lengths[10] == dataset.lengths[11] and not dataset.has_image[10]
    assert [dataset[i]["sample_id"] for i in (8, 9, 10, 11, 59, 9)] == ["s8", "s11", "s11", "s11", "s0", "s11"]
    reported = [[(skip.id, skip.reason, Path(skip.file).name) for skip in dataset[i]["skipped"]] for i in (8, 9, 9, 10, 59)]
    cut, gone = ("s9", "truncated_image", "9-0.png"), ("s10", "missing_image", "10-0.png")
    assert reported == [[], [cut, gone], [cut, gone], [gone], [("s59", "image_count", "")]]  # known or not: the same each time
    assert "truncated_image" not in dataset.skips.by_reason()  # counted by whoever takes the item
    assert len(dataset) == 60 and dataset[-2]["sample_id"] == "s58"
    with pytest.raises(IndexError):
        dataset[60]


def test_too_many_bad_samples_stop_the_run_with_a_table(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 20)
    with pytest.raises(TooManyBadSamples, match=r"too_long +.*s1[0-9]"):
        ConversationDataset(samples, FakeProcessor(), max_length=20)
    samples[4].images[0].unlink()
    with pytest.raises(TooManyBadSamples, match="1 of 20 samples are bad[^$]*missing_image +s4 .*4-0.png[^$]*more than 0 are not allowed"):
        ConversationDataset(samples, FakeProcessor(), max_length=None, skips=SkipList(20, max_bad_fraction=0))
    with pytest.raises(TooManyBadSamples, match="all 1 samples are bad"):
        ConversationDataset([samples[4]], FakeProcessor(), max_length=None, skips=SkipList(1000))
    with pytest.raises(ValueError, match="no samples"):
        ConversationDataset([], FakeProcessor(), max_length=None)


def test_features_take_the_place_of_pixels(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 20)
    cache = FeatureCache(tmp_path / "cache", "tower-1")
    dataset = ConversationDataset(samples, FakeProcessor(), max_length=None, feature_cache=cache)
    with pytest.raises(RuntimeError, match="sample s1: no features"):
        dataset[1]
    for k, path in enumerate(samples[1].images):
        cache.put(path, torch.full((2, 5), float(k)))
    assert dataset[1]["image_features"][:, 0, 0].tolist() == [1, 1]  # same bytes, same key: the later one counts
    assert "pixel_values" not in dataset[1]
    samples[0].images[0].write_bytes(b"no image")
    assert dataset[0]["sample_id"] == "s1"


def make_sampler(seed: int = 0, batch_size: int = 8) -> GroupedBatchSampler:
    rng = np.random.default_rng(1)
    return GroupedBatchSampler(rng.integers(5, 500, 1003).tolist(), (rng.random(1003) < 0.7).tolist(), batch_size, seed)


def test_every_sample_once_an_epoch_grouped_by_modality_and_length() -> None:
    sampler = make_sampler()
    for epoch in range(3):
        assert sampler.epoch == epoch
        batches = list(islice(sampler, len(sampler)))
        assert sorted(i for batch in batches for i in batch) == list(range(1003))
        assert sorted(len(batch) for batch in batches)[:2] == [3, 8]
        assert sum(len({bool(sampler.has_image[i]) for i in batch}) == 2 for batch in batches) <= 2
        pure = [batch for batch in batches if len({bool(sampler.has_image[i]) for i in batch}) == 1 and len(batch) == 8]
        assert all(np.all(np.diff(sampler.lengths[batch]) <= 0) for batch in pure)
        assert max(sampler.lengths) == sampler.lengths[batches[0]].max()
        assert sampler.lengths.max() in sampler.lengths[batches[0]]


def test_order_is_fixed_by_seed_and_epoch() -> None:
    first = list(islice(make_sampler(), 200))
    assert first == list(islice(make_sampler(), 200))
    assert first != list(islice(make_sampler(seed=1), 200))
    assert first[: len(make_sampler())] != make_sampler().batches(1)


@pytest.mark.parametrize("taken", [1, 100, 126, 200])
def test_resumes_at_the_very_next_batch(taken: int) -> None:
    expected = list(islice(make_sampler(), 300))
    broken = make_sampler()
    assert list(islice(broken, taken)) == expected[:taken]
    resumed = make_sampler()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert list(islice(resumed, 300 - taken)) == expected[taken:]
    prefetched = make_sampler()  # a loader drew 7 batches more than were trained on
    list(islice(prefetched, taken + 7))
    resumed.load_state_dict(prefetched.state_dict(taken=taken))
    assert next(iter(resumed)) == expected[taken]


def shards_of(sampler: GroupedBatchSampler, epoch: int) -> list[set[int]]:
    """The shards that each step of an epoch takes."""
    assert sampler.window is not None
    numbers = np.asarray(sampler.window.shards)
    return [set(numbers[batch].tolist()) - {-1} for batch in sampler.batches(epoch)]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_window_keeps_steps_near_few_shards(size: int) -> None:
    rng = np.random.default_rng(0)
    has_image = rng.random(4000) < 0.8
    numbers = np.where(has_image, np.arange(4000) // 100, -1)  # 40 shards of about 80 pictures
    lengths = rng.integers(5, 500, 4000)
    sampler = GroupedBatchSampler(lengths.tolist(), has_image.tolist(), 16, 0, Window(numbers.tolist(), size))
    for epoch in range(2):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler) and sorted(i for batch in batches for i in batch) == list(range(4000))
        assert max(lengths) == lengths[batches[0]].max()
        steps = shards_of(sampler, epoch)
        opened = [next(k for k, step in enumerate(steps) if shard in step) for shard in range(40)]
        closed = [max(k for k, step in enumerate(steps) if shard in step) for shard in range(40)]
        open_at = [sum(a <= k <= b for a, b in zip(opened, closed, strict=True)) for k in range(len(steps))]
        assert max(open_at[1:]) <= min(size + 2, 40)  # what a cache has to hold; the first step is the longest of the first window
        if size == 4:  # mixed, at the beginning and the end too, and text-only steps are spread over the epoch
            assert min(len(step) for step in steps[1:] if step) >= 2 and np.mean([len(step) for step in steps if step]) > 3
            assert np.diff([k for k, step in enumerate(steps) if not step]).max() < 20
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.fingerprint != GroupedBatchSampler(lengths.tolist(), has_image.tolist(), 16).fingerprint


def test_a_window_without_shards_is_one_shuffle() -> None:
    sampler = GroupedBatchSampler([5] * 64, [False] * 64, 8, 0, Window([-1] * 64, 4))
    order = [i for batch in sampler.batches(0) for i in batch]
    assert sorted(order) == list(range(64)) and np.abs(np.asarray(order) - np.arange(64)).mean() > 10


def test_sampler_refuses_other_data_and_nonsense() -> None:
    state = make_sampler().state_dict()
    for other in (make_sampler(seed=3), make_sampler(batch_size=4), GroupedBatchSampler([1, 2], [True, True], 8)):
        with pytest.raises(ValueError, match="can't resume the order of samples: (seed|batch_size|samples) was"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="at least one sample"):
        GroupedBatchSampler([], [], 8)
    assert list(islice(GroupedBatchSampler([3], [False], 8), 2)) == [[0], [0]]


def test_cache_round_trip_by_bytes_and_tower(tmp_path: Path) -> None:
    (path,) = make_samples(tmp_path, 1)[0].images
    cache = FeatureCache(tmp_path / "cache", "tower-1")
    assert cache.get(path) is None
    features_PD = torch.randn(3, 4)
    cache.put(path, features_PD)
    again = cache.get(path)
    assert again is not None and torch.equal(again, features_PD.bfloat16())
    copy = tmp_path / "copy.png"
    copy.write_bytes(path.read_bytes())
    assert cache.key(copy) == cache.key(path) and cache.get(copy) is not None
    assert FeatureCache(tmp_path / "cache", "tower-2").get(path) is None
    Image.new("RGB", (4, 4), (77, 7, 7)).save(path)  # another picture under the same name
    assert cache.get(path) is None
    for bad in ("../x", "a/b", "", ".."):
        with pytest.raises(ValueError, match="tower_key"):
            FeatureCache(tmp_path, bad)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_damaged_cache_file_is_a_miss_and_rewritten(tmp_path: Path, damage: str) -> None:
    (path,) = make_samples(tmp_path, 1)[0].images
    cache = FeatureCache(tmp_path / "cache", "t")
    cache.put(path, torch.ones(3, 4))
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes({"cut": bytes(content[:-5]), "empty": b"", "flipped": bytes(content)}[damage])
    assert cache.get(path) is None
    cache.put(path, torch.ones(3, 4))
    assert cache.get(path) is not None


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = make_samples(tmp_path, 1)[0].images
    cache = FeatureCache(tmp_path / "cache", "t")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llava_collab.files.os.fsync", full)
    with pytest.raises(OSError, match="can't write features to .*No space left.*free some space"):
        cache.put(path, torch.ones(3, 4))
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_fill_goes_on_where_it_stopped_and_counts_bad_pictures(tmp_path: Path) -> None:
    paths = [path for sample in make_samples(tmp_path, 10) for path in sample.images]  # 8 files, two of them the same picture
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:40])
    calls: list[int] = []

    def extract(images: list[Image.Image]) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.ones(len(images), 2, 3)

    cache = FeatureCache(tmp_path / "cache", "t")
    everything: list[Path | str] = [*paths, tmp_path / "cut.png", tmp_path / "gone.png"]
    with pytest.raises(KeyboardInterrupt):
        cache.fill(everything, extract, batch_size=2)
    report = cache.fill(everything, extract, batch_size=2)
    assert (report.cached, report.computed) == (2, 5) and calls == [2, 2, 2, 2, 1]
    assert {reason: len(found) for reason, found in report.skipped.items()} == {"truncated_image": 1, "missing_image": 1}
    assert all(cache.get(path) is not None for path in paths)


def test_errors_survive_the_trip_out_of_a_worker() -> None:
    """Copying rebuilds an exception from its args, as the queue between a worker and the main process does."""
    error = copy.deepcopy(SampleError("s", "too_long", "m"))
    assert (error.sample_id, error.reason, error.message) == ("s", "too_long", "m")


def skip(index: int) -> Skip:
    return Skip(index, f"s{index}", f"{index}.png", "missing_image", "gone")


def test_the_list_of_skips_names_each_once_and_goes_on_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    skips = SkipList(1000, 0.015, path)
    skips.add([skip(7)])
    skips.add([skip(30), skip(7), skip(20)], step=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == skips.state() and [(row["step"], row["index"]) for row in rows] == [(0, 7), (3, 20), (3, 30)]
    assert rows[1] == {"step": 3, "index": 20, "id": "s20", "file": "20.png", "reason": "missing_image", "message": "gone"}
    assert skips.get(20) == skip(20) and skips.get(21) is None and len(caplog.records) == 3
    skips.add([skip(40)], step=5)
    again = SkipList(1000, 0.015, path)
    again.add([skip(7)])
    again.load(json.loads(json.dumps(rows)))  # of a checkpoint of step 3 or 4
    assert path.read_text().count("\n") == 3 and again.state() == rows
    with pytest.raises(
        TooManyBadSamples, match="16 of 1000 samples are bad, all listed in .*skipped.jsonl[^$]*s7 .7.png., s20 .*\\.\\.\\."
    ):
        again.add([skip(index) for index in range(100, 113)], step=4)
    assert path.read_text().count("\n") == 16
    caplog.clear()
    SkipList(1000, quiet=True).add([skip(1)])
    assert not caplog.records
    many = SkipList(10_000)
    many.add([skip(index) for index in range(50)])
    assert len(caplog.records) == 10 and "more will be told at the end" in caplog.text
    assert [SkipList(n, fraction).limit for n, fraction in ((2000, 0.01), (20, 0.01), (200, 0.01), (2000, 0))] == [20, 2, 5, 0]
