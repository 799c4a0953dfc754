"""Packed rows: every sample comes out, and teaches, as it does alone; what can't be right is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import BOTH, PAD, PATCHES, pixels, prompt, toy_config, toy_model
from transformers import modeling_flash_attention_utils as flash_utils

from llava_collab.data.collate import Batch, Collator
from llava_collab.models import HyperLlavaForConditionalGeneration
from llava_collab.models.build import extract_features
from llava_collab.models.packing import read_segments

LAYOUTS = {"two rows": [[0, 1], [2, 3, 4]], "one row": [[0, 1, 2, 3, 4]], "one alone": [[0, 1, 2, 3], [4]]}


def samples(seed: int = 0) -> list[dict[str, Any]]:
    """Five conversations with 1, 0, 2, 1 and 0 images; the text after the question is the answer."""
    made = []
    for number, (images, length) in enumerate(((1, 9), (0, 14), (2, 6), (1, 17), (0, 5))):
        ids = prompt(length, images, seed=10 * seed + number)
        asked = torch.arange(len(ids)) < 1 + images * PATCHES + 3
        sample = {"sample_id": f"s{number}", "input_ids": ids, "labels": ids.masked_fill(asked, -100), "guidance_mask": asked}
        made.append(sample | ({"pixel_values": pixels(images, seed=10 * seed + number)} if images else {}))
    return made


def alone(made: list[dict[str, Any]]) -> Batch:
    return Collator(PAD)(made)


def pack(made: list[dict[str, Any]], layout: list[list[int]]) -> Batch:
    return Collator(PAD).pack([[made[index] for index in row] for row in layout])


def run(model: HyperLlavaForConditionalGeneration, batch: Batch, **more: Any) -> Any:
    inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs, supervised_logits_only=True, num_items_in_batch=50, **more)


def learn(model: HyperLlavaForConditionalGeneration, batch: Batch) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = run(model, batch)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exact(model: HyperLlavaForConditionalGeneration) -> HyperLlavaForConditionalGeneration:
    """In float64, where only the generators round (they stay in fp32): what is the same by construction is the same to many digits."""
    return model.train().double()


def assert_same(packed: tuple[Any, dict[str, torch.Tensor]], plain: tuple[Any, dict[str, torch.Tensor]], close: float = 1e-6) -> None:
    """Loss, logits of supervised tokens, and every parameter's gradient by its norm."""
    torch.testing.assert_close(packed[0].loss, plain[0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed[0].logits, plain[0].logits, rtol=close, atol=close)
    assert packed[1].keys() == plain[1].keys()
    largest = max(gradient.norm() for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        error = (packed[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-2 * largest)  # a key's bias, say, has noise alone
        assert error < close, f"{name}: {error:.1e} of {gradient.norm():.1e}"


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "qwen3", "mistral"])
def test_in_fp32_and_under_autocast_as_well(decoder: str) -> None:
    model = toy_model(decoder, **BOTH).train()
    plain = learn(model, alone(samples()))
    for layout in LAYOUTS.values():
        assert_same(learn(model, pack(samples(), layout)), plain, close=3e-5)  # rounding, most of it in the vision tower
    with torch.autocast("cpu", torch.bfloat16):
        rough = learn(model, pack(samples(), LAYOUTS["two rows"]))
    torch.testing.assert_close(rough[0].loss, plain[0].loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "qwen3", "mistral"])
def test_losses_logits_and_gradients_are_those_of_samples_alone(decoder: str, attention: str) -> None:
    model = exact(toy_model(decoder, **BOTH))
    model.set_attn_implementation(attention)
    plain = learn(model, alone(samples()))
    assert all(gradient.any() for name, gradient in plain[1].items() if "_expert" in name), "the experts must matter, or nothing is shown"
    for layout in LAYOUTS.values():
        assert_same(learn(model, pack(samples(), layout)), plain)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(learn(model, pack(samples(), LAYOUTS["two rows"])), plain)


@pytest.mark.parametrize("generator", ["shared", "per_layer", "factorised"])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
@pytest.mark.parametrize("mode", ["dynamic", "static", "constant"])
def test_every_kind_of_expert(generator: str, activation: str, mode: str) -> None:
    small = {"bottleneck": 4, "code_width": 8, "generator": generator, "activation": activation, "mode": mode}
    model = exact(toy_model(visual_expert=small, language_expert=small))
    assert_same(learn(model, pack(samples(), LAYOUTS["two rows"])), learn(model, alone(samples())))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": "last_prompt_token"},
        {"guidance_layer": 1},
        {"guidance": "last_prompt_token", "guidance_layer": 0},
        {"layers": "all"},
    ],
)
def test_guidance_of_every_kind(settings: dict[str, Any]) -> None:
    model = exact(toy_model(language_expert=BOTH["language_expert"] | {"detach": False} | settings))
    assert_same(learn(model, pack(samples(), LAYOUTS["two rows"])), learn(model, alone(samples())))
    for batch in (made := alone(samples())), (packed := pack(samples(), LAYOUTS["one row"])):
        del batch["guidance_mask"]  # then the labels say where a sample's prompt ends
    assert_same(learn(model, packed), learn(model, made))


