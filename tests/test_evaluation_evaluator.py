"""The evaluator survives being killed, counts errors apart, refuses other runs' folders; controls do what they claim."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llava_collab.data.samples import Sample
from llava_collab.evaluation.controls import blind, permute_images
from llava_collab.evaluation.evaluator import choose, evaluate
from llava_collab.evaluation.identity import data_sha256, images_sha256
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.records import RECORDS, RecordError, Row, open_run, read_rows
from llava_collab.files import model_sha256
from llava_collab.types import Answer, Model, Request, Turn, Usage

SCORER = Scorer({"Visual QA": "vqa", "Spatial Inference": "accuracy"})
LIMITS = {"Visual QA": 8, "Spatial Inference": 4}


def sample(number: int, category: str = "Visual QA", images: int = 1, answer: str = "yes", prompt: str = "q", family: str = "") -> Sample:
    turns = (Turn("user", "<image>\n" * images + prompt), Turn("assistant", answer))
    return Sample(f"s{number}", tuple(Path(f"{number}-{i}.png") for i in range(images)), turns, category, family, (answer,))


SAMPLES = [
    sample(i, "Visual QA" if i % 3 else "Spatial Inference", images=i % 2, prompt="why " * (i % 5), answer="yes" if i % 2 else "no")
    for i in range(23)
]


class Echo:
    """Says yes; errs at given ids; is killed at the given call."""

    name = "echo"

    def __init__(self, killed_at: int | None = None, errors: Sequence[str] = ()) -> None:
        self.killed_at, self.errors, self.batches = killed_at, set(errors), list[list[Request]]()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        self.batches.append(list(requests))
        if len(self.batches) == self.killed_at:
            raise KeyboardInterrupt
        return [
            Answer("", model=self.name, error="no image")
            if r.id in self.errors
            else Answer("yes", Usage(1, len(r.images), 5, 2, 10.0, 0.1), self.name)
            for r in requests
        ]


def run(model: Model, folder: Path, samples: Sequence[Sample] = SAMPLES, **identity: object) -> str:
    return str(evaluate(model, samples, folder, scorer=SCORER, max_new_tokens=LIMITS, batch_size=4, identity=identity))


def timeless(folder: Path) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder)]


def test_a_killed_run_goes_on_to_the_same_records(tmp_path: Path) -> None:
    whole = Echo()
    assert run(whole, tmp_path / "whole") == "n=23/23, 0 errors"
    killed = Echo(killed_at=4)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    path = tmp_path / "killed" / RECORDS
    path.write_bytes(path.read_bytes() + b'{"sample_id": "s1", "outp')  # cut off while writing
    resumed = Echo()
    assert run(resumed, tmp_path / "killed") == "n=23/23, 0 errors"
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    # Padding depends on a batch's company: the batches after the kill are those of the unbroken run.
    assert [*killed.batches[:3], *resumed.batches] == whole.batches
    assert run(Echo(killed_at=1), tmp_path / "killed") == "n=23/23, 0 errors"  # nothing is left to ask


def test_batches_share_limit_and_image_count(tmp_path: Path) -> None:
    model = Echo()
    run(model, tmp_path)
    for batch in model.batches:
        assert len({(request.max_new_tokens, len(request.images)) for request in batch}) == 1 and len(batch) <= 4
    assert sum(map(len, model.batches)) == len(SAMPLES)


def test_errors_are_counted_apart_and_tried_again(tmp_path: Path) -> None:
    assert run(Echo(errors=["s3", "s8"]), tmp_path) == "n=21/23, 2 errors"
    row = next(row for row in read_rows(tmp_path) if row["sample_id"] == "s3")
    assert (row["status"], row["score"], row["error"], row["output"]) == ("error", None, "no image", "")
    assert run(Echo(), tmp_path) == "n=23/23, 0 errors"


def test_a_record_tells_all(tmp_path: Path) -> None:
    run(Echo(), tmp_path)
    row = next(row for row in read_rows(tmp_path) if row["sample_id"] == "s1")
    assert row.pop("seconds") >= 0
    assert row == {
        "sample_id": "s1",
        "category": "Visual QA",
        "family": "",
        "split": "test",
        "prompt": "<image>\nwhy ",
        "output": "yes",
        "references": ["yes"],
        "score": 100.0,
        "metric": "exact_match",
        "scores": {"said_yes": 100.0, "is_yes": 100.0},
        "status": "ok",
        "error": None,
        "usage": {"calls": 1, "images": 1, "prompt_tokens": 5, "generated_tokens": 2, "flops": 10.0, "seconds": 0.1, "price": 0.0},
        "model": "echo",
    }


def test_another_run_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    run(Echo(), tmp_path, model_sha256="a")
    with pytest.raises(RecordError, match=r"model_sha256: 'a' there, 'b' now") as error:
        run(Echo(), tmp_path, SAMPLES[:-1], model_sha256="b")
    assert "data_sha256" in str(error.value) and "max_new_tokens" not in str(error.value)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RecordError, match="no run.json"):
        run(Echo(), tmp_path)


def test_broken_record_files_name_the_line(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text('{"sample_id": "a"}\nnonsense\n', encoding="utf-8")
    with pytest.raises(RecordError, match=r"records.jsonl:2"):
        read_rows(tmp_path)
    (tmp_path / RECORDS).write_text('{"sample_id": "a"}\n{"sample_id": "a"}\n', encoding="utf-8")
    with pytest.raises(RecordError, match="there twice"):
        read_rows(tmp_path)


def test_what_can_not_be_measured_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model = Echo(killed_at=1)
    with pytest.raises(ValueError, match="there twice"):
        run(model, tmp_path, [SAMPLES[0], SAMPLES[0]])
    with pytest.raises(ValueError, match="max_new_tokens"):
        run(model, tmp_path, [sample(1, "Other")])
    assert not (tmp_path / "run.json").exists()


def test_a_model_that_loses_an_answer_is_stopped(tmp_path: Path) -> None:
    class Short(Echo):
        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            return super().generate(requests)[1:]

    with pytest.raises(ValueError, match="one each, in order"):
        run(Short(), tmp_path)


def test_choice_of_items_ignores_file_order() -> None:
    chosen = choose(SAMPLES, 3, seed=1)
    assert Counter(s.category for s in chosen) == {"Visual QA": 3, "Spatial Inference": 3}
    assert {s.id for s in choose(SAMPLES[::-1], 3, seed=1)} == {s.id for s in chosen} != {s.id for s in choose(SAMPLES, 3, seed=2)}
    assert choose(SAMPLES, None, seed=1) == SAMPLES
    assert data_sha256(SAMPLES) == data_sha256(SAMPLES[::-1]) != data_sha256(chosen)


def test_a_picture_that_changes_is_another_run(tmp_path: Path) -> None:
    def samples(*names: str) -> list[Sample]:
        return [Sample(f"s{i}", (tmp_path / name,), (Turn("user", "<image>q"), Turn("assistant", "yes"))) for i, name in enumerate(names)]

    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    before = images_sha256(samples("a.png", "b.png"))
    assert before == images_sha256(samples("a.png", "b.png")[::-1]) != images_sha256(samples("b.png", "a.png"))
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert images_sha256(samples("a.png", "b.png")) == before  # the same bytes, found under another extension
    assert images_sha256(samples("c.png", "b.png")) not in (before, images_sha256(samples("b.png")))
    (tmp_path / "a.jpg").write_bytes(b"other")
    assert images_sha256(samples("a.png", "b.png")) != before

    asked = [replace(s, category="Visual QA") for s in samples("a.png", "b.png")]
    run(Echo(), tmp_path / "out", asked)
    (tmp_path / "b.png").write_bytes(b"other as well")
    with pytest.raises(RecordError, match="images_sha256") as error:
        run(Echo(), tmp_path / "out", asked)
    assert "data_sha256" not in str(error.value)


def test_model_hash_is_of_all_that_answers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a model folder"):
        model_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    assert model_sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert model_sha256(tmp_path) != before
    before = model_sha256(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert model_sha256(tmp_path) != before


def test_open_run_keeps_the_environment_of_the_first_start(tmp_path: Path) -> None:
    open_run(tmp_path, {"seed": 0}, {"command": "first"})
    open_run(tmp_path, {"seed": 0}, {"command": "second"})
    assert json.loads((tmp_path / "run.json").read_text())["environment"] == {"command": "first"}


# --- controls ---------------------------------------------------------------------------------------------------------------------


def test_blind_takes_images_and_marks() -> None:
    [bare] = blind([sample(1, images=2, prompt="what is it?")])
    assert bare.images == () and bare.turns[0].text == "what is it?" and bare.answers == ("yes",)


def test_permuted_images_stay_within_the_question_and_never_fit() -> None:
    samples = [sample(i, images=1 + i % 2, prompt=f"p{i % 3}", family="f") for i in range(40)]
    permuted = permute_images(samples, seed=3)
    by_id = {s.id: s for s in samples}
    assert [s.id for s in permuted] == [s.id for s in samples]
    for old, new in zip(samples, permuted, strict=True):
        donor = by_id[new.meta["images_from"]]
        assert new.images == donor.images != old.images
        assert donor.turns == old.turns and new.turns == old.turns and new.answers == old.answers
    assert Counter(s.images for s in permuted) == Counter(s.images for s in samples)
    assert permute_images(samples, 3) == permuted != permute_images(samples, 4)


def test_samples_that_share_an_image_get_another_one() -> None:
    shared = (Path("same.png"),)
    samples = [Sample(f"s{i}", shared if i < 5 else (Path(f"{i}.png"),), (Turn("user", "<image>q"),)) for i in range(10)]
    assert all(new.images != old.images for old, new in zip(samples, permute_images(samples, 0), strict=True))


def test_lonely_questions_take_an_image_of_their_family(caplog: pytest.LogCaptureFixture) -> None:
    group = [sample(i, prompt="common", family="f") for i in range(6)]
    lonely = sample(7, prompt="rare", family="f")
    alone = sample(8, prompt="only", family="g")
    no_image = sample(9, images=0, family="f")
    permuted = permute_images([*group, lonely, alone, no_image], 0)
    assert permuted[6].images != lonely.images and permuted[6].images in {s.images for s in group}
    assert permuted[7:] == [alone, no_image]
    assert "1 of 9 samples keep their image" in caplog.text
