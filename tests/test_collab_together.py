"""Training small, large and gate in one run: the loss is the formula's, and each model learns most where it is asked. Teaching a LLaVA."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, program
from synthetic import write_shapes
from transformers import LlamaForCausalLM

from llava_collab.collab import together
from llava_collab.collab.distill import TokenStudent
from llava_collab.collab.router import HashedText, load_router
from llava_collab.collab.together import Together, sample_losses
from llava_collab.data.collate import Collator
from llava_collab.data.samples import Sample, read_samples
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.tiny import tiny_decoder
from llava_collab.types import Answer, Request, Turn


def student(seed: int) -> TokenStudent:
    torch.manual_seed(seed)
    return TokenStudent(LlamaForCausalLM(tiny_decoder()), Collator(0))


def samples(count: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Half of them say one thing, half another; the features tell which."""
    rows, features = [], torch.zeros(count, 2)
    for k in range(count):
        kind = k % 2
        ids = torch.tensor([7, 8 + kind, 20 + 5 * kind, 21 + 5 * kind, 22 + 5 * kind])
        labels = ids.clone()
        labels[:2] = -100
        rows.append({"sample_id": str(k), "input_ids": ids, "labels": labels, "guidance_mask": labels == -100})
        features[k, kind] = 1.0
    return rows, features


def test_losses_are_means_over_each_samples_own_tokens() -> None:
    model, (rows, _) = student(0), samples(3)
    rows[1]["labels"][2] = -100
    together = sample_losses(model, rows)
    for k, row in enumerate(rows):
        assert sample_losses(model, [row]).item() == pytest.approx(together[k].item(), rel=1e-5)


def test_the_loss_is_the_formulas_and_apart_the_models_do_not_feel_the_gate() -> None:
    g, small, large = (torch.tensor(v, requires_grad=True) for v in ([0.2, 0.9], [1.0, 2.0], [0.5, 3.0]))
    joint = Together(cost=0.1, keep=0.25).loss(g, small, large)
    expected = (0.2 * 1 + 0.8 * 0.6 + 0.9 * 2 + 0.1 * 3.1) / 2 + 0.25 * (1.5 + 5.0) / 2
    assert joint.item() == pytest.approx(expected / 0.75)
    apart = Together(cost=0.1, joint=False).loss(g, small, large)
    assert apart.item() == pytest.approx((1.5 + 5.0) / 2 + (0.2 * 1 + 0.8 * 0.6 + 0.9 * 2 + 0.1 * 3.1) / 2)
    gradients = torch.autograd.grad(apart, (g, small, large))
    assert gradients[1].tolist() == gradients[2].tolist() == [0.5, 0.5] and gradients[0].abs().min() > 0
    own, other = torch.autograd.grad(joint, (small, large))
    assert own.tolist() == pytest.approx([(0.2 + 0.25) / 1.5, (0.9 + 0.25) / 1.5]) and (own + other).tolist() == pytest.approx([1.0, 1.0])


