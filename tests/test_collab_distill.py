"""What one model learns from another: the losses of the papers at toy size, and a training that a kill does not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llava_collab.collab.distill import (
    Distiller,
    Positions,
    Targets,
    TeacherTokens,
    Tokens,
    TokenStudent,
    WeakToStrong,
    harden,
    two_stage_confidence,
)
from llava_collab.collab.linear_text import Linear, fit_linear_text, load_linear_text, right_indices
from llava_collab.data.collate import Collator
from llava_collab.models.tiny import tiny_decoder
from llava_collab.types import Request, Turn


class Plain(torch.nn.Module):
    """A linear student of vectors."""

    def __init__(self, features: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(features, classes)

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.layer(torch.stack(list(inputs)))


def points(count: int, seed: int, classes: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Vectors whose class is where they lie."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    centres = 1.5 * torch.eye(classes, 4)
    return list(centres[labels] + torch.randn(count, 4, generator=rng)), labels


def weights(student: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in student.parameters()]


def at(rows: torch.Tensor, logits: torch.Tensor, progress: float) -> Positions:
    return Positions([None] * len(rows), rows, logits, None, progress)


def test_one_step_is_the_weighted_mean_that_the_formula_says() -> None:
    inputs, labels = points(6, 0, 3)
    soft = F.one_hot(labels, 3) * 0.8 + 0.2 / 3
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    student = Plain(4, 3)
    logits = student(inputs)
    expected = (-(weight * (soft * logits.log_softmax(1)).sum(1)).sum() / weight.sum()).item()
    losses = Distiller(steps=1, batch_size=6, lr=0.0).fit(student, inputs, Targets(soft, weight), quiet=True)
    assert losses[0] == pytest.approx(expected, rel=1e-6)


def test_weak_to_strong_without_its_own_opinion_is_naive_training() -> None:
    inputs, labels = points(64, 1)
    weak = torch.nn.functional.one_hot(labels, 2) * 0.7 + 0.15
    students = [Plain(4, 2), Plain(4, 2)]
    for student, labeler in zip(students, (Targets(weak), WeakToStrong(weak, alpha=0.0)), strict=True):
        Distiller(steps=30, batch_size=16).fit(student, inputs, labeler, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, students), strict=True))


def test_alpha_rises_without_a_jump_and_stays() -> None:
    labeler = WeakToStrong(torch.full((4, 2), 0.5), alpha=0.75, warmup=0.2)
    mixed = [labeler.mixed(step / 1000) for step in range(1001)]
    assert mixed[0] == 0.0 and mixed[200] == pytest.approx(0.75) and mixed[-1] == 0.75
    assert max(b - a for a, b in zip(mixed, mixed[1:], strict=False)) <= 0.75 / 200 + 1e-12
    targets, _ = labeler(at(torch.arange(4), torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, -1.0], [0.0, -3.0]]), 1.0))
    assert torch.allclose(targets[:, 1], torch.tensor([0.875, 0.875, 0.125, 0.125]))


def test_hardened_opinions_keep_the_shares_of_the_weak_labels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 2) + torch.tensor([0.0, 3.0])  # the student says 1 nearly always
    assert harden(logits, torch.tensor([0.7, 0.3])).float().mean() == pytest.approx(0.3, abs=0.01)
    logits = 3 * torch.randn(3000, 3) + torch.tensor([0.0, 2.0, 4.0])
    shares = torch.bincount(harden(logits, torch.full((3,), 1 / 3)), minlength=3) / 3000
    before = torch.bincount(logits.argmax(1), minlength=3) / 3000
    assert (shares - 1 / 3).abs().max() < 0.3 * (before - 1 / 3).abs().max()


def test_two_stage_confidence_takes_the_rows_and_weights_of_the_paper() -> None:
    small = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    large = torch.tensor([[0.1, 0.9], [0.05, 0.95], [0.4, 0.6], [0.5, 0.5]])
    labeler = two_stage_confidence(small, large, small_sure=0.8, large_sure=0.9, rehearsal=0.5)
    targets, weight = labeler(at(torch.arange(4), torch.zeros(4, 2), 0.0))
    assert targets.tolist()[:2] == [0, 1] and targets.tolist()[3] == 1
    # T = {1}, a mean of one row; K = {0, 3}, half of a mean of two; row 2 is nobody's
    assert (weight / weight[1]).tolist() == [0.25, 1.0, 0.0, 0.25]
    with pytest.raises(ValueError, match="nothing to teach"):
        two_stage_confidence(small, small, small_sure=0.8, large_sure=0.95)


def test_without_rehearsal_two_stage_confidence_forgets_more() -> None:
    """The small model is good where x0 is large; where it is near 0 the small model is unsure, and the large one says the contrary."""
    rng = torch.Generator().manual_seed(0)
    own, other = torch.randn(300, 2, generator=rng) * 2, torch.randn(300, 2, generator=rng) * 0.2
    own, other_y = own[own[:, 0].abs() > 1], (other[:, 0] < 0).long()
    own_y = (own[:, 0] > 0).long()
    start = Plain(2, 2)
    Distiller(steps=200, batch_size=32, lr=0.05).fit(start, list(own), Targets(own_y), quiet=True)
    with torch.no_grad():
        small = start(list(torch.cat([own, other]))).softmax(1)
    large = F.one_hot(torch.cat([own_y, other_y]), 2) * 0.98 + 0.01
    right = {}
    for rehearsal in (0.0, 1.0):
        student = Plain(2, 2)
        student.load_state_dict(start.state_dict())
        labeler = two_stage_confidence(small, large, small_sure=0.95, large_sure=0.9, rehearsal=rehearsal)
        Distiller(steps=300, batch_size=64, lr=0.05).fit(student, list(torch.cat([own, other])), labeler, quiet=True)
        with torch.no_grad():
            right[rehearsal] = float((student(list(own)).argmax(1) == own_y).float().mean())
    before = float((small[: len(own)].argmax(1) == own_y).float().mean())
    assert right[0.0] < right[1.0] <= before + 0.01
    assert right[1.0] > 0.95 and right[0.0] < 0.8


def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path) -> None:
    inputs, labels = points(50, 3)
    whole, cut = Plain(4, 2), Plain(4, 2)
    distiller = Distiller(steps=40, batch_size=8, seed=5)
    losses = distiller.fit(whole, inputs, Targets(labels), quiet=True)

    class Killed(Exception):
        pass

    def dies(where: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        if where.progress > 0.6:
            raise Killed
        return Targets(labels)(where)

    with pytest.raises(Killed):
        distiller.fit(cut, inputs, dies, folder=tmp_path, save_every=10, quiet=True)
    again = Plain(4, 2, seed=9)  # its own weights do not matter
    assert distiller.fit(again, inputs, Targets(labels), folder=tmp_path, save_every=10, quiet=True) == losses
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    with pytest.raises(ValueError, match="of another training: distiller"):
        Distiller(steps=41, batch_size=8, seed=5).fit(again, inputs, Targets(labels), folder=tmp_path, save_every=10, quiet=True)
    with pytest.raises(ValueError, match="another student"):
        distiller.fit(torch.nn.Sequential(Plain(4, 2)), inputs, Targets(labels), folder=tmp_path, save_every=10, quiet=True)


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    inputs, labels = points(8, 0)
    student = Plain(4, 2)
    before = weights(student)
    inputs[3] = torch.full((4,), float("inf"))
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        Distiller(steps=3, batch_size=8).fit(student, inputs, Targets(labels), quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


def token_rows() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = []
    for length in (5, 9, 7):
        ids = torch.randint(300, (length,))
        labels = ids.clone()
        labels[: length // 2] = -100
        rows.append({"sample_id": str(length), "input_ids": ids, "labels": labels, "guidance_mask": labels == -100})
    return rows


def test_tokens_weigh_as_their_rows_do() -> None:
    torch.manual_seed(0)
    network, rows = LlamaForCausalLM(tiny_decoder()), token_rows()
    student = TokenStudent(network, Collator(0))
    weight = torch.tensor([1.0, 0.1, 2.0])
    losses = Distiller(steps=1, batch_size=3, lr=0.0).fit(student, rows, Tokens(weight), quiet=True)
    total, norm = 0.0, 0.0
    for row, w in zip(rows, weight.tolist(), strict=True):  # one at a time, without padding
        logp = network(row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        for position, token in enumerate(row["labels"][1:].tolist()):
            if token != -100:
                total, norm = total - w * float(logp[position, token]), norm + w
    assert losses[0] == pytest.approx(total / norm, rel=1e-4)


def test_a_student_learns_its_teachers_distributions() -> None:
    torch.manual_seed(0)
    teacher, network = LlamaForCausalLM(tiny_decoder()), LlamaForCausalLM(tiny_decoder())
    rows, collate = token_rows(), Collator(0)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8)
    taught, student = TokenStudent(teacher.eval(), collate), TokenStudent(network, collate)
    labeler = TeacherTokens(taught)

    def divergence() -> float:
        with torch.no_grad():
            return float(F.kl_div(student(rows).log_softmax(-1), taught(rows).softmax(-1), reduction="batchmean"))

    before = divergence()
    Distiller(steps=60, batch_size=3, lr=3e-3).fit(student, rows, labeler, quiet=True)
    assert divergence() < 0.2 * before
    ended = TokenStudent(teacher, lambda rows: collate([row | {"labels": row["labels"] + (row["labels"] >= 0)} for row in rows]))
    with pytest.raises(ValueError, match="have to write an answer in the same tokens"):
        Distiller(steps=1).fit(student, rows, TeacherTokens(ended), quiet=True)


TEXTS = [
    "the cat sat",
    "a cat purrs",
    "my cat sleeps",
    "the dog barks",
    "a dog runs",
    "my dog digs",
    "the bird sings",
    "a bird flies",
    "my bird nests",
]
LABELS = ["cat"] * 3 + ["dog"] * 3 + ["bird"] * 3


@pytest.mark.parametrize("kind", ["naive-bayes", "tfidf-lr"])
def test_linear_texts_are_what_scikit_learn_fits_and_survive_a_save(kind: str, tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    model = fit_linear_text(kind, TEXTS, LABELS, "small")
    count = TfidfVectorizer(min_df=1 if kind == "naive-bayes" else 2, sublinear_tf=True)
    learner: Any = MultinomialNB(alpha=0.01) if kind == "naive-bayes" else LogisticRegression(C=100.0, max_iter=1000)
    reference = make_pipeline(count, learner).fit(TEXTS, LABELS)
    asked = ["the dog and the cat", "purrs", "unknown words only"]
    np.testing.assert_allclose(model.probabilities(asked), reference.predict_proba(asked), atol=1e-5)
    model.save(tmp_path)
    again = load_linear_text(tmp_path)
    np.testing.assert_array_equal(again.probabilities(asked), model.probabilities(asked))
    with torch.no_grad():
        logits = Linear(model)(asked)
    np.testing.assert_allclose(logits.softmax(1).numpy(), model.probabilities(asked), atol=1e-5)
    np.testing.assert_allclose(Linear(model).back("copy").probabilities(asked), model.probabilities(asked), atol=1e-6)
    request = Request("r", (Turn("user", asked[0]),), choices=("bird", "dog"))
    answer = model.score([request])[0]
    p = dict(zip(model.labels, model.probabilities(asked[:1])[0], strict=True))
    assert answer.scores == pytest.approx((p["bird"] / (p["bird"] + p["dog"]), p["dog"] / (p["bird"] + p["dog"]))) and answer.text == "dog"
    assert model.score([Request("r", (Turn("user", "x"),), choices=("cow", "dog"))])[0].scores == (0.0, 1.0)
    assert "none of small's 3 labels" in str(model.score([Request("r", (Turn("user", "x"),), choices=("cow", "sheep"))])[0].error)
    assert right_indices(["dog", "cow"], model.labels).tolist() == [2, -1]
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a stored text classifier"):
        load_linear_text(tmp_path)


def test_a_linear_text_model_learns_by_the_distiller() -> None:
    model = fit_linear_text("naive-bayes", TEXTS[:6], LABELS[:6], "small")
    student = Linear(model)
    flipped = torch.tensor(1 - right_indices(LABELS[:6], model.labels))
    Distiller(steps=200, batch_size=6, lr=0.1).fit(student, TEXTS[:6], Targets(flipped), quiet=True)
    assert (student.back("taught").probabilities(TEXTS[:6]).argmax(1) == flipped.numpy()).all()
