"""Every switch of the two experts does what it says: each test fails where its switch is ignored."""

from typing import Any

import pytest
import torch
from toy import PATCHES, pad_batch, pixels, prompt, toy_model

from llava_collab.models import HyperLlavaForConditionalGeneration
from llava_collab.models.build import extract_features

SIZES = {"bottleneck": 4, "code_width": 8}


def visual(**settings: Any) -> HyperLlavaForConditionalGeneration:
    return toy_model(visual_expert={**SIZES, **settings})


def language(**settings: Any) -> HyperLlavaForConditionalGeneration:
    return toy_model(language_expert={**SIZES, **settings})


def single(net: HyperLlavaForConditionalGeneration, **how: Any) -> Any:
    with torch.no_grad():
        return net(input_ids=prompt(6)[None], pixel_values=pixels(1), **how)


def states(net: HyperLlavaForConditionalGeneration) -> tuple[torch.Tensor, ...]:
    return single(net, output_hidden_states=True).hidden_states


def expert(net: Any, x: torch.Tensor, guidance: torch.Tensor, layer: int = 0) -> torch.Tensor:
    down, up = (weight[:, layer] for weight in net.materialise(net(guidance)))
    return torch.nn.functional.silu(x @ down.transpose(1, 2)) @ up.transpose(1, 2)


@pytest.mark.parametrize("insertion", ["before_gelu", "after_gelu"])
@pytest.mark.parametrize("layers", ["first", "second", "both"])
def test_the_projector_is_equation_6(layers: str, insertion: str) -> None:
    projector: Any = visual(layers=layers, insertion=insertion).model.multi_modal_projector
    f_NPV = torch.randn(2, PATCHES, 32)
    g_NV, hidden = f_NPV.mean(1), projector.linear_1(f_NPV)
    first = expert(projector.visual_expert, f_NPV, g_NV) if layers != "second" else torch.zeros_like(hidden)
    gelu = torch.nn.functional.gelu
    want = projector.linear_2(gelu(hidden + first) if insertion == "before_gelu" else gelu(hidden) + first)
    if layers != "first":
        want = want + expert(projector.visual_expert_2, gelu(hidden), g_NV)
    torch.testing.assert_close(projector(f_NPV), want, rtol=1e-4, atol=1e-4)


def test_the_class_token_guides_the_visual_expert_and_is_not_projected() -> None:
    net = visual(guidance="cls")
    pixel_values = pixels(2)
    features = extract_features(net, pixel_values)
    assert features.shape[1] == PATCHES + 1
    out = net.model.multi_modal_projector(features)
    assert out.shape[1] == PATCHES
    moved = features.clone()
    moved[:, 0] += 1.0
    assert not torch.allclose(net.model.multi_modal_projector(moved), out)
    rows = pad_batch([prompt(6, seed=1), prompt(6, seed=2)])
    with torch.no_grad():
        assert torch.equal(net(**rows, pixel_values=pixel_values).logits, net(**rows, image_features=features).logits)
    mean = visual().model.multi_modal_projector
    assert torch.equal(mean.guidance(features), features.mean(1))


def test_the_class_token_is_refused_where_the_tower_is_read_without_one() -> None:
    from toy import toy_config

    config = toy_config().to_dict() | {"vision_feature_select_strategy": "full", "visual_expert": {"guidance": "cls"}}
    with pytest.raises(ValueError, match="class token"):
        type(toy_config())(**{k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype")})


@pytest.mark.parametrize(("layers", "want"), [("posterior", [2, 3]), ("anterior", [0, 1]), ("all", [0, 1, 2, 3]), ([1, 3], [1, 3])])
def test_experts_stand_in_the_blocks_that_are_named(layers: Any, want: list[int]) -> None:
    net, plain = language(layers=layers), toy_model()
    plain.load_state_dict(net.state_dict(), strict=False)
    generator: Any = net.model.language_expert
    ours, own = states(net), states(plain)
    start = min(want)
    guidance_BD = ours[start].mean(1)
    for n, block in enumerate(net.model.language_model.layers):
        assert hasattr(block, "expert_index") == (n in want)
    torch.testing.assert_close(ours[start], own[start])  # up to there nothing has changed
    block: Any = plain.model.language_model.layers[start]
    taps: list[torch.Tensor] = []
    block.mlp.register_forward_pre_hook(lambda _, args: taps.append(args[0]))
    own = states(plain)
    torch.testing.assert_close(ours[start + 1], own[start + 1] + expert(generator, taps[0], guidance_BD), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "layer", "read"), [("posterior", None, 2), ("posterior", 0, 0), ("posterior", 1, 1), ("all", None, 0), ([3], 2, 2)]
)
@pytest.mark.parametrize("pool", ["prompt_mean", "last_prompt_token"])
def test_guidance_is_pooled_where_it_is_said(layers: Any, layer: int | None, read: int, pool: str) -> None:
    net = language(layers=layers, guidance_layer=layer, guidance=pool)
    hidden = states(net)[read]
    want = net.model.language_expert(hidden[:, -1] if pool == "last_prompt_token" else hidden.mean(1)).weights
    got = single(net).expert_weights
    torch.testing.assert_close(got[0], want.down)
    torch.testing.assert_close(got[1], want.up)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["prompt_mean", "last_prompt_token"])
