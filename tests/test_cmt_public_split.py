"""CMT-public: near duplicates, splits by picture, quotas, and rows that only the seed and the ids decide."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
import yaml
from PIL import Image
from public_files import Rows, build, coco, die, llava_record, picture, put, vqav2
from running import ROOT, run_apart

from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public.card import summary
from llava_collab.cmt.public.choose import apportion
from llava_collab.cmt.public.duplicates import CACHE, DISTANCE, NearIndex, hash_pictures, perceptual_hash
from llava_collab.cmt.public.entries import SourceError, picture_key
from llava_collab.data.real import REAL_SETS, ROOT_VARIABLE, real_root
from llava_collab.data.samples import iter_records
from llava_collab.evaluation.suite import load_suite


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pytest.importorskip("ijson", reason="reading annotation files needs ijson: pip install 'llava_collab[public]'")
    (tmp_path / "sources").mkdir()
    return tmp_path / "sources"


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_imagehash():
    """The recorded values are `imagehash.phash` (4.3.2) of the same pictures."""
    ramp = Image.fromarray(np.add.outer(np.arange(96) * 2, np.arange(128)).astype(np.uint8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    assert [f"{perceptual_hash(image):016x}" for image in (ramp, noise)] == RECORDED


RECORDED = ["892749b76952ad5a", "fc9848e313c4ae3b"]


def test_copies_are_near_and_others_are_not(tmp_path):
    hashes = []
    for seed in range(40):
        image = Image.open(picture(tmp_path / "a.png", seed, (256, 192)))
        image.resize((120, 90)).save(tmp_path / "b.jpg", quality=60)
        hashes.append((perceptual_hash(image), perceptual_hash(Image.open(tmp_path / "b.jpg"))))
    assert all((one ^ two).bit_count() <= DISTANCE for one, two in hashes)
    assert all((hashes[i][0] ^ hashes[j][1]).bit_count() > DISTANCE for i in range(40) for j in range(40) if i != j)


def test_the_index_finds_what_comparing_all_pairs_finds():
    draw = random.Random(0)
    hashes = [draw.getrandbits(64) for _ in range(300)]
    for value in hashes[:100]:  # neighbours at every distance up to 6 bits
        for bits in range(7):
            hashes.append(value ^ sum(1 << bit for bit in draw.sample(range(64), bits)))
    index = NearIndex(hashes)
    found = 0
    for value in hashes[:400]:
        near = [n for n, other in enumerate(hashes) if (value ^ other).bit_count() <= DISTANCE]
        assert index.near(value) == near
        found += len(near)
    assert found > 900 and NearIndex([]).near(5) == []


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("images/coco/train2017/000000001234.jpg", "images/coco/train2014/COCO_train2014_000000001234.jpg", True),
        ("images/gqa/images/2354786.jpg", "images/vg/VG_100K_2/2354786.jpg", True),
        ("images/gqa/images/77.jpg", "images/coco/val2017/000000000042.jpg", True),
        ("images/textvqa/train_images/0054c91397f2fe05.jpg", "images/textcaps/0054c91397f2fe05.png", True),
        ("images/gqa/images/1.jpg", "images/chartqa/1.png", False),
        ("images/chartqa/train/png/1.png", "images/chartqa/val/png/1.png", False),
        ("images/scienceqa/1/image.png", "images/scienceqa/2/image.png", False),
        ("images/chartqa/png/1.png", "images/chartqa/png/1.jpg", True),
        ("images/vist/images/train/695160.jpg", "images/vist/images/test/695160.jpg", True),
        ("images/coco/train2017/42.jpg", "images/coco/val2014/42.jpg", True),
        ("images/coco/train2017/000000001234.jpg", "images/coco/train2017/000000001235.jpg", False),
    ],
)
def test_the_same_picture_under_two_names(left, right, same):
    coco_of = {"77": "000000000042"}
    assert (picture_key(left, coco_of) == picture_key(right, coco_of)) is same


def test_hashing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    names = [picture(tmp_path / f"{n}.png", n).name for n in range(6)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    first = hash_pictures(tmp_path, [*names, "broken.png"], 1)
    assert first["broken.png"] == "truncated_image" and len({*first.values()}) == 7
    cache = tmp_path / CACHE
    made_by, *lines = cache.read_text().splitlines(keepends=True)
    cache.write_text(made_by + "".join(lines[:4]) + lines[4][:9])  # stopped while it wrote the fifth
    seen = []
    monkeypatch.setattr("llava_collab.cmt.public.duplicates._work", lambda task: (seen.append(task[1]), (task[1], first[task[1]]))[1])
    assert hash_pictures(tmp_path, [*names, "broken.png"], 1) == first and len(seen) == 3
    picture(tmp_path / names[0], 99)  # another picture under the same name
    hash_pictures(tmp_path, names, 1)
    assert seen[3:] == [names[0]]
    for content in (cache.read_text().replace(PIL.__version__, "1.0", 1), ""):  # another decoder's hashes; a cache without any line
        cache.write_text(content)
        seen.clear()
        hash_pictures(tmp_path, names, 1)
        assert seen == names


def test_a_killed_worker_is_an_error_and_no_wait(tmp_path, monkeypatch):
    names = [f"{n}.png" for n in range(64)]  # fewer are hashed without processes
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr("llava_collab.cmt.public.duplicates._work", die)
    with pytest.raises(SourceError, match="killed.*run again with --workers 1"):
        hash_pictures(tmp_path, names, 2)


def test_what_could_not_be_read_once_is_read_again(tmp_path, monkeypatch):
    name = picture(tmp_path / "a.png", 0).name
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", Mock(side_effect=OSError(5, "Input/output error")))
        assert hash_pictures(tmp_path, [name], 1) == {name: "truncated_image"}
    assert isinstance(hash_pictures(tmp_path, [name], 1)[name], int)


# --- splits and quotas ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(home: Path) -> Path:
    """COCO pictures 1..60 with two questions each, captions of them, statements about them; and four copies under other names."""
    coco(home, *range(1, 61))
    vqav2(home, [(image * 10 + n, image) for image in range(1, 61) for n in range(2)])
    said = [{"image_id": image, "id": image * 10 + n, "caption": f"Picture {image}, {n}."} for image in range(1, 61) for n in range(5)]
    put(home, "coco/annotations/captions_train2017.json", {"annotations": said})
    lines = [{"image": f"{image:012d}.jpg", "caption": f"The cat is near dog {image}.", "label": image % 2} for image in range(1, 61)]
    put(home, "vsr/data/splits/random/train.jsonl", lines)
    for image in range(1, 61):  # the same pictures, smaller and saved again, under names of their own
        (home / "copies").mkdir(exist_ok=True)
        Image.open(home / f"coco/train2017/{image:012d}.jpg").resize((48, 36)).save(home / f"copies/{image}.jpg", quality=80)
    put(home, "copies/train.json", [llava_record(str(image), f"{image}.jpg", f"A long text {image}.") for image in range(1, 61)])
    entry = {"name": "copies", "format": "llava", "path": "copies/train.json", "category": "Detailed Description"}
    (home / "sources.yaml").write_text(yaml.safe_dump({"sources": [entry]}))
    return home


def pictures_of(rows: Rows) -> set[int]:
    return {int(Path(image).stem) for row in rows.values() for image in row["image"]}


def test_no_picture_and_no_copy_of_it_is_in_both_splits(shared, tmp_path):
    manifest, rows = build(shared, tmp_path / "out", test=70)
    assert len(rows["test"]) == 4 * 10 and rows["train"]
    assert not pictures_of(rows["test"]) & pictures_of(rows["train"])
    assert manifest["not_in_train"]["picture in test"] > 0 and manifest["not_in_train"]["near duplicate in test"] > 0
    for category in {row["category"] for row in rows["test"].values()}:
        images = [row["image"][0] for row in rows["test"].values() if row["category"] == category]
        assert len(set(images)) == len(images) == 10, "test entries of a category have pictures of their own"


def test_test_has_no_picture_of_the_llava_mix_and_train_may(shared, tmp_path):
    mix = [llava_record(str(n), f"coco/train2017/{n:012d}.jpg") for n in range(1, 31)] + [{"id": "t", "conversations": []}]
    put(shared, "llava/llava_v1_5_mix665k.json", mix)
    manifest, rows = build(shared, tmp_path / "out", test=70)
    assert rows["test"] and min(pictures_of(rows["test"])) > 30, "copies have other names: only their pixels tell"
    assert min(pictures_of(rows["train"])) <= 30
    assert manifest["not_in_test"] == {"near duplicate in the LLaVA mix": 30, "picture in the LLaVA mix": 30 * 4}
    other = put(tmp_path, "other.json", mix[:3])
    manifest, _ = build(shared, tmp_path / "out", test=70, llava=[other])
    assert manifest["llava_mix"]["pictures"] == 3 and "NOT checked" not in summary(manifest)


def test_counts_are_scaled_to_what_is_there_and_said_so(shared, tmp_path):
    manifest, rows = build(shared, tmp_path / "out", train=140, test=21)
    assert len(rows["train"]) == 140 * 4 // 7 and len(rows["test"]) == 3 * 4
    train = manifest["splits"]["train"]["categories"]
    assert train["Visual QA"] == pytest.approx(2 * train["Visual Captioning"], abs=2), "in proportion to what is there"
    text = summary(manifest)
    assert "train is scaled down: 80 of 140" in text and "test is scaled down: 12 of 21" in text and "NOT checked" in text
    assert "missing: vist (Visual Storytelling)" in text and "visionandlanguage.net" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "scaled down" in card and "| vist | missing |" in card and not manifest["complete"]


def test_published_validation_data_is_tested_on_first_and_never_trained_on(home, tmp_path):
    coco(home, *range(1, 41))
    vqav2(home, [(image, image) for image in range(1, 31)])
    vqav2(home, [(image, image) for image in range(31, 41)], "val2014")
    manifest, rows = build(home, tmp_path / "out", test=7 * 5)
    assert len(rows["test"]) == 5 and min(pictures_of(rows["test"])) > 30
    assert pictures_of(rows["train"]) == set(range(1, 31)) and manifest["not_in_train"]["published for evaluation"] == 5


def test_apportion_adds_up_and_never_asks_for_more_than_there_is():
    sizes = {("a", "x"): 700, ("a", "y"): 299, ("b", "z"): 1}
    for total in (0, 1, 7, 333, 999, 1000, 5000):
        shares = apportion(total, sizes)
        assert sum(shares.values()) == min(total, 1000) and all(shares[cell] <= size for cell, size in sizes.items())
    assert apportion(100, sizes) == {("a", "x"): 70, ("a", "y"): 30, ("b", "z"): 0}


def test_the_seed_and_the_ids_alone_decide(shared, tmp_path):
    manifest, rows = build(shared, tmp_path / "one", train=100, test=21)
    records = list(iter_records(shared / "copies/train.json"))
    put(shared, "copies/train.json", records[::-1])
    reversed_manifest, again = build(shared, tmp_path / "two", train=100, test=21)
    assert again == rows and reversed_manifest["splits"] == manifest["splits"], "the order of a file decides nothing"
    _, other = build(shared, tmp_path / "one", train=100, test=21, seed=1)
    assert set(other["test"]) != set(rows["test"])


@pytest.mark.slow
def test_the_manifest_is_the_same_in_any_surroundings(shared, tmp_path, monkeypatch):
    """Bytes of manifest, card and rows, over hash seed, time zone, locale, folder for temporary files, and number of processes."""
    made = []
    for n, (zone, locale, workers) in enumerate((("UTC", "C", 1), ("Pacific/Auckland", "tr_TR.UTF-8", 2))):
        (tmp_path / f"t{n}").mkdir()
        for key, value in (("PYTHONHASHSEED", str(n)), ("TZ", zone), ("LC_ALL", locale), ("TMPDIR", str(tmp_path / f"t{n}"))):
            monkeypatch.setenv(key, value)
        out = tmp_path / f"out{n}"
        done = run_apart(
            ["-m", "llava_collab.cli", "data", "build", "cmt-public", "--sources", str(shared), "--out", str(out)]
            + ["--train", "100", "--test", "21", "--workers", str(workers)]
        )
        assert done.returncode == 0, done.stderr
        made.append([(out / name).read_bytes() for name in ("manifest.json", "README.md", "train.jsonl", "test.jsonl")])
    assert made[0] == made[1]


def test_the_suite_reads_what_was_built_and_can_score_it(shared, tmp_path):
    build(shared, tmp_path / "out", test=21)
    suite = load_suite(ROOT / "eval" / "suites" / "cmt-public.yaml")
    train, test = suite.read("train", tmp_path / "out"), suite.read("test", tmp_path / "out")
    scorer = suite.scorer(train, test)
    scorer.check(test)
    assert all(image.is_file() for sample in (*train, *test) for image in sample.images)
    perfect = {sample.category: scorer.score(sample.answers[0], sample) for sample in test}
    assert perfect["Visual QA"].metric == "vqa_soft" and perfect["Spatial Inference"].score == 100
    assert set(perfect) <= set(CATEGORIES)


# --- the real sets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_nine_real_sets_make_a_benchmark(tmp_path):
    """LLaVA JSONL of real photographs, charts, receipts and picture books, all through the `llava` reader."""
    if not os.environ.get(ROOT_VARIABLE):
        pytest.skip(f"set {ROOT_VARIABLE} to the folder of the real sets")
    root, home = real_root(), tmp_path / "sources"
    home.mkdir()
    entries = []
    for name, real in REAL_SETS.items():
        (home / name).symlink_to(root / name)
        first, *rest = real.items
        entries.append(
            {"name": name, "format": "llava", "path": f"{name}/{first}.jsonl", "held": [f"{name}/{split}.jsonl" for split in rest]}
        )
    (home / "sources.yaml").write_text(yaml.safe_dump({"sources": entries}))
    manifest, rows = build(home, tmp_path / "out", train=7000, test=700, workers=2)
    assert all(manifest["splits"]["test"]["categories"][name] for name in CATEGORIES)
    assert sum(source["entries"] + sum(source["skipped"].values()) for source in manifest["sources"]) == sum(
        sum(real.items.values()) for real in REAL_SETS.values()
    )
    images = {split: {image for row in found.values() for image in row["image"]} for split, found in rows.items()}
    assert not images["train"] & images["test"]
