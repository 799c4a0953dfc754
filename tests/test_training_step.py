"""One optimiser step: the same loss and gradient however it is cut, parameter groups, the schedule, clipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from synthetic import write_shapes
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from llava_collab.data.collate import Collator
from llava_collab.data.dataset import ConversationDataset
from llava_collab.data.samples import read_samples
from llava_collab.models.build import ModelSpec, build
from llava_collab.training.batches import MicroBatches
from llava_collab.training.components import (
    choose_trainable,
    clip,
    component_of,
    gradient_norms,
    learning_rate_factor,
    parameter_groups,
    table,
)
from llava_collab.training.engines import DataParallel
from llava_collab.training.recipe import OptimRecipe, TuneRecipe
from llava_collab.training.step import Counts, EmptyStepError, accumulate, count, reduce_gradients, total_loss

EXPERT = {"bottleneck": 4, "code_width": 8}


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def test_loss_and_gradient_do_not_depend_on_the_cut(tmp_path: Path, accelerator: Accelerator) -> None:
    model, processor = build(ModelSpec(visual_expert=EXPERT, language_expert=EXPERT))
    for name, parameter in model.named_parameters():
        if name.endswith("decoder_weight"):
            nn.init.normal_(parameter, std=0.1)  # at its start the generator has no gradient to compare
    trainable = choose_trainable(model.train(), TuneRecipe())
    dataset = ConversationDataset(read_samples(write_shapes(tmp_path, 8)), processor, max_length=256)
    samples = [dataset[i] for i in range(8)]
    assert len({int((s["labels"] != -100).sum()) for s in samples}) > 2, "ragged labels, or the test proves nothing"
    engine = DataParallel(None, accelerator)
    engine.model, engine.trainable, found = model, trainable, {}
    for size in (8, 4, 1):
        micro_batches = MicroBatches(Collator(processor.tokenizer.pad_token_id), size)(samples)
        assert len(micro_batches) == 8 // size
        counts = count(micro_batches, accelerator)
        model.zero_grad()
        losses = accumulate(engine, micro_batches, counts.supervised)
        assert reduce_gradients(trainable, accelerator) == set()
        found[size] = total_loss(losses, accelerator), {name: g.clone() for name, p in trainable.items() if (g := p.grad) is not None}
        assert (counts.samples, counts.images) == (8, 7)
    for size in (4, 1):
        assert found[size][0] == pytest.approx(found[8][0], rel=1e-6)
        for name, gradient in found[8][1].items():
            torch.testing.assert_close(found[size][1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_counts_what_the_shifted_loss_sees(accelerator: Accelerator) -> None:
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[5, -100, 6, 7], [-100, 8, -100, -100]]),
        "image_features": torch.zeros(3, 2, 2),
    }
    assert count([batch], accelerator) == Counts(supervised=3, tokens=6, positions=8, samples=2, images=3, squares=32, stop=0)
    assert count([batch], accelerator, stop=True).stop == 1
    batch["labels"] = torch.full((2, 4), -100)
    with pytest.raises(EmptyStepError, match="without any supervised token; its samples on this rank: a, b"):
        count([batch | {"sample_ids": ["a", "b"]}], accelerator)


@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (20, 0.25), (7, 0.0)])
def test_schedule_is_transformers_cosine(steps: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, -int(-steps * ratio // 1), steps)
    for step in range(1, steps + 1):
        assert learning_rate_factor(step, steps, ratio) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_groups_hold_every_parameter_once_at_its_rate() -> None:
    model, _ = build(ModelSpec(visual_expert=EXPERT, language_expert=EXPERT))
    trainable = choose_trainable(model, TuneRecipe())
    groups = parameter_groups(trainable, OptimRecipe(lr=1e-4, mm_projector_lr=1e-5, expert_lr_multiplier=5, weight_decay=0.1))
    assert sorted(name for group in groups for name in group["names"]) == sorted(trainable)
    peaks = {group["component"]: group["peak_lr"] for group in groups}
    assert peaks == pytest.approx({"projector": 1e-5, "visual_expert": 5e-4, "llm": 1e-4, "language_expert": 5e-4})
    apart = parameter_groups(trainable, OptimRecipe(lr=1e-4, visual_expert_lr=3e-6, expert_lr_multiplier=5))
    assert {group["component"]: group["peak_lr"] for group in apart} == pytest.approx(
        {"projector": 1e-4, "visual_expert": 3e-6, "llm": 1e-4, "language_expert": 5e-4}
    )
    for group in groups:
        decays = {p.ndim >= 2 and not n.endswith("bias") for n, p in zip(group["names"], group["params"], strict=True)}
        assert decays == {group["weight_decay"] > 0}


@pytest.mark.parametrize(
    ("tune", "learns"),
    [
        (TuneRecipe(llm="frozen"), {"projector", "visual_expert", "language_expert"}),
        (TuneRecipe(projector="frozen", visual_expert=False, language_expert=False), {"llm"}),
        (TuneRecipe(llm="frozen", unfreeze_vision_tower=True), {"projector", "visual_expert", "language_expert", "vision_tower"}),
    ],
)
def test_what_learns(tune: TuneRecipe, learns: set[str]) -> None:
    model, _ = build(ModelSpec(visual_expert=EXPERT, language_expert=EXPERT))
    assert {component_of(name) for name in choose_trainable(model, tune)} == learns
    for line in table(model).splitlines():
        assert ("TRAINABLE" in line) == (line.split()[1] in learns)


def test_nothing_to_train_and_unknown_parts_are_errors() -> None:
    model, _ = build(ModelSpec())
    with pytest.raises(ValueError, match="nothing to train"):
        choose_trainable(model, TuneRecipe(projector="frozen", llm="frozen"))
    model.model.novelty = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.novelty\.weight"):
        choose_trainable(model, TuneRecipe())


def test_experts_can_be_clipped_apart() -> None:
    trainable = {
        "model.language_expert.base": nn.Parameter(torch.zeros(4)),
        "model.multi_modal_projector.linear_1.weight": nn.Parameter(torch.zeros(2, 2)),
    }
    for parameter in trainable.values():
        parameter.grad = torch.full_like(parameter, 5.0)  # norm 10 each
    clip(trainable, gradient_norms(trainable), OptimRecipe(clip_norm=1.0, expert_clip_norm=0.1))
    norms = {name: float(norm) for name, norm in gradient_norms(trainable).items()}
    assert norms == pytest.approx({"language_expert": 0.1, "projector": 1.0}, rel=1e-4)
    for parameter in trainable.values():
        parameter.grad = torch.full_like(parameter, 5.0)
    clip(trainable, gradient_norms(trainable), OptimRecipe(clip_norm=1.0))
    assert sum(float(n) ** 2 for n in gradient_norms(trainable).values()) == pytest.approx(1.0, rel=1e-4)
