"""Gradients: checkpointing changes none, the generator runs once a forward, and batches without images still touch the projector."""

import pytest
import torch
from toy import BOTH, pad_batch, pixels, prompt, toy_model


def batch() -> dict[str, torch.Tensor]:
    made = pad_batch([prompt(8, seed=1), prompt(12, images=0, seed=2)], "right")
    labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    labels[0, :22], labels[1, :8] = -100, -100
    return made | {"labels": labels, "pixel_values": pixels(1)}


def gradients(checkpointing: dict | None, **experts: dict) -> tuple[dict[str, torch.Tensor], list[int], float]:
    model = toy_model(**(experts or BOTH)).train()
    calls = [0]
    if model.model.language_expert is not None:
        model.model.language_expert.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    loss = model(**batch()).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, calls, loss.item()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_and_one_generator_call(reentrant: bool) -> None:
    plain, calls, loss = gradients(None)
    again, calls_checkpointed, loss_checkpointed = gradients({"use_reentrant": reentrant})
    assert calls == [1] and calls_checkpointed == [1]
    assert loss == loss_checkpointed and plain.keys() == again.keys()
    assert any("language_expert" in name for name in plain) and any("visual_expert" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-6, atol=1e-7)


def test_supervised_logits_only_is_the_same_loss() -> None:
    model = toy_model(**BOTH).train()
    inputs = batch()
    full = model(**inputs)
    few = model(**inputs, supervised_logits_only=True)
    assert few.logits.shape[0] == int((inputs["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(full.loss, few.loss)
    torch.testing.assert_close(
        few.loss * few.logits.shape[0] / 100, model(**inputs, supervised_logits_only=True, num_items_in_batch=100).loss
    )


def test_text_only_batches_give_image_parameters_zero_gradients() -> None:
    model = toy_model(**BOTH).train()
    inputs = pad_batch([prompt(12, images=0, seed=2)], "right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("experts", [{"visual_expert": {}}, {"language_expert": {}}])
def test_each_expert_alone_trains(experts: dict) -> None:
    model = toy_model(trained=False, **experts).train()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "_expert" in n], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