def test_pools_do_not_see_padding_or_answers(side: str, pool: str) -> None:
    net = language(guidance=pool)
    rows = pad_batch([prompt(6, images=0, seed=1), prompt(11, images=0, seed=2)], side)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    for b, row in enumerate(rows["attention_mask"]):
        labels[b, row.nonzero()[:4]] = -100  # four prompt tokens, then the answer
    with torch.no_grad():
        got = net(**rows, labels=labels).expert_weights[1]
        for b, row in enumerate([prompt(6, images=0, seed=1), prompt(11, images=0, seed=2)]):
            alone = net(input_ids=row[None, :4]).expert_weights[1]
            torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_layer", [None, 1])
def test_attached_guidance_sends_gradient_below_the_experts(guidance_layer: int | None) -> None:
    """With its own path cut (the expert reads zeros) a block below can only be reached through the guidance."""

    def reached(detach: bool) -> bool:
        net: Any = language(detach=detach, guidance_layer=guidance_layer).train()
        weights = net(input_ids=prompt(6)[None], pixel_values=pixels(1)).expert_weights
        embeddings = net.model.language_model.embed_tokens.weight
        (gradient,) = torch.autograd.grad(weights[1].square().sum(), embeddings, allow_unused=True)
        return gradient is not None and bool(gradient.any())

    assert reached(detach=False) and not reached(detach=True)


def test_attached_visual_guidance_reaches_the_tower() -> None:
    def gradient(detach: bool) -> torch.Tensor:
        projector: Any = visual(detach=detach).model.multi_modal_projector
        features = torch.randn(1, PATCHES, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        projector(features).square().sum().backward()
        assert features.grad is not None
        return features.grad

    assert not torch.allclose(gradient(True), gradient(False))


@pytest.mark.parametrize("part", ["visual_expert", "language_expert"])
@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"activation": "swiglu"},
        {"generator": "per_layer"},
        {"generator": "factorised"},
        {"encoder_layers": 2},
        {"mode": "static"},
        {"mode": "constant"},
        {"dtype": "bfloat16"},
        {"bottleneck": 8},
        {"code_width": 4},
    ],
)
def test_every_common_switch_reaches_the_model_and_its_file(part: str, change: dict, tmp_path: Any) -> None:
    net, usual = toy_model(**{part: {**SIZES, **change}}), toy_model(**{part: SIZES})
    logits = single(net).logits
    assert not torch.equal(logits, single(usual).logits)
    net.save_pretrained(tmp_path)
    again = HyperLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(single(again).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["visual_expert", "language_expert"])
def test_static_and_constant_experts_do_not_depend_on_the_sample(part: str) -> None:
    def weights(net: Any, seed: int) -> torch.Tensor:
        if part == "visual_expert":
            projector = net.model.multi_modal_projector
            return projector.visual_expert(projector.guidance(extract_features(net, pixels(1, seed)))).weights.up
        with torch.no_grad():
            return net(input_ids=prompt(6, seed=seed)[None], pixel_values=pixels(1, seed)).expert_weights[1]

    for mode, same in (("dynamic", False), ("static", True), ("constant", True)):
        net = toy_model(**{part: {**SIZES, "mode": mode}})
        assert torch.equal(weights(net, 0), weights(net, 1)) == same, mode


@pytest.mark.parametrize(
    "settings", [{"generator": "factorised", "activation": "swiglu"}, {"generator": "per_layer"}, {"mode": "static"}, {"guidance_layer": 1}]
)
def test_variants_generate_checkpoint_and_batch_as_the_default_does(settings: dict) -> None:
    net = toy_model(visual_expert={**SIZES, "layers": "both"}, language_expert={**SIZES, **settings})
    rows = [prompt(5, seed=1), prompt(9, seed=2)]
    batch = pad_batch(rows) | {"pixel_values": pixels(2)}
    cached = net.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, net.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False))
    beams = net.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
    alone = net.generate(input_ids=rows[0][None], pixel_values=pixels(2)[:1], max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(beams[:1, -4:], alone[:, -4:])
    gradients = []
    for reentrant in (None, True, False):
        net.zero_grad()
        net.train()
        if reentrant is not None:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        net(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    for again in gradients[1:]:
        assert again.keys() == gradients[0].keys()
        for name, gradient in again.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-5, atol=1e-6)
