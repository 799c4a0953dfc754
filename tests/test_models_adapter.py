"""Low-rank experts in a HyperLLaVA's own configuration: beside its experts and without them, in files, in generation, in packed rows."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import BOTH, PATCHES, pad_batch, pixels, prompt, toy_config, toy_model

from llava_collab.adapters import METHODS, LowRankExperts, RoutingContext, checkpoint_context
from llava_collab.chat import Chat
from llava_collab.models import HyperLlavaForConditionalGeneration
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.convert import convert
from llava_collab.models.delta import save_delta
from llava_collab.types import Turn

TEAM = {"method": "teamlora", "experts": 2, "rank": 3, "dropout": 0.0}


def wake(model: HyperLlavaForConditionalGeneration) -> HyperLlavaForConditionalGeneration:
    """Give the adapter's experts something to say."""
    torch.manual_seed(9)
    for module in model.modules():
        if isinstance(module, LowRankExperts):
            nn.init.normal_(module.up, std=0.1)
            nn.init.normal_(module.down, std=0.1)
    return model


def toy(**adapter: object) -> HyperLlavaForConditionalGeneration:
    return wake(toy_model(adapter=TEAM | adapter, **BOTH))


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method: str) -> None:
    plain, own = toy_model(**BOTH), toy_model(adapter={"method": method, "rank": 3}, **BOTH)
    missing, unexpected = own.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".adapter." in name for name in missing)
    inputs = {"input_ids": prompt(5)[None], "pixel_values": pixels(1)}
    assert torch.equal(own(**inputs).logits, plain(**inputs).logits)
    assert not torch.equal(wake(own)(**inputs).logits, plain(**inputs).logits)


def test_target_names_are_of_the_language_model_and_patterns_of_anything() -> None:
    def adapted(**settings: object) -> set[str]:
        model = toy_model(adapter=TEAM | settings)
        return {name.removesuffix(".adapter") for name, module in model.named_modules() if isinstance(module, LowRankExperts)}

    assert adapted() == {f"model.language_model.layers.{n}.mlp.{part}_proj" for n in range(4) for part in ("gate", "up", "down")}
    assert adapted(target=["q_proj"]) == {f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(4)}  # not the tower's
    assert adapted(target=r"(1|3)\.mlp\.up.*") == {f"model.language_model.layers.{n}.mlp.up_proj" for n in (1, 3)}
    for target in (["gate_proj", "gate"], "nowhere"):
        with pytest.raises(ValueError, match="gate_proj"):
            adapted(target=target)


@pytest.mark.parametrize("routing", ["token", "sample"])
def test_files_hold_everything(routing: str, tmp_path: Path) -> None:
    model, processor = build(ModelSpec(adapter=TEAM | {"routing": routing}), seed=1)
    wake(model)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again, _ = load(tmp_path / "whole")
    assert again.config.adapter == model.config.adapter and again.config.adapter is not None
    assert again.config.adapter["rank"] == 3 and again.config.adapter["experts"] == 2 and "method" not in again.config.adapter
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    base, _ = build(ModelSpec(), seed=1)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    save_delta(model, processor, tmp_path / "delta", tmp_path / "base", seed=1)
    small, _ = load(tmp_path / "delta")
    for name, value in model.state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name
    with pytest.raises(ValueError, match="`adapter` is on"):
        convert(tmp_path / "whole", tmp_path / "stock", to="stock")


def test_an_adapter_is_added_to_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    model, processor = build(ModelSpec(), seed=1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    one, two = (build(ModelSpec(init_from=str(tmp_path), adapter=TEAM), seed=4)[0] for _ in range(2))
    fresh = [name for name in one.state_dict() if ".adapter." in name]
    assert fresh and all(torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in fresh)
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in model.state_dict().items())
    one.save_pretrained(tmp_path / "adapted")
    processor.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match="mismatched"):
        load(tmp_path / "adapted", adapter=TEAM | {"rank": 5})


def batch(model: HyperLlavaForConditionalGeneration) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    rows = [prompt(4, seed=1), prompt(9, seed=2)]
    return pad_batch(rows) | {"pixel_values": pixels(2)}, rows