@pytest.mark.parametrize("experts", [{}, {"visual_expert": BOTH["visual_expert"]}])
def test_models_without_a_language_expert(experts: dict[str, dict]) -> None:
    model = exact(toy_model(**experts))
    assert_same(learn(model, pack(samples(), LAYOUTS["two rows"])), learn(model, alone(samples())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
def test_sliding_windows_stay_inside_a_sample(decoder: str, attention: str) -> None:
    config = toy_config(decoder, **BOTH)
    text: Any = config.text_config
    text.sliding_window = 7
    if decoder == "qwen2":
        text.use_sliding_window, text.layer_types = True, ["full_attention"] * 2 + ["sliding_attention"] * 2
    wide = toy_model(decoder, **BOTH)
    model = HyperLlavaForConditionalGeneration(config)
    model.load_state_dict(wide.state_dict())
    model.train().set_attn_implementation(attention)
    plain = learn(model, alone(samples()))
    assert (plain[0].logits - run(wide, alone(samples())).logits).abs().max() > 1e-2, "the window must matter, or nothing is shown"
    assert_same(learn(model, pack(samples(), LAYOUTS["two rows"])), plain, close=3e-5)


def test_cached_features_and_embeddings_pack_too() -> None:
    model = toy_model(**BOTH)
    expected = run(model, alone(samples())).logits
    cached = [dict(sample) for sample in samples()]
    for sample in cached:
        if "pixel_values" in sample:
            sample["image_features"] = extract_features(model, sample.pop("pixel_values"))
    batch = pack(cached, LAYOUTS["two rows"])
    torch.testing.assert_close(run(model, batch).logits, expected, rtol=1e-5, atol=1e-5)
    text_only = [samples()[1], samples()[4]]
    batch = pack(text_only, [[0, 1]])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = run(model, Batch({k: v for k, v in batch.items() if k != "input_ids"}), inputs_embeds=embeds)
    torch.testing.assert_close(by_embeds.logits, run(model, alone(text_only)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sample_sees_nothing_of_its_neighbours(attention: str) -> None:
    model = toy_model(language_expert=BOTH["language_expert"] | {"detach": False})
    model.set_attn_implementation(attention)
    own, others = samples(), samples(seed=1)
    for place in range(5):
        mixed = [own[number] if number == place else others[number] for number in range(5)]
        first, second = (run(model, pack(made, LAYOUTS["one row"])) for made in (own, mixed))
        counts = [int((sample["labels"] != -100).sum()) for sample in own]
        at = slice(sum(counts[:place]), sum(counts[: place + 1]))
        assert torch.equal(first.logits[at], second.logits[at])
        assert not torch.equal(first.logits, second.logits)
        for before, after in zip(first.expert_weights, second.expert_weights, strict=True):
            assert torch.equal(before[place], after[place])


def test_no_gradient_reaches_a_neighbour() -> None:
    """The loss of one sample alone, differentiated by every position's embedding."""
    model = toy_model(language_expert=BOTH["language_expert"] | {"detach": False})
    batch = pack([sample for sample in samples() if "pixel_values" not in sample], [[0, 1]])
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch["labels"] = batch["labels"].masked_fill(batch["segment_ids"] == 1, -100)
    run(model, batch, inputs_embeds=embeds).loss.backward()
    assert embeds.grad is not None
    reached = embeds.grad.abs().sum(-1) > 0
    assert torch.equal(reached[:, :-1], (batch["segment_ids"] == 2)[:, :-1])


def test_one_generator_call_writes_weights_for_every_sample() -> None:
    model = toy_model(**BOTH).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expert: Any = model.model.language_expert
    guidance: list[torch.Tensor] = []
    expert.register_forward_hook(lambda _module, args, _out: guidance.append(args[0]))
    learn(model, pack(samples(), LAYOUTS["two rows"]))
    assert [tuple(vectors.shape) for vectors in guidance] == [(5, 64)]
    plain = run(model, alone(samples())).expert_weights
    packed = run(model, pack(samples(), LAYOUTS["two rows"])).expert_weights
    for expected, found in zip(plain, packed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    given = run(model, pack(samples(), LAYOUTS["two rows"]), expert_weights=plain)
    torch.testing.assert_close(given.logits, run(model, alone(samples())).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="of 4 samples, the batch has 5"):
        run(model, pack(samples(), LAYOUTS["two rows"]), expert_weights=tuple(weights[:4] for weights in plain))


def test_labels_everywhere_never_teach_the_next_samples_first_token() -> None:
    model = toy_model(**BOTH)
    made = [sample | {"labels": sample["input_ids"]} for sample in samples() if "pixel_values" not in sample]
    packed, plain = pack(made, [[0, 1]]), alone(made)
    packed["labels"] = packed["input_ids"].clone()  # as one would write it who does not know
    for few in (True, False):
        losses = []
        for batch in (packed, plain):
            inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
            labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
            losses.append(model(**inputs | {"labels": labels}, supervised_logits_only=few).loss)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """transformers' own flash path with a kernel of plain torch in it; returns the boundaries that it was called with."""
    calls: list[list[int]] = []

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
        bounds = given["cu_seqlens_q"].tolist()
        assert given["causal"] and torch.equal(given["cu_seqlens_q"], given["cu_seqlens_k"]) and given["cu_seqlens_q"].dtype == torch.int32
        assert given["max_seqlen_q"] == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        calls.append(bounds)
        parts = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            q_HTD, k_HTD, v_HTD = (x[start:end].transpose(0, 1) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q_HTD[None], k_HTD[None], v_HTD[None], is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    def other(*_: Any, **__: Any) -> Any:
        raise AssertionError("packed rows must reach the kernel that takes boundaries")

    def lazy(*_: Any, **__: Any) -> Any:
        return kernels

    def process(**given: Any) -> dict[str, Any]:
        return {"causal": given["is_causal"], "max_seqlen_q": given.get("max_seqlen_q"), "max_seqlen_k": given.get("max_seqlen_k")}

    paged = "process_paged_kwargs_fn" in flash_utils._flash_attention_forward.__code__.co_varnames  # in newer transformers
    kernels = ((other, varlen, other, other, other), (process, process) if paged else process)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lazy)
    return calls


def test_flash_kernels_get_the_boundaries(flash_on_cpu: list[list[int]]) -> None:
    model = exact(toy_model(**BOTH))
    plain = learn(model, alone(samples()))
    model.config.text_config._attn_implementation = "flash_attention_2"
    for layout, expected in (("one row", [0, 26, 41, 80, 114, 120]), ("two rows", [0, 26, 41, 79, 118, 152, 158])):
        flash_on_cpu.clear()
        assert_same(learn(model, pack(samples(), LAYOUTS[layout])), plain)
        assert flash_on_cpu == [expected] * 4, "every layer, padding as a run of its own"


def test_what_can_not_be_right_is_refused() -> None:
    model = toy_model(**BOTH)
    batch = pack(samples(), LAYOUTS["two rows"])
    ids = batch["segment_ids"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"segment_ids": ids[:, :-1]}, r"segment_ids has shape \(2, 78\), the batch \(2, 79\)"),
        ({"segment_ids": ids + 1}, "must number a row's segments 1, 2, 3"),
        ({"segment_ids": ids.flip(1)}, "must number a row's segments 1, 2, 3"),
        ({"segment_ids": ids * 2}, "must number a row's segments 1, 2, 3"),
        ({"segment_ids": ids * 0}, "must number a row's segments 1, 2, 3"),
        ({"attention_mask": torch.ones_like(ids)}, "attention_mask must be 1 exactly where"),
        ({"attention_mask": torch.ones(2, 1, 79, 79)}, "attention_mask has shape"),
        ({"position_ids": torch.arange(79).expand(2, -1)}, "position_ids must start again at 0"),
        ({"position_ids": torch.arange(79)[None]}, "position_ids has shape"),
        ({"guidance_mask": batch["guidance_mask"][:, 1:]}, r"a tensor of shape \(2, 78\) beside segment_ids"),
        ({"use_cache": True}, "keep no cache"),
        ({"past_key_values": run(model, alone(samples()), use_cache=True).past_key_values}, "keep no cache"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run(model, Batch({key: value for key, value in batch.items() if key not in change}), **change)
    run(model, Batch({key: value for key, value in batch.items() if key not in ("attention_mask", "position_ids")}))
    with pytest.raises(ValueError, match="generate takes one sample a row"):
        model.generate(batch["input_ids"], segment_ids=ids)
    for name, value, message in (
        ("model_type", "mamba", "a mamba decoder"),
        ("_attn_implementation", "flex_attention", "'flex_attention'"),
    ):
        broken = toy_model()
        setattr(broken.model.language_model.config, name, value)
        with pytest.raises(ValueError, match=message):
            run(broken, batch)


def test_spreading_and_joining_are_each_others_inverse() -> None:
    ids = torch.tensor([[1, 1, 1, 2, 0, 0], [1, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    segments = read_segments(ids, ids.shape)
    assert (segments.count, segments.longest) == (5, 3)
    assert segments.position_BT.tolist() == [[0, 1, 2, 0, 0, 0], [0, 0, 1, 0, 1, 2], [0] * 6]
    x_BTD = torch.randn(3, 6, 4)
    spread = segments.spread(x_BTD)
    assert torch.equal(spread[4], x_BTD[1, 3:]) and torch.equal(spread[1], F.pad(x_BTD[0, 3:4], (0, 0, 0, 2)))
    assert torch.equal(segments.join(spread), x_BTD * (ids > 0).unsqueeze(-1))
    assert segments.boundaries()["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 7, 9, 12, 18]
