"""CMT-public: every reader on a hand-made file of the published form, splits by picture, quotas, determinism, bad input."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from running import ROOT, run_apart

from llava_collab.cli import main
from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public import build_public
from llava_collab.cmt.public.card import summary
from llava_collab.cmt.public.choose import apportion
from llava_collab.cmt.public.duplicates import CACHE, DISTANCE, NearIndex, hash_pictures, perceptual_hash
from llava_collab.cmt.public.entries import SourceError, picture_key
from llava_collab.cmt.public.readers import SHORT
from llava_collab.data.real import REAL_SETS, ROOT_VARIABLE, real_root
from llava_collab.data.samples import iter_records, read_samples
from llava_collab.evaluation.suite import load_suite

pytest.importorskip("ijson", reason="reading annotation files needs ijson: pip install 'llava_collab[public]'")

Rows = dict[str, dict[str, Any]]


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A smooth random picture: no two seeds look alike, and it survives scaling."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def put(folder: Path, name: str, content: Any) -> Path:
    """A JSON file (JSONL by its name)."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(lines, encoding="utf-8")
    return path


def coco(folder: Path, *numbers: int) -> None:
    for number in numbers:
        picture(folder / f"coco/train2017/{number:012d}.jpg", number)


def vqav2(folder: Path, items: list[tuple[int, int]], split: str = "train2014") -> None:
    """(question id, image id) pairs as VQA v2 publishes them."""
    questions = [{"image_id": image, "question": f"What is in {name}?", "question_id": name} for name, image in items]
    people = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "mesh", ""]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "net",
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(people, 1)],
            "image_id": image,
            "answer_type": "other",
            "question_id": name,
        }
        for name, image in items
    ]
    head = {"info": {"version": "2.0"}, "license": {"name": "CC BY"}, "data_subtype": split}
    put(folder, f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", head | {"task_type": "Open-Ended", "questions": questions})
    put(folder, f"vqav2/v2_mscoco_{split}_annotations.json", head | {"annotations": annotations[::-1]})


def build(folder: Path, out: Path, **sizes: Any) -> tuple[dict[str, Any], dict[str, Rows]]:
    manifest = build_public(folder, out, **{"workers": 1, "train": 10_000, "test": 70} | sizes)
    return manifest, {split: {row["id"]: row for row in map(json.loads, (out / f"{split}.jsonl").open())} for split in ("train", "test")}


def all_rows(folder: Path, out: Path, **sizes: Any) -> Rows:
    _, rows = build(folder, out, **{"test": 0} | sizes)
    return rows["train"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "sources").mkdir()
    return tmp_path / "sources"


# --- readers: one file of each published form -------------------------------------------------------------------------------------


def test_vqav2_joins_two_files_and_keeps_ten_people(home, tmp_path):
    coco(home, 458752)
    picture(home / "coco/val2014/COCO_val2014_000000262148.jpg", 1)
    vqav2(home, [(458752000, 458752), (262148000, 262148)])
    rows = all_rows(home, tmp_path / "out")
    row = rows["vqav2/458752000"]
    assert row["image"] == ["images/coco/train2017/000000458752.jpg"], "COCO's pictures of 2014 are those of 2017"
    assert rows["vqav2/262148000"]["image"] == ["images/coco/val2014/COCO_val2014_000000262148.jpg"]
    assert row["conversations"][0] == {"from": "human", "value": f"<image>\nWhat is in 458752000?\n{SHORT}"}
    assert row["conversations"][1]["value"] == "net" and row["answers"] == ["net", "mesh", "netting"]
    assert len(row["human_answers"]) == 9 and Counter(row["human_answers"])["net"] == 6, "an empty answer isn't a person's vote"
    assert row["category"] == "Visual QA" and row["family"] == "vqav2" and row["split"] == "train"


def test_gqa_sends_questions_about_places_to_spatial_inference(home, tmp_path):
    def question(semantic: str, argument: str, **more: Any) -> dict[str, Any]:
        program = [{"operation": "select", "dependencies": [], "argument": "table (1)"}]
        program += [{"operation": "relate", "dependencies": [0], "argument": argument}]
        types = {"structural": "query", "semantic": semantic, "detailed": "relS"}
        return {
            "imageId": "2354786",
            "question": "What is it?",
            "answer": "cup",
            "types": types,
            "semantic": program,
            "isBalanced": True,
        } | more

    picture(home / "gqa/images/2354786.jpg", 0)
    questions = {
        "02930152": question("rel", "cup,to the left of,s (2)"),
        "02930153": question("rel", "shirt,wearing,o (3)"),
        "02930154": question("attr", "cup,to the left of,s (2)"),
    }
    questions["02930155"] = question("rel", "-") | {
        "semantic": [{"operation": "choose rel", "argument": "cup,to the left of|to the right of,s (2)"}]
    }
    put(home, "gqa/train_balanced_questions.json", questions)
    families = {name.split("/")[1]: (row["family"], row["category"]) for name, row in all_rows(home, tmp_path / "out").items()}
    spatial, plain = ("gqa_spatial", "Spatial Inference"), ("gqa", "Visual QA")
    assert families == {"02930152": spatial, "02930153": plain, "02930154": plain, "02930155": spatial}


def test_coco_captions_are_one_entry_a_picture_with_five_references(home, tmp_path):
    coco(home, 391895)
    said = [{"image_id": 391895, "id": 9 - n, "caption": f"Caption {n}  of a man.\n"} for n in range(5)]
    put(home, "coco/annotations/captions_train2017.json", {"info": {}, "licenses": [], "images": [{"id": 391895}], "annotations": said})
    (row,) = all_rows(home, tmp_path / "out").values()
    assert row["answers"] == [f"Caption {n} of a man." for n in (4, 3, 2, 1, 0)], "in the order of their ids, spacing tidied"
    assert row["conversations"][1]["value"] == row["answers"][0] and row["category"] == "Visual Captioning"


def test_vsr_reads_labels_and_counts_repeated_lines(home, tmp_path):
    coco(home, 451431)
    line = {"image": "000000451431.jpg", "caption": "The person is inside the refrigerator.", "label": 1, "relation": "inside"}
    lines = [line, line, {**line, "caption": "The person is above the refrigerator.", "label": 0}]
    put(home, "vsr/data/splits/random/train.jsonl", lines)
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert sorted(row["answers"][0] for row in rows["train"].values()) == ["False", "True"]
    assert manifest["sources"][0]["skipped"] == {"duplicate": 1}


def test_vist_puts_five_photos_in_the_workers_order(home, tmp_path):
    def photo(story: str, place: int, image: int) -> list[dict[str, Any]]:
        fields = {"album_id": "44277", "photo_flickr_id": str(image), "setting": "first-2-pick-and-tell", "story_id": story}
        return [fields | {"worker_arranged_photo_order": place, "original_text": f"Sentence {place}.", "text": f"sentence {place} ."}]

    for number in range(1741640, 1741645):
        picture(home / f"vist/images/train/{number}.png", number)
    photos = [photo("30355", n, 1741640 + n) for n in (3, 0, 4, 1, 2)] + [photo("30356", n, 1741640 + n) for n in range(4)]
    put(home, "vist/sis/train.story-in-sequence.json", {"images": [], "albums": [], "type": "sis", "annotations": photos})
    manifest, rows = build(home, tmp_path / "out", test=0)
    (row,) = rows["train"].values()
    assert row["answers"] == ["Sentence 0. Sentence 1. Sentence 2. Sentence 3. Sentence 4."]
    assert [Path(image).stem for image in row["image"]] == [str(n) for n in range(1741640, 1741645)]
    assert row["conversations"][0]["value"].count("<image>") == 5 and manifest["sources"][0]["skipped"] == {"not_five_photos": 1}
    (sample,) = read_samples(tmp_path / "out" / "train.jsonl")
    assert sample.category == "Visual Storytelling" and len(sample.images) == 5


def test_textvqa_keeps_ocr_tokens_out_of_the_prompt(home, tmp_path):
    picture(home / "textvqa/train_images/0054c91397f2fe05.jpg", 0)
    answers = ["dakota", "nous les gosses", "dakota", "dakota digital", *["dakota"] * 6]
    entry = {"question": "what is the brand?", "image_id": "0054c91397f2fe05", "question_id": 0, "answers": answers, "set_name": "train"}
    put(home, "textvqa/TextVQA_0.5.1_train.json", {"dataset_type": "train", "dataset_version": "0.5.1", "data": [entry]})
    tokens = {"image_id": "0054c91397f2fe05", "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []}
    put(home, "textvqa/TextVQA_Rosetta_OCR_v0.2_train.json", {"data": [tokens]})
    (row,) = all_rows(home, tmp_path / "out").values()
    assert row["ocr_tokens"] == ["DAKOTA", "DIGITAL"] and "DAKOTA" not in row["conversations"][0]["value"]
    assert len(row["human_answers"]) == 10 and row["answers"][0] == "dakota" and row["category"] == "Knowledge OCR"


def test_docvqa_keeps_all_answers_and_pages_of_a_document_together(home, tmp_path):
    entries = []
    for n in range(20):
        picture(home / f"docvqa/documents/xnbl0037_{n}.png", n)
        document = "xnbl0037" if n < 10 else f"only{n}"
        image = {"image": f"documents/xnbl0037_{n}.png", "ucsf_document_id": document, "ucsf_document_page_no": str(n), "docId": n}
        entries.append({"questionId": n, "question": "what is the date?", "answers": ["1/8/93", "1/8/93", "8 Jan"], **image})
    put(home, "docvqa/train_v1.0_withQT.json", {"dataset_name": "docvqa", "dataset_split": "train", "data": entries})
    _, rows = build(home, tmp_path / "out", test=7 * 4)
    pages = {split: {int(name.split("/")[1]) for name in found} for split, found in rows.items()}
    assert len(pages["test"]) == 4 and all(row["answers"] == ["1/8/93", "8 Jan"] for row in rows["test"].values())
    assert not (min(pages["test"]) < 10 and min(pages["train"]) < 10), "pages of one document in both splits"


def llava_record(name: str, image: str, answer: str = "A man.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def test_llava_json_with_the_layout_of_detail_23k(home, tmp_path):
    coco(home, 442786)
    turns = [{"from": "human", "value": "More?"}, {"from": "gpt", "value": "No more."}]
    records = [llava_record("000000442786", "000000442786.jpg"), llava_record("000000442786", "000000442786.jpg", "A woman.")]
    records[1]["conversations"] += turns
    records.append({"id": "text", "conversations": turns})
    records.append(llava_record("empty", "000000442786.jpg", " "))
    put(home, "llava/detail_23k.json", records)
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert len(rows["train"]) == 2, "LLaVA's ids are those of pictures and come more than once"
    assert sorted(len(row["conversations"]) for row in rows["train"].values()) == [2, 4]
    assert manifest["sources"][0]["skipped"] == {"empty_answer": 1, "no_image": 1}
    assert all(row["image"] == ["images/coco/train2017/000000442786.jpg"] for row in rows["train"].values())


def test_extra_sources_come_from_sources_yaml(home, tmp_path):
    picture(home / "mine/pictures/a.png", 0)
    put(home, "mine/train.json", [llava_record("1", "pictures/a.png") | {"choices": ["x", "y"]}])
    sources = [{"name": "mine", "format": "llava", "path": "mine/train.json", "category": "Text-Rich Images QA"}]
    (home / "sources.yaml").write_text(yaml.safe_dump({"sources": sources}))
    (row,) = all_rows(home, tmp_path / "out").values()
    assert row["category"] == "Text-Rich Images QA" and row["family"] == "mine" and row["choices"] == ["x", "y"]
    for change, message in (
        ({"category": "VQA"}, "none of Visual QA"),
        ({"format": "csv"}, "neither llava nor datasets"),
        ({"path": "mine/val.json"}, "val.json is missing"),
        ({"name": "gqa"}, "taken"),
        ({"paths": 1}, "unknown key"),
    ):
        (home / "sources.yaml").write_text(yaml.safe_dump({"sources": [sources[0] | change]}))
        with pytest.raises(SourceError, match=message):
            build(home, tmp_path / "out")


def test_a_saved_dataset_is_read_and_its_pictures_unpacked_once(home, tmp_path):
    datasets = pytest.importorskip("datasets", reason="reading saved datasets needs datasets: pip install 'llava_collab[public]'")
    files = [str(picture(tmp_path / f"{n}.png", n)) for n in range(3)]
    columns = {"img": [*files, files[0]], "query": ["What?", "Which?", "Who?", "Where?"], "label": [["4", "four"], ["5"], ["6"], [""]]}
    table = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(str(home / "chartqa"))
    entry = {"name": "chartqa", "format": "datasets", "path": "chartqa", "category": "Text-Rich Images QA"}
    put(home, "sources.yaml", {"sources": [entry | {"columns": {"image": "img", "question": "query", "answers": "label"}}]})
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert sorted(row["answers"] for row in rows["train"].values()) == [["4", "four"], ["6"]], "the test split's entry stays out of train"
    assert manifest["sources"][0]["skipped"] == {"duplicate": 1, "empty_answer": 1}
    unpacked = sorted((tmp_path / "out/unpacked/chartqa").iterdir())
    assert [file.read_bytes() for file in unpacked] == sorted((Path(f).read_bytes() for f in files), key=lambda b: unpacked_name(b))
    put(home, "sources.yaml", {"sources": [entry]})
    with pytest.raises(SourceError, match="no column .*answers.*img"):
        build(home, tmp_path / "out")


def unpacked_name(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


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
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:4]) + lines[4][:9])  # stopped while it wrote the fifth
    seen = []
    monkeypatch.setattr("llava_collab.cmt.public.duplicates._work", lambda task: (seen.append(task[1]), (task[1], first[task[1]]))[1])
    assert hash_pictures(tmp_path, [*names, "broken.png"], 1) == first and len(seen) == 3
    picture(tmp_path / names[0], 99)  # another picture under the same name
    hash_pictures(tmp_path, names, 1)
    assert seen[3:] == [names[0]]


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


# --- bad input --------------------------------------------------------------------------------------------------------------------


def test_a_truncated_file_names_the_place(home, tmp_path):
    coco(home, 1)
    vqav2(home, [(1, 1), (2, 1), (3, 1)])
    path = home / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(path.read_text()[:-60])
    with pytest.raises(SourceError, match=r"train2014_questions.json is cut off .* fetch it again"):
        build(home, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("question"), "entry 1: lacks the key 'question'"),
        (lambda q: q.update(question_id=9), "question 9 has no annotation in v2_mscoco_train2014_annotations.json"),
        (lambda q: q.update(question=None), "expected a list of texts"),
        (lambda q: q.update(image_id="x"), "invalid literal"),
        (lambda q: q.update(question_id=2), "id 2 comes twice in vqav2"),
    ],
)
def test_a_wrong_entry_names_file_entry_and_source(home, tmp_path, change, message):
    coco(home, 1)
    vqav2(home, [(1, 1), (2, 1)])
    path = home / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json"
    content = json.loads(path.read_text())
    change(content["questions"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=message) as error:
        build(home, tmp_path / "out")
    assert str(path) in str(error.value) and "visualqa.org" in str(error.value)


def test_another_file_under_the_name_is_refused(home, tmp_path):
    coco(home, 1)
    vqav2(home, [(1, 1)])
    put(home, "vqav2/v2_OpenEnded_mscoco_train2014_questions.json", [{"question": "an array"}])
    with pytest.raises(SourceError, match="no entries found; is it vqav2's file as published"):
        build(home, tmp_path / "out")


def test_missing_companions_pictures_and_sources(home, tmp_path):
    with pytest.raises(SourceError, match="holds none of the known sources"):
        build(home, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(home / "nowhere", tmp_path / "out")
    vqav2(home, [(1, 1), (2, 2)])
    with pytest.raises(SourceError, match="none of its pictures is there.*coco/train2017"):
        build(home, tmp_path / "out")
    coco(home, 1)
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert list(rows["train"]) == ["vqav2/1"] and manifest["sources"][0]["skipped"] == {"missing_image": 1}
    assert "000000000002.jpg" in summary(manifest)
    (home / "vqav2/v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(SourceError, match="annotations.json is missing; get it from visualqa.org"):
        build(home, tmp_path / "out")


def test_broken_pictures_are_counted_and_paths_stay_below_the_sources(home, tmp_path):
    coco(home, 1, 2)
    vqav2(home, [(1, 1), (2, 2)])
    (home / "coco/train2017/000000000002.jpg").write_bytes(b"no picture")
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert list(rows["train"]) == ["vqav2/1"] and manifest["pictures"]["unreadable"] == {"truncated_image": 1}
    put(home, "llava/detail_23k.json", [llava_record("1", "../../../secret.jpg")])
    with pytest.raises(SourceError, match="not below the sources folder"):
        build(home, tmp_path / "out")


def test_the_verb_builds_and_says_errors_in_one_line(home, tmp_path, capsys):
    coco(home, *range(1, 11))
    vqav2(home, [(n, n) for n in range(1, 11)])
    command = ["data", "build", "cmt-public", "--sources", str(home), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0 and "train is scaled down" in capsys.readouterr().out
    assert os.readlink(tmp_path / "out" / "images") == str(home)
    (tmp_path / "out" / "images").unlink()
    (tmp_path / "out" / "images").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "choose another --out" in capsys.readouterr().err


def test_without_ijson_the_error_names_the_pip_line(home, tmp_path, monkeypatch):
    coco(home, 1)
    vqav2(home, [(1, 1)])
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(SourceError, match=r"pip install 'llava_collab\[public\]'"):
        build(home, tmp_path / "out")


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