def test_the_gate_learns_who_is_good_at_what_and_a_price_moves_it() -> None:
    rows, features = samples(32)
    shares = {}
    for cost in (0.0, 100.0):
        small, large, gate = student(1), student(2), torch.nn.Linear(2, 1)
        large.requires_grad_(False)
        steps = Together(steps=30, batch_size=8, small_lr=3e-3, cost=cost, gate_lr=0.1).fit(small, large, gate, rows, features, quiet=True)
        assert steps[-1].small < steps[0].small
        shares[cost] = steps[-1].asked_small
    assert shares[100.0] > 0.9 and shares[100.0] > shares[0.0]


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features = samples(12)
    how, plain = Together(steps=6, batch_size=4, small_lr=1e-3, large_lr=1e-3), together.sample_losses

    def trained(**options: Any) -> tuple[list[together.Step], list[torch.Tensor]]:
        small, large, gate = student(1), student(2), torch.nn.Linear(2, 1)
        for parameter in gate.parameters():
            torch.nn.init.zeros_(parameter)
        steps = how.fit(small, large, gate, rows, features, quiet=True, **options)
        return steps, [p.detach().clone() for module in (small, large, gate) for p in module.parameters()]

    calls = iter(range(100))

    def dying(*arguments: Any) -> torch.Tensor:
        if next(calls) == 6:  # in the fourth step, after the save of the second
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(together, "sample_losses", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(folder=tmp_path, save_every=2)
    monkeypatch.setattr(together, "sample_losses", plain)
    with pytest.raises(ValueError, match="of another training: of is"):
        trained(folder=tmp_path, save_every=2, of="other data")
    (steps, gone_on), (expected, straight) = trained(folder=tmp_path, save_every=2), trained()
    assert steps == expected and len(steps) == 6
    assert all(torch.equal(one, other) for one, other in zip(gone_on, straight, strict=True))


def test_rows_have_to_be_of_the_same_samples() -> None:
    rows, features = samples(4)
    with pytest.raises(ValueError, match="of the same samples"):
        Together(steps=1).fit(student(0), student(1), torch.nn.Linear(2, 1), rows[:3], features)


def write_models(folder: Path) -> None:
    for seed, name in enumerate(("small", "large")):
        experts = {"bottleneck": 4, "code_width": 4} if name == "large" else None
        network, processor = build(ModelSpec(visual_expert=experts, language_expert=experts), seed)
        network.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


@pytest.mark.parametrize("apart", [False, True])
def test_the_program_leaves_models_and_a_router(tmp_path: Path, apart: bool) -> None:
    data = write_shapes(tmp_path / "data", 24)
    write_models(tmp_path)
    command = ["--small", str(tmp_path / "small"), "--large", str(tmp_path / "large"), "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--steps", "3", "--batch-size", "4", "--device", "cpu", *(["--apart"] if apart else [])]
    done = subprocess.run([sys.executable, "train/together.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    router = load_router(tmp_path / "out/router.safetensors", HashedText())
    assert router.name == ("apart" if apart else "together")
    before, after = ({n: dict(load(tmp_path / f / n)[0].named_parameters()) for n in ("small", "large")} for f in (".", "out"))
    for name in ("small", "large"):
        moved = {key for key, value in after[name].items() if not torch.equal(value, before[name][key])}
        assert moved and all(("expert" in key) if name == "large" else ("vision_tower" not in key) for key in moved)
    again = subprocess.run([sys.executable, "train/together.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "finished before" in again.stdout
    other = subprocess.run([sys.executable, "train/together.py", *command, "--seed", "7"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1 and "by other arguments" in other.stderr
    assert len((tmp_path / "out/log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("how", ["labels", "distributions", "answers", "rationales"])
def test_a_llava_is_taught_by_others(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shapes(tmp_path / "data", 12)
    write_models(tmp_path)
    teaching, number = program("train/distill_llava.py"), {"labels": 0, "rationales": 2}.get(how, 1)
    teachers = tuple(tmp_path / name for name in ("large", "small")[:number])
    args = teaching.Args(tmp_path / "small", tmp_path / "out", teachers, how, data, steps=3, batch_size=4, max_new_tokens=4, device="cpu")
    with pytest.raises(ValueError, match=f"--how {how} takes"):
        teaching.main(dataclasses.replace(args, teachers=() if number else (tmp_path / "large",)))

    def generate(self: Any, requests: Sequence[Request]) -> list[Answer]:  # what is untrained says nothing; nor does a teacher to all
        return [Answer("" if request.id == "shape-3" else f"so says {self.name}") for request in requests]

    monkeypatch.setattr(teaching.Single, "generate", generate)
    if how in ("answers", "rationales"):
        rows, weights = teaching._told(dataclasses.replace(args, alpha=0.5), read_samples(data), [], torch.device("cpu"))
        taught = [row for row in rows if row.turns[-1].text.startswith("so says")]
        assert len(taught) == 11 * number and len(rows) == len(taught) + (12 if how == "rationales" else 0)
        assert weights == ([1.0] * 11 if how == "answers" else [1.0] * 12 + [0.5] * 22)
    made: list[tuple[Any, ...]] = []
    labeler = teaching.TeacherTokens
    monkeypatch.setattr(teaching, "TeacherTokens", lambda *settings: made.append(settings[1:]) or labeler(*settings))
    teaching.main(dataclasses.replace(args, share=0.5, temperature=2.0))
    assert made == ([(2.0, 0.5)] if how == "distributions" else [])
    before, after = (dict(load(folder)[0].named_parameters()) for folder in (tmp_path / "small", tmp_path / "out/model"))
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved and not any("vision_tower" in key for key in moved)
    kept = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted((tmp_path / "out").glob("teachers/*"))]
    assert [len(rows) for rows in kept] == ([12] * number if how in ("answers", "rationales") else [])
    assert not (tmp_path / "out/distil.safetensors").exists()


def test_what_a_teacher_is_asked_and_a_student_told() -> None:
    teaching = program("train/distill_llava.py")
    turns = (Turn("user", "<image>\n<image>\nIs it red?"), Turn("assistant", "Yes."))
    sample = Sample("1", (Path("a"), Path("b")), turns)
    args = teaching.Args(Path("small"), Path("out"), how="rationales")
    (asked,) = teaching._asked(args, sample).turns
    assert asked.text == "<image>\n<image>\nIs it red?\nThe answer is: Yes. Explain why."
    other = teaching.Args(Path("small"), Path("out"), how="rationales", ask="Describe all.")
    assert teaching._asked(other, sample).turns[0].text == "<image>\n<image>\nDescribe all."
    assert teaching._prefixed(turns[:1], "Explain (1): ")[0].text == "<image>\n<image>\nExplain (1): Is it red?"
    assert teaching._prefixed((Turn("user", "What is in <image>?"),), "Explain (1): ")[0].text == "Explain (1): What is in <image>?"
