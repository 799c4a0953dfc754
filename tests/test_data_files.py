"""Reading: data files, pictures of every sort and fault, LLaVA's square padding, the check of a file, the real sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_collab.data.check import check_file
from llava_collab.data.conversation import SampleError
from llava_collab.data.images import expand_to_square, load_image, mean_colour
from llava_collab.data.real import REAL_SETS, ROOT_VARIABLE, read_real, training_sets
from llava_collab.data.samples import iter_records, read_samples
from llava_collab.types import Turn


def record(
    i: int, image: str | list[str] | None = "a.png", question: str = "<image>\nWhat?", answer: str = "A dog.", **extra: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"s{i}", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return row | ({} if image is None else {"image": image}) | extra


def write(path: Path, rows: list[Any], layout: str = "jsonl") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if layout == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = (6, 4), colour: Any = (200, 30, 60), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize("layout", ["json", "jsonl"])
def test_read_samples(tmp_path: Path, layout: str) -> None:
    rows = [
        record(0, ["a.png", "b.png"], "<image>\n<image>\nWhich?", category="Visual QA", family="f", answers=["A dog.", "dog"], title="T"),
        record(1, None, "Hi?", "Hello ünïcode."),
    ]
    two, text = read_samples(write(tmp_path / f"d.{layout}", rows, layout))
    assert two.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert (two.category, two.family, two.answers, two.meta) == ("Visual QA", "f", ("A dog.", "dog"), {"title": "T"})
    assert (text.images, text.answers) == ((), ("Hello ünïcode.",))
    request = two.request(max_new_tokens=9)
    assert request.turns == (Turn("user", "<image>\n<image>\nWhich?"),) and request.max_new_tokens == 9 and request.images == two.images
    assert read_samples(tmp_path / f"d.{layout}", image_root=tmp_path / "else")[0].images[0] == tmp_path / "else" / "a.png"


def test_json_arrays_are_streamed_across_chunks(tmp_path: Path) -> None:
    rows = [record(i, answer='tricky ]}{[ \\" é ' * 400) for i in range(300)]  # some 2.5 MB: more than two chunks
    path = write(tmp_path / "big.json", rows, "json")
    assert path.stat().st_size > 2 << 20
    assert list(iter_records(path)) == rows


def test_image_mark_at_the_end_moves_to_the_front_as_in_llava(tmp_path: Path) -> None:
    rows = [record(0, question="What?\n<image>"), record(1, question="Look at <image> here"), record(2, ["a", "b"], "1 <image> 2 <image>")]
    texts = [sample.turns[0].text for sample in read_samples(write(tmp_path / "d.jsonl", rows))]
    assert texts == ["<image>\nWhat?", "Look at <image> here", "1 <image> 2 <image>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1,\n', "line 1 is not JSON"),
        ('[{"id": "a", "conversations": []}, {"id": ', "record 2 is cut off"),
        ('{"id": "x9"}\n', "sample x9.*KeyError.*conversations"),
        ('{"id": "x9", "image": 5, "conversations": []}\n', "x9"),
        ("[1, 2]", "not JSON|not a LLaVA record"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SampleError, match=message) as caught:
        read_samples(path)
    assert "bad.json" in str(caught.value)


def test_transparency_is_white_and_grey_is_grey(tmp_path: Path) -> None:
    assert load_image(picture(tmp_path / "t.png", colour=(255, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(picture(tmp_path / "g.png", colour=90, mode="L")).getpixel((0, 0)) == (90, 90, 90)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.gif", transparency=1)
    assert load_image(tmp_path / "p.gif").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as some libraries set it
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SampleError, match="cut") as caught:
        load_image(path, "s3")
    assert (caught.value.reason, caught.value.sample_id) == ("truncated_image", "s3")


def test_missing_empty_and_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SampleError) as caught:
        load_image(tmp_path / "no.png")
    assert caught.value.reason == "missing_image"
    (tmp_path / "empty.png").touch()
    with pytest.raises(SampleError) as caught:
        load_image(tmp_path / "empty.png")
    assert caught.value.reason == "truncated_image"
    monkeypatch.setattr("llava_collab.data.images.MAX_PIXELS", 20)
    with pytest.raises(SampleError, match="6 x 4 pixels") as caught:
        load_image(picture(tmp_path / "bomb.png"))
    assert caught.value.reason == "image_too_large"


def test_other_extension_is_found(tmp_path: Path) -> None:
    picture(tmp_path / "ocr.gif", colour=3, mode="P")
    assert load_image(tmp_path / "ocr.jpg").size == (6, 4)


@pytest.mark.parametrize(("size", "corner"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((3, 3), (0, 0))])
def test_expand_to_square_is_llavas(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """LLaVA, mm_utils.expand2square: pasted at (0, (width - height) // 2) or ((height - width) // 2, 0) on the mean colour."""
    background = mean_colour((0.48145466, 0.4578275, 0.40821073))
    assert background == (122, 116, 104)
    square = expand_to_square(Image.new("RGB", size, (1, 2, 3)), background)
    expected = np.full((max(size), max(size), 3), background, dtype=np.uint8)
    expected[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]] = (1, 2, 3)
    np.testing.assert_array_equal(np.asarray(square), expected)


