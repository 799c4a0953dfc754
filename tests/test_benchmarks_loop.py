"""benchmarks/loop.py: both sides do the same work before it says which one is faster."""

import random
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, program

sys.path.append(str(ROOT / "benchmarks"))  # a program finds its neighbours there
loop = program("benchmarks/loop.py")
made = sys.modules["made"]
SMALL = made.Sizes(width=32, layers=2, tower_width=32, image_side=4, max_length=256)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> "loop.Job":
    return loop.Job.open(loop.Args(sizes=SMALL, batch_size=4, micro_batch_size=2, steps=2, warmup=1), tmp_path_factory.mktemp("job"))


def test_first_losses_agree_on_all_ways(job: "loop.Job", monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.check_losses(job) <= 1e-6
    monkeypatch.setattr(loop, "trainer_loop", lambda *_: 5.0)
    with pytest.raises(SystemExit, match="not do the same work"):
        loop.check_losses(job)


def test_every_way_is_given_each_sample_once(job: "loop.Job") -> None:
    dataset, _ = job.dataset()
    assert len(dataset) == job.args.samples == 8
    assert any(dataset.has_image)
    found = {way: job.measure(way, seed=1) for way in ("ours, packing off", "ours, packing on", loop.BEST, loop.DEFAULT)}
    assert {own.tokens for own in found.values()} == {sum(dataset.lengths)}
    assert all(own.positions >= own.tokens and own.seconds > 0 for own in found.values())
    by_length = sum(2 * max(dataset.lengths[k : k + 2]) for k in range(0, 8, 2))  # the file's order is the Trainer's
    assert found[loop.BEST].positions == by_length


def test_epoch_is_made_of_the_trainers_own_steps() -> None:
    rng = random.Random(0)  # noqa: S311
    lengths = [rng.randrange(10, 500) for _ in range(800)]
    chosen = loop.evenly(lengths, batch_size=4, steps=10)
    assert len(set(chosen)) == 40
    steps = [[lengths[number] for number in chosen[k : k + 4]] for k in range(0, 40, 4)]
    assert steps == sorted(steps, key=sum, reverse=True)
    padding = 1 - sum(map(sum, steps)) / sum(4 * max(step) for step in steps)
    assert padding < 0.03, "steps that were not grouped over many samples"
    assert abs(sum(map(sum, steps)) / 40 - sum(lengths) / 800) < 20
    with pytest.raises(SystemExit, match="too few for 201 steps"):
        loop.evenly(lengths, batch_size=4, steps=201)


def test_conversations_are_mixed_as_the_table_says_and_fit() -> None:
    kinds = made.mixture(664)
    assert [kinds.count(kind) for kind in made.KINDS] == [310, 158, 156, 40]
    from llava_collab.models.tiny import tiny_tokenizer

    tokenizer, rng = tiny_tokenizer(), random.Random(0)  # noqa: S311
    for kind in made.mixture(200):
        row = made.conversation(kind, SMALL, rng)
        text = "".join(turn["value"] for turn in row["conversations"])
        assert ("image" in row) == kind.picture == text.startswith("<image>\n")
        pairs = len(row["conversations"]) // 2
        assert 1 <= pairs <= kind.turns
        spoken = len(tokenizer(text.removeprefix("<image>\n"), add_special_tokens=False)["input_ids"])
        assert spoken + pairs * made.TEMPLATE + kind.picture * SMALL.image_tokens <= SMALL.max_length


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(memory: float, *seconds: float) -> list:
        return [loop.Figures(s, s / 2, 1000, 1250, memory) for s in seconds]

    found = {way: figures(3, 1, 2, 4) for way in loop.OURS} | {loop.BEST: figures(2, 2, 3, 4), loop.DEFAULT: figures(2, 4, 6, 8)}
    rows = loop.results(loop.Args(), found)
    first = rows[0]
    assert (first["value"], first["least"], first["most"], first["cpu_time_ratio"]) == (1.5, 1.0, 2.0, 1.5)
    assert first["target"] is None and first["name"].startswith("cpu: ")
    assert first["padding"][loop.BEST] == 0.2
    assert [row["value"] for row in rows if "default settings, over" in row["name"]] == [0.5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = loop.results(loop.Args(), found)
    assert [row["target"] for row in rows if row["target"]] == [1.3]
    assert [row["value"] for row in rows if row["name"].startswith("peak memory")] == [1.5] * len(loop.OURS)


def test_steps_must_divide(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="multiple of"):
        loop.main(loop.Args(batch_size=5, micro_batch_size=2, out=tmp_path / "loop.json"))
