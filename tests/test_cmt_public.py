"""CMT-public: every reader on a hand-made file of the published form, and bad input."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from public_files import all_rows, build, coco, llava_record, picture, put, vqav2

from llava_collab.cli import main
from llava_collab.cmt.public.card import summary
from llava_collab.cmt.public.entries import SourceError
from llava_collab.cmt.public.readers import SHORT
from llava_collab.data.samples import read_samples
from llava_collab.files import write_chunks

pytest.importorskip("ijson", reason="reading annotation files needs ijson: pip install 'llava_collab[public]'")


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
    assert {file.read_bytes() for file in unpacked} == {Path(file).read_bytes() for file in files} and len(unpacked) == 3
    put(home, "sources.yaml", {"sources": [entry]})
    with pytest.raises(SourceError, match="no column .*answers.*img"):
        build(home, tmp_path / "out")


def save_chartqa(home: Path, images: list[Any], answers: list[Any], kind: Any = None) -> None:
    """A saved dataset whose pictures are paths (or of the feature `kind`), and its entry in sources.yaml."""
    datasets = pytest.importorskip("datasets", reason="reading saved datasets needs datasets: pip install 'llava_collab[public]'")
    columns = {"image": images, "question": ["What?"] * len(images), "answers": answers}
    table = datasets.Dataset.from_dict(columns)
    (table.cast_column("image", kind) if kind else table).save_to_disk(str(home / "chartqa"))
    entry = {"name": "chartqa", "format": "datasets", "path": "chartqa", "images": "pictures", "category": "Text-Rich Images QA"}
    put(home, "sources.yaml", {"sources": [entry]})


def test_equal_names_in_two_folders_are_two_entries(home, tmp_path):
    images = ["train/1.png", "val/1.png"]
    for seed, image in enumerate(images):
        picture(home / "pictures" / image, seed)
    save_chartqa(home, images, [["4"], ["4"]])
    assert sorted(row["image"][0] for row in all_rows(home, tmp_path / "out").values()) == [f"images/pictures/{image}" for image in images]


def test_of_entries_said_twice_the_first_is_written(home, tmp_path):
    """What a LLaVA record holds besides its turns is not in its id."""
    coco(home, 1)
    records = [llava_record("1", "000000000001.jpg") | {"choices": [name]} for name in ("first", "second")]
    put(home, "llava/detail_23k.json", records)
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert [row["choices"] for row in rows["train"].values()] == [["first"]] and manifest["sources"][0]["skipped"] == {"duplicate": 1}


def test_the_manifest_has_the_digest_of_the_rows_and_a_stopped_write_leaves_the_old_file(home, tmp_path):
    coco(home, 1)
    vqav2(home, [(1, 1), (2, 1)])
    manifest, _ = build(home, tmp_path / "out", test=0)
    train = tmp_path / "out/train.jsonl"
    assert manifest["splits"]["train"]["sha256"] == hashlib.sha256(train.read_bytes()).hexdigest()
    before = sorted(train.parent.iterdir()), train.read_bytes()

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_chunks(train, chunks())
    assert (sorted(train.parent.iterdir()), train.read_bytes()) == before


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


@pytest.mark.parametrize("inside", [True, False])
def test_a_saved_dataset_without_a_picture_and_with_a_huge_one(home, tmp_path, monkeypatch, inside):
    datasets = pytest.importorskip("datasets", reason="reading saved datasets needs datasets: pip install 'llava_collab[public]'")
    for n, size in enumerate(((64, 48), (400, 300))):
        picture(home / f"pictures/{n}.png", n, size)
    images = ["0.png", None, "1.png"]
    if inside:
        images = [name and {"bytes": (home / "pictures" / name).read_bytes(), "path": None} for name in images]
    save_chartqa(home, images, [["4"], ["5"], ["6"]], datasets.Image() if inside else None)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)  # Pillow refuses twice as many
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert [row["answers"] for row in rows["train"].values()] == [["4"]]
    assert manifest["sources"][0]["skipped"] == {"no_image": 1}
    assert manifest["pictures"]["unreadable"] == {"image_too_large": 1}


def test_a_picture_that_was_not_saved_inside_names_the_entry(home, tmp_path, monkeypatch):
    save_chartqa(home, ["a.png"], [["4"]])
    row = {"image": {"bytes": None, "path": "elsewhere.png"}, "question": "What?", "answers": ["4"]}
    monkeypatch.setattr("llava_collab.cmt.public.readers.saved_rows", lambda part: iter([(row, False)]))
    with pytest.raises(SourceError, match=r"chartqa, entry 1: picture 'elsewhere.png' was not saved inside"):
        build(home, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vqav2/v2_mscoco_train2014_annotations.json", {"annotations": [{"question_id": 1}]}),
        ("coco/annotations/captions_train2017.json", {"annotations": [{"image_id": 1}]}),
        ("vist/sis/train.story-in-sequence.json", {"annotations": [[{"album_id": "1"}]]}),
        ("textvqa/TextVQA_Rosetta_OCR_v0.2_train.json", {"data": [{"image_id": "1"}]}),
    ],
)
def test_a_wrong_entry_of_a_file_that_is_joined_names_file_and_entry(home, tmp_path, name, content):
    coco(home, 1)
    vqav2(home, [(1, 1)])
    put(home, "textvqa/TextVQA_0.5.1_train.json", {"data": []})
    path = put(home, name, content)
    with pytest.raises(SourceError, match="entry 1: lacks the key") as error:
        build(home, tmp_path / "out")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("place", ["id", "value", "choices"])
def test_half_a_surrogate_pair_is_left_out_and_counted(home, tmp_path, place):
    coco(home, 1, 2)
    bad: dict[str, Any] = llava_record("1", "000000000001.jpg") | {"choices": ["x"]}
    half = json.loads(r'"cut \ud83d"')
    match place:
        case "id":
            bad["id"] = half
        case "value":
            bad["conversations"][1]["value"] = half
        case _:
            bad["choices"] = [half]
    put(home, "llava/detail_23k.json", [bad, llava_record("2", "000000000002.jpg")])
    manifest, rows = build(home, tmp_path / "out", test=0)
    assert [row["image"] for row in rows["train"].values()] == [["images/coco/train2017/000000000002.jpg"]]
    assert manifest["sources"][0]["skipped"] == {"not_utf8": 1}
    assert manifest["sources"][0]["examples"] == {"not_utf8": ["detail_23k.json, entry 1"]}


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