def test_check_finds_every_fault(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "alias.gif", colour=1, mode="P")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    rows: list[Any] = [
        record(0),
        record(1, "alias.jpg"),
        record(2, None, "Hi?"),
        record(2, None, "Hi?"),
        record(4, "gone/b.png"),
        record(5, "cut.png"),
        record(6, question="no mark"),
        record(7, answer=" "),
        record(8, conversations=[{"from": "gpt", "value": "Hi."}]),
        record(9, conversations=[{"from": "robot", "value": "<image>"}, {"from": "gpt", "value": "Hi."}]),
        record(10, conversations=[{"from": "human", "value": "<image>"}, {"from": "human", "value": "Hi."}]),
        {"id": "s11"},
    ]
    report = check_file(write(tmp_path / "d.jsonl", rows))
    assert not report.ok
    found = dict(report.problems)
    assert found.pop("image_count") == 2  # s6, and s8 that has an image but no human turn
    assert found == dict.fromkeys(
        (
            "duplicate_id", "missing_image", "truncated_image", "empty_answer", "starts_with_assistant", "unknown_role",
            "turn_order", "bad_record",
        ), 1,
    )  # fmt: skip
    assert (report.samples, report.text_only, report.aliased) == (12, 2, 1)
    assert report.missing_folders == {"gone": 1}
    text = report.text()
    assert "PROBLEM missing_image: 1" in text and "b.png" in text and "NOT OK: 10 problems" in text
    assert check_file(tmp_path / "d.jsonl", limit=3).ok


def test_check_of_an_empty_and_of_a_broken_file(tmp_path: Path) -> None:
    assert not check_file(write(tmp_path / "none.jsonl", [])).ok
    (tmp_path / "cut.json").write_text('[{"id": ')
    assert check_file(tmp_path / "cut.json").problems["bad_record"] == 1
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "absent.json")


def test_check_knows_llavas_two_files(tmp_path: Path) -> None:
    """The ids of the 665K file are those of pictures and repeat; a missing folder is named with its source."""
    rows = [record(1, "coco/train2017/000000000001.jpg"), record(1, "coco/train2017/000000000001.jpg"), record(2, "gqa/images/2.jpg")]
    picture(tmp_path / "coco/train2017/000000000001.jpg")
    report = check_file(write(tmp_path / "mix.json", rows, "json"))
    assert report.layout == "llava_v1_5_mix665k" and report.duplicate_ids == 1
    assert dict(report.problems) == {"missing_image": 1}
    assert "missing in gqa/images: 1 images (GQA images)" in report.text()

    picture(tmp_path / "00453/004539375.jpg")
    report = check_file(write(tmp_path / "blip.json", [record(3, "00453/004539375.jpg")], "json"))
    assert report.layout == "blip_laion_cc_sbu_558k" and report.ok


def test_real_sets_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nlvr"
    picture(folder / "images" / "x.webp")
    write(folder / "test.jsonl", [record(0, ["images/x.webp"], category="Spatial Inference", source="s", licence="CC BY 4.0")])
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    (sample,) = read_real("nlvr", "test")
    assert sample.family == "nlvr" and sample.images == (folder / "images" / "x.webp",) and sample.meta["licence"] == "CC BY 4.0"
    assert read_real("nlvr", "test", root=tmp_path) == [sample]
    with pytest.raises(FileNotFoundError, match="val.jsonl"):
        read_real("nlvr", "val")
    with pytest.raises(ValueError, match="no split 'train'"):
        read_real("mathvision", "train")
    with pytest.raises(ValueError, match="easy_vqa"):
        read_real("coco", "train")
    monkeypatch.delenv(ROOT_VARIABLE)
    with pytest.raises(FileNotFoundError, match=ROOT_VARIABLE):
        read_real("nlvr", "test")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_real("nlvr", "test", root=tmp_path / "absent")


def test_only_free_licences_are_for_training() -> None:
    assert training_sets() == ["easy_vqa", "nlvr", "bird_book", "african_storybooks"]
    assert len(REAL_SETS) == 9


@pytest.mark.skipif(not os.environ.get(ROOT_VARIABLE), reason=f"{ROOT_VARIABLE} names no folder of real sets")
@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets_are_whole(name: str) -> None:
    ids: set[str] = set()
    for split, count in REAL_SETS[name].items.items():
        samples = read_real(name, split)
        assert len(samples) == count
        assert {sample.category for sample in samples} <= set(REAL_SETS[name].categories)
        assert not ids & {sample.id for sample in samples}
        ids |= {sample.id for sample in samples}
        assert all(sample.answers[0] == sample.turns[-1].text for sample in samples)