def generated(model: HyperLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("routing", ["token", "sample"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_equals_its_samples(routing: str, options: dict) -> None:
    model = toy(routing=routing)
    inputs, rows = batch(model)
    together = generated(model, inputs, **options)
    for number, row in enumerate(rows):
        alone = {
            "input_ids": row[None],
            "attention_mask": torch.ones_like(row[None]),
            "pixel_values": inputs["pixel_values"][number : number + 1],
        }
        assert torch.equal(generated(model, alone, **options)[0], together[number])


@pytest.mark.parametrize("routing", ["token", "sample"])
def test_the_cache_changes_nothing(routing: str) -> None:
    model = toy(routing=routing)
    inputs, _ = batch(model)
    with torch.no_grad():
        answer = generated(model, inputs)
        ids = torch.cat([inputs["input_ids"], answer], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
        guidance = torch.cat([inputs["attention_mask"], torch.zeros_like(answer)], 1)
        whole = model(input_ids=ids, attention_mask=mask, guidance_mask=guidance, pixel_values=inputs["pixel_values"])
    assert torch.equal(whole.logits[:, inputs["input_ids"].shape[1] - 1 : -1].argmax(-1), answer)


def test_a_cache_without_its_routing_is_refused() -> None:
    model = toy_model(adapter=TEAM | {"routing": "sample"})
    ids = prompt(4, images=0)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="outside the RoutingContext"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_missing_mask_is_that_of_transformers() -> None:
    """Without an attention mask `generate` finds the padding by itself; routing must see the same."""
    model = toy(routing="sample")
    model.generation_config.pad_token_id = 0
    inputs, _ = batch(model)
    expected = generated(model, inputs)
    del inputs["attention_mask"]
    assert torch.equal(generated(model, inputs), expected)


def test_balance_asks_nothing_of_inference() -> None:
    model = toy(balance=0.1)
    inputs, _ = batch(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, expert_weights=model(**inputs).expert_weights)
    assert torch.equal(generated(model, inputs), generated(toy(), inputs))


def test_watching_goes_through_checkpoints() -> None:
    model = toy().train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
    inputs, _ = batch(model)
    with RoutingContext(inputs["attention_mask"], watch=True) as context:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {float(count) for _, count in context.load.values()} == {float(inputs["attention_mask"].sum())}


def test_a_model_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(toy()))  # noqa: S301 (our own, made here)
    inputs, _ = batch(again)
    assert torch.equal(generated(again, inputs), generated(toy(), inputs))


def test_answers_never_route_their_own_sample() -> None:
    model = toy(routing="sample")
    row, other = prompt(8), prompt(8)
    other[-3:] = torch.tensor([50, 51, 52])
    labels = torch.full_like(row, -100)
    labels[-3:] = row[-3:]
    with torch.no_grad():
        outs = [model(input_ids=ids[None], pixel_values=pixels(1), labels=labels[None]).logits[0, :-3] for ids in (row, other)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("routing", ["token", "sample"])
def test_packed_rows_equal_their_samples(routing: str) -> None:
    model = toy(routing=routing)
    rows = [prompt(5, images=0, seed=1), prompt(9, images=0, seed=2)]
    labels = [torch.cat([torch.full((4,), -100), row[4:]]) for row in rows]
    packed = torch.cat(rows)[None]
    segments = torch.cat([torch.full_like(row, n) for n, row in enumerate(rows, start=1)])[None]
    with torch.no_grad():
        out = model(input_ids=packed, segment_ids=segments, labels=torch.cat(labels)[None])
        alone = [model(input_ids=row[None], labels=own[None]) for row, own in zip(rows, labels, strict=True)]
    torch.testing.assert_close(out.logits[0], torch.cat([one.logits[0] for one in alone]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"routing": "sample"}, {"balance": 0.3}], ids=str)
def test_checkpointing_gives_the_same_gradients(settings: dict) -> None:
    found = []
    for again in (False, True):
        model = toy(**settings).train()
        model.requires_grad_(False)
        trained = [p for name, p in model.named_parameters() if ".adapter." in name or "_expert." in name]
        for parameter in trained:
            parameter.requires_grad_(True)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs, rows = batch(model)
        labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < PATCHES + 6, -100)
        out = model(**inputs, labels=labels)
        assert (out.balance_loss is None) == ("balance" not in settings)
        out.loss.backward()
        found.append([out.loss.detach(), *(p.grad for p in trained)])
    torch.testing.assert_close(found[0], found[1])


def test_the_balance_loss_of_micro_batches_adds_up_to_their_mean() -> None:
    model = toy_model(adapter=TEAM | {"balance": 1.0}).train()
    ids = prompt(6, images=0)[None]
    labels = ids.clone()
    labels[:, :3] = -100
    supervised = int((labels[:, 1:] != -100).sum())
    whole = model(input_ids=ids, labels=labels)
    half = model(input_ids=ids, labels=labels, num_items_in_batch=2 * supervised, supervised_logits_only=True)
    torch.testing.assert_close(half.loss * 2, whole.loss)


def test_a_chat_keeps_the_first_turns_routing() -> None:
    model, processor = build(ModelSpec(adapter=TEAM | {"routing": "sample"}, **BOTH), seed=2)
    wake(model)
    chat = Chat(model, processor, max_new_tokens=5)
    first = "".join(chat.say("What is it?"))
    second = "".join(chat.say("And what else is there?"))
    turns = [Turn("user", "What is it?"), Turn("assistant", first), Turn("user", "And what else is there?")]
    encoded = processor.encode_text(turns, n_images=0, add_generation_prompt=True)
    ids = torch.tensor([encoded.input_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        guidance_mask=torch.tensor([encoded.guidance_mask]),
        max_new_tokens=5,
        do_sample=False,
    )
    assert processor.decode_answers(out[:, ids.shape[1] :], [5])[0][0] == second


def test_the_config_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown keys"):
        toy_config(adapter={"ranks": 3})
