"""What the model is asked, letter by letter, and that company in a batch does not change what it answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from evaluating import talkative
from PIL import Image
from running import program

from llava_collab.cmt.families import CATEGORIES
from llava_collab.collab.single import Single
from llava_collab.data.conversation import TEMPLATES
from llava_collab.data.samples import Sample
from llava_collab.types import Turn

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("golden_prompts", HERE / "golden" / "prompts.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


def test_prompts_are_the_stored_ones(tmp_path: Path) -> None:
    """A prompt that is meant to change: python tests/golden/prompts.py, and the diff is the review."""
    assert golden.lines(tmp_path) == golden.read()


def test_the_stored_prompts_cover_every_category_and_template() -> None:
    rows = [line.split(" | ", 5) for line in golden.read()]
    assert {row[0] for row in rows} == set(CATEGORIES) and {row[2] for row in rows} == set(TEMPLATES)
    assert len({(row[0], row[1], row[2]) for row in rows}) == len(rows) == len(TEMPLATES) * len({(row[0], row[1]) for row in rows})
    for _, _, template, count, _, text in rows:
        assert int(count) > 0 and ("USER: <image>*16\n" in json.loads(text)) == (template == "vicuna_v1")


@pytest.fixture(scope="module")
def model() -> Single:
    return Single(*talkative(), "talkative")


def ragged(folder: Path, count: int = 24) -> list[Sample]:
    """Questions of 1 to `count` words with 0 to 3 pictures."""
    samples = []
    for i in range(count):
        pictures = [folder / f"{i}-{k}.png" for k in range(i % 4)]
        for k, path in enumerate(pictures):
            Image.new("RGB", (40 - i, 20 + i), (10 * i, 80 * k, 60)).save(path)
        turns = (Turn("user", "<image>\n" * len(pictures) + "why " * (1 + 7 * i % count)), Turn("assistant", "x"))
        samples.append(Sample(f"s{i}", tuple(pictures), turns, "Visual QA"))
    return samples


def test_answers_in_batches_are_those_given_alone(model: Single, tmp_path: Path) -> None:
    bench = program("benchmarks/batched_evaluation.py")
    requests = [sample.request(4 + number % 5) for number, sample in enumerate(ragged(tmp_path))]
    alone = {request.id: bench.ask(model, [request])[0] for request in requests}
    assert len(set(alone.values())) > 20
    for size in (3, 8, 24):
        result = bench.agreement(model, [requests[at : at + size] for at in range(0, 24, size)], alone)
        assert result.share == 1.0 and result.equal >= 22


def test_a_difference_that_is_no_tie_is_found(model: Single, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that is attended to, as from a mask that was lost, must not pass as a tie."""
    bench = program("benchmarks/batched_evaluation.py")
    requests = [sample.request(6) for sample in ragged(tmp_path)]
    alone = {request.id: bench.ask(model, [request])[0] for request in requests}
    encode = type(model.processor).encode_requests

    def unmasked(self: object, requests: list) -> object:
        batch = encode(self, requests)  # type: ignore[arg-type]
        return batch if len(requests) == 1 else type(batch)(batch | {"attention_mask": torch.ones_like(batch["attention_mask"])})

    monkeypatch.setattr(type(model.processor), "encode_requests", unmasked)
    assert bench.agreement(model, [requests], alone).share < 0.7
