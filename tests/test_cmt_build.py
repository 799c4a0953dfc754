"""The build of CMT-open from a miniature of the assets: splits apart, same bytes every time, resumable, answers that fit the pictures."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_cmt_sources import make_assets

from llava_collab.cmt import CATEGORIES, SPLITS, build_cmt, contact_sheet, write_shards
from llava_collab.cmt import build as build_module
from llava_collab.cmt import draw as draw_module
from llava_collab.cmt.build import _pixels
from llava_collab.cmt.families import BY_NAME
from llava_collab.cmt.items import pool_of
from llava_collab.cmt.sources import read_world

SIZES = dict(train=140, val=21, test=42, decision=21, test_object=42, test_template=21)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return read_world(make_assets(tmp_path_factory.mktemp("assets")))


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    return build_cmt(tmp_path_factory.mktemp("cmt"), **SIZES, workers=1, world=world)


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf8").splitlines()]


def every_row(folder: Path) -> list[dict]:
    return [row for split in SPLITS for row in rows_of(folder, split)]


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sizes_and_even_spread_over_categories(built):
    for split in SPLITS:
        rows = rows_of(built, split)
        counts = Counter(row["category"] for row in rows)
        assert len(rows) == SIZES[split.replace("-", "_")]
        assert set(counts) == set(CATEGORIES) and max(counts.values()) - min(counts.values()) <= 1
        assert [row["category"] for row in rows[:7]] == list(CATEGORIES), "any first part of a file must hold all categories"


def test_rows_are_well_formed_and_images_exist(built):
    rows = every_row(built)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        human, gpt = row["conversations"]
        assert human["value"].count("<image>") == len(row["image"]) >= 1
        assert gpt["value"] == row["answers"][0] != "" and len(set(row["answers"])) == len(row["answers"])
        assert all((built / name).is_file() for name in row["image"])
        assert len(human["value"].replace("<image>", "").split()) <= 45 and len(gpt["value"].split()) <= 60
    sizes = {Image.open(built / name).size for row in rows for name in row["image"]}
    assert sizes == {(224, 224)}


def test_no_picture_is_shared_between_splits(built):
    """By decoded pixels: file names hold the split's name anyway."""
    owners: dict[str, set[str]] = {}
    for part in (built / "parts").glob("*.jsonl"):
        for line in part.read_text(encoding="utf8").splitlines()[1:]:
            for drawn in json.loads(line)["images"].values():
                owners.setdefault(drawn["pixels"], set()).add(part.name.split("--")[0])
    assert len(owners) > 100 and all(len(splits) == 1 for splits in owners.values())


def test_train_shares_pictures_and_tests_do_not(built):
    train, test = rows_of(built, "train"), rows_of(built, "test")
    assert len({name for row in train for name in row["image"]}) < 0.6 * len(train)
    assert max(Counter(name for row in test for name in row["image"]).values()) == 1


def test_objects_of_train_and_test_object_are_disjoint(built, world):
    known = {thing.name for thing in pool_of(world, "train").things}
    new = {thing.name for thing in pool_of(world, "test-object").things}
    assert not known & new
    for category in CATEGORIES:  # a word on a receipt may name what another category shows: names are compared within a category
        seen, unseen = (
            {name for row in rows_of(built, split) if row["category"] == category for name in row["objects"]}
            for split in ("train", "test-object")
        )
        assert not seen & unseen, category
        if category.startswith(("Visual", "Spatial")):
            assert not seen & new and not unseen & known, category


def test_templates_of_test_template_are_its_own(built):
    for split in SPLITS:
        held_out = [row["template"].split("/")[1].startswith("h") for row in rows_of(built, split)]
        assert all(held_out) if split == "test-template" else not any(held_out)


def test_scorer_fields(built):
    for row in every_row(built):
        if row["category"] == "Detailed Description":
            text = row["answers"][0].lower()
            assert all((phrase in text) == (kind != "false") for kind, phrases in row["checklist"].items() for phrase in phrases)
        if row["family"] == "inventory":
            assert set(row["checklist"]) == {"objects", "attributes", "relations", "counts", "false"}
        if row["category"] == "Visual Storytelling":
            sentences = re.findall(r"[^.]+\.", row["answers"][0])
            assert len(row["image"]) == 3 and len(sentences) == len(row["beats"]) == {"story": 3}.get(row["family"], 1)
            assert all(word in sentence for beat, sentence in zip(row["beats"], sentences, strict=True) for word in beat)
        if "choices" in row:
            assert set(row["answers"]) & set(row["choices"]) and len(set(row["choices"])) == len(row["choices"])


def test_worker_count_and_sizes_do_not_change_items(built, world, tmp_path):
    more = {**SIZES, "train": 210, "test": 49}
    other = build_cmt(tmp_path / "two", **more, workers=2, world=world)
    for split in SPLITS:
        mine, theirs = ({row["id"]: row for row in rows_of(folder, split)} for folder in (built, other))
        assert all(theirs[key] == row for key, row in mine.items())
    pictures = bytes_below(built / "images")
    assert pictures == {name: data for name, data in bytes_below(other / "images").items() if name in pictures}


def test_interrupted_build_resumes_to_the_same_bytes(built, world, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(built, broken)
    part = broken / "parts" / "train--vqa.jsonl"
    text = part.read_text(encoding="utf8")
    part.write_text(text[: 2 * len(text) // 3], encoding="utf8")  # stopped in the middle of a line
    (broken / "parts" / "test--ocr.jsonl").unlink()
    damaged, gone = sorted((broken / "images/train/spatial").iterdir())[:2]
    damaged.write_bytes(damaged.read_bytes()[:10])
    gone.unlink()
    untouched = sorted((broken / "images/train/caption").iterdir())[0]
    before = untouched.stat().st_mtime_ns
    build_cmt(broken, **SIZES, workers=1, world=world)
    assert untouched.stat().st_mtime_ns == before, "a finished picture was drawn again"
    outputs = [{name: data for name, data in bytes_below(folder).items() if not name.startswith("parts/")} for folder in (built, broken)]
    assert outputs[0] == outputs[1]


def test_a_split_that_is_not_asked_for_stays(built, world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    build_cmt(copy, **{**SIZES, "val": 0, "train": 147}, workers=1, world=world)
    assert (copy / "val.jsonl").read_bytes() == (built / "val.jsonl").read_bytes()
    manifests = [json.loads((folder / "manifest.json").read_text())["splits"] for folder in (built, copy)]
    assert manifests[0]["val"] == manifests[1]["val"] and manifests[1]["train"]["items"] == 147


def test_other_sources_start_afresh(built, world, tmp_path):
    """Parts made from other source files carry another fingerprint and are not mixed in."""
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    stale = sorted((copy / "images/val/vqa").iterdir())[0]
    before = stale.stat().st_mtime_ns
    changed = type(world)(**{**vars(world), "files": {**world.files, "extra": "0" * 64}})
    build_cmt(copy, train=0, val=7, test=0, decision=0, test_object=0, test_template=0, workers=1, world=changed)
    assert stale.stat().st_mtime_ns != before


def test_manifest_and_card(built):
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf8"))
    assert manifest["splits"]["train"]["items"] == SIZES["train"] and len(manifest["content_sha256"]) == 64
    assert not set(manifest["train_backgrounds"]) & set(manifest["test_backgrounds"])
    assert manifest["licences"]["tuxpaint-stamps-default"] == "GPL-2.0"
    assert "CMT-open" in (built / "README.md").read_text(encoding="utf8")


BUILD = """
import sys
from pathlib import Path
from test_cmt_sources import make_assets
from llava_collab.cmt import build_cmt
from llava_collab.cmt.sources import read_world
if __name__ == "__main__":
    out = Path(sys.argv[1])
    sizes = dict(train=28, val=0, test=14, decision=0, test_object=7, test_template=7)
    build_cmt(out / "cmt", **sizes, workers=2, world=read_world(make_assets(out)))
"""


def test_the_content_hash_depends_on_the_items_alone(world, tmp_path):
    """Other temporary folder, time zone, locale, hash seed, worker count and asset folder: the same hash over rows and decoded pixels."""
    mine = build_cmt(tmp_path / "cmt", train=28, val=0, test=14, decision=0, test_object=7, test_template=7, workers=1, world=world)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "build.py").write_text(BUILD)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    changes = {"TMPDIR": str(tmp_path / "tmp"), "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    subprocess.run(
        [sys.executable, tmp_path / "build.py", tmp_path / "other"], check=True, env={**os.environ, **changes}, capture_output=True
    )
    hashes = [json.loads((folder / "manifest.json").read_text())["content_sha256"] for folder in (mine, tmp_path / "other" / "cmt")]
    assert hashes[0] == hashes[1]


def test_the_content_hash_covers_pixels_and_lines(built, world, tmp_path, monkeypatch):
    sizes = dict(train=0, val=0, test=14, decision=0, test_object=0, test_template=0)
    manifest = json.loads((build_cmt(tmp_path / "a", **sizes, workers=1, world=world) / "manifest.json").read_text())
    monkeypatch.setattr(draw_module, "LEAST_TEXT", draw_module.LEAST_TEXT + 30)
    other = json.loads((build_cmt(tmp_path / "b", **sizes, workers=1, world=world) / "manifest.json").read_text())
    assert other["splits"]["test"]["pixels_sha256"] != manifest["splits"]["test"]["pixels_sha256"]
    assert other["content_sha256"] != manifest["content_sha256"]
    lines = (tmp_path / "a" / "test.jsonl").read_bytes().split(b"\n")[:-1]
    image = tmp_path / "a" / json.loads(lines[0])["image"][0]
    with Image.open(image) as opened:
        Image.eval(opened.convert("RGB"), lambda level: level ^ 1).save(image, lossless=True)
    assert _pixels(io.BytesIO(image.read_bytes())) not in (tmp_path / "a" / "parts" / "test--vqa.jsonl").read_text()


def test_a_part_cut_within_a_character_is_gone_on_with(built, world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    part = copy / "parts" / "train--vqa.jsonl"
    part.write_bytes(part.read_bytes() + '{"group": 9999, "rows": "château'.encode()[:-5])
    build_cmt(copy, **SIZES, workers=1, world=world)
    assert (copy / "train.jsonl").read_bytes() == (built / "train.jsonl").read_bytes()


def test_a_changed_package_is_named(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build_module, "PUBLISHED", world.packages)
    assert build_module.changed_packages(world) == []
    files = {name: "0" * 64 if name.startswith("kalzium-data") else sha for name, sha in world.files.items()}
    changed = replace(world, files=files)
    assert build_module.changed_packages(changed) == ["kalzium-data"]
    monkeypatch.setattr(build_module, "read_world", lambda: changed)
    folder = build_cmt(tmp_path, train=0, val=7, test=0, decision=0, test_object=0, test_template=0, workers=1)
    assert "kalzium-data" in caplog.text
    assert json.loads((folder / "manifest.json").read_text())["changed_packages"] == ["kalzium-data"]


def test_shards_hold_every_item_with_its_pictures(built, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    paths = write_shards(copy, per_shard=50)
    assert [path.parent.name for path in paths] == [split for split in SPLITS if rows_of(built, split)]
    index = json.loads((copy / "shards" / "train" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [50, 50, 40]
    rows = {row["id"]: row for row in rows_of(built, "train")}
    tars = [str(copy / "shards" / "train" / f"{shard['name']}.tar") for shard in index["shards"]]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert {sample["__key__"] for sample in samples} == set(rows) and len(samples) == len(rows)
    for sample in samples:
        row, written = rows[sample["__key__"]], json.loads(sample["json"])
        pictures = [sample[name.removeprefix(f"{row['id']}.")] for name in written["image"]]
        assert pictures == [(built / file).read_bytes() for file in row["image"]]
        assert written["conversations"] == row["conversations"]


def test_bad_arguments(world, tmp_path):
    with pytest.raises(ValueError, match="workers"):
        build_cmt(tmp_path, **SIZES, workers=0, world=world)
    with pytest.raises(ValueError, match="negative"):
        build_cmt(tmp_path, **{**SIZES, "val": -1}, workers=1, world=world)


def test_contact_sheet(built, tmp_path):
    page = contact_sheet(rows_of(built, "test")[:9], tmp_path / "sheet.png", built)
    assert Image.open(page).width > 1000


def test_every_category_has_a_slug_of_its_own():
    assert len({category.slug for category in BY_NAME.values()}) == len(CATEGORIES) == 7
