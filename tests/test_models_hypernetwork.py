"""The hypernetwork against the equations written as loops, its initialisation, its sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import toy_model

from llava_collab.models import ExpertConfig, HyperLlavaConfig, HyperLlavaForConditionalGeneration, HyperNetwork
from llava_collab.models.hypernetwork import apply_expert, last_marked, masked_mean

D, OUT, K, C, G, L = 10, 14, 4, 6, 12, 3
GENERATORS = ["shared", "per_layer", "factorised"]


def make(trained: bool = True, **settings: Any) -> HyperNetwork:
    torch.manual_seed(0)
    config = ExpertConfig(bottleneck=K, code_width=C, **settings)
    net = HyperNetwork(guidance_width=G, in_width=D, out_width=OUT, layers=L, config=config)
    for name, parameter in net.named_parameters() if trained else ():
        if not name.startswith("encoder"):
            torch.nn.init.normal_(parameter)
    return net


def by_hand(net: HyperNetwork, guidance_G: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. 3 and 4 for one sample and layer, as a reader would write them."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).mean().add(torch.finfo(x.dtype).eps).sqrt()

    rows = 2 * K if net.config.activation == "swiglu" else K
    e = net.encoder_weight[n] @ normed(guidance_G) + net.encoder_bias[n]
    if net.config.encoder_layers == 2:
        e = net.encoder_2_weight[n] @ F.relu(e) + net.encoder_2_bias[n]
    z = normed(e) / C**0.5
    base_down, base_up = net.base[n, : rows * D].view(rows, D), net.base[n, rows * D :].view(OUT, K)
    if net.config.generator == "factorised":
        a = (net.decoder_weight @ z + net.decoder_bias).view(rows + K, C)
        return a[:rows] @ net.factor_down + base_down, (a[rows:] @ net.factor_up).T + base_up
    k = net.decoder_weight @ z + net.decoder_bias if net.config.generator == "shared" else net.decoder_weight[n] @ z
    return k[: rows * D].view(rows, D) + base_down, k[rows * D :].view(OUT, K) + base_up


def expert_by_hand(net: HyperNetwork, x_D: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    h = down @ x_D
    if net.config.activation == "swiglu":
        return up @ (F.silu(h[:K]) * h[K:])
    return up @ (F.silu(h) if net.config.activation == "silu" else F.gelu(h))


@pytest.mark.parametrize("encoder_layers", [1, 2])
@pytest.mark.parametrize("activation", ["silu", "swiglu", "gelu"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_weights_and_experts_equal_the_loop_over_samples_layers_and_tokens(generator: str, activation: str, encoder_layers: int) -> None:
    net = make(generator=generator, activation=activation, encoder_layers=encoder_layers)
    guidance_BG, x_BTD = torch.randn(5, G), torch.randn(5, 3, D)
    generated = net(guidance_BG)
    whole = net.materialise(generated)
    for b in range(5):
        for n in range(L):
            down, up = by_hand(net, guidance_BG[b], n)
            torch.testing.assert_close(whole.down[b, n], down, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(whole.up[b, n], up, rtol=1e-4, atol=1e-4)
            got_TO = apply_expert(x_BTD, generated.layers()[n], activation)[b]
            for t in range(3):
                torch.testing.assert_close(got_TO[t], expert_by_hand(net, x_BTD[b, t], down, up), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "swiglu", "gelu"])
def test_the_cheap_form_of_the_factorised_generator_is_the_materialised_product(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make(generator="factorised", activation=activation).double()
    monkeypatch.setattr(torch, "float32", torch.float64)  # what `dtype: float32` computes in
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    generated, x_BTD = net(torch.randn(2, G, dtype=torch.float64)), torch.randn(2, 7, D, dtype=torch.float64)
    assert generated.weights.down.dtype == torch.float64 and generated.weights.down.shape == (2, L, net.rows, C)
    for n in range(L):
        whole = tuple(weight[:, n] for weight in net.materialise(generated))
        torch.testing.assert_close(
            apply_expert(x_BTD, generated.layers()[n], activation), apply_expert(x_BTD, whole, activation), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("generator", GENERATORS)
def test_starts_at_exactly_zero_but_with_a_gradient(generator: str) -> None:
    net = make(trained=False, generator=generator)
    generated = net(torch.randn(2, G))
    out = apply_expert(torch.randn(2, 5, D), generated.layers()[0])
    assert torch.equal(out, torch.zeros_like(out))
    assert abs(net.materialise(generated).down[0, 0].std().item() * D**0.5 - 1) < 0.4  # b_down ~ N(0, 1/D)
    (out * torch.randn_like(out)).sum().backward()
    grown = net.factor_up if generator == "factorised" else net.decoder_weight
    assert net.base.grad is not None and net.base.grad.abs().sum() > 0
    assert grown.grad is not None and grown.grad.abs().sum() > 0


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_parameter_moves_within_three_steps(generator: str) -> None:
    net = make(trained=False, generator=generator, encoder_layers=2, activation="swiglu")
    optimizer, x_BTD, guidance_BG, goal_BTO = (
        torch.optim.SGD(net.parameters(), 0.1),
        torch.randn(4, 5, D),
        torch.randn(4, G),
        torch.randn(4, 5, OUT),
    )
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    for _ in range(3):
        generated = net(guidance_BG)
        loss = sum((apply_expert(x_BTD, generated.layers()[n], "swiglu") - goal_BTO).square().sum() for n in range(L))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in net.named_parameters())


def test_the_small_initialisation_is_almost_dead() -> None:
    net = make(trained=False, initialisation="small")
    out = apply_expert(torch.randn(2, 5, D), net(torch.randn(2, G)).layers()[0])
    assert 0 < out.abs().max() < 1e-5 and not net.base.any()


@pytest.mark.parametrize("generator", GENERATORS)
def test_static_is_the_generator_without_what_it_generates(generator: str) -> None:
    """The control C2: K(n) = b(n), the same expert as that of a hypernetwork that writes zeros, for every sample."""
    static, dynamic = make(generator=generator, mode="static"), make(generator=generator)
    assert [name for name, _ in static.named_parameters()] == ["base"]
    with torch.no_grad():
        static.base.copy_(dynamic.base)
        for name, parameter in dynamic.named_parameters():
            if not name.startswith(("encoder", "base")):
                parameter.zero_()
    guidance_BG, x_BTD = torch.randn(3, G), torch.randn(3, 5, D)
    for ours, theirs in zip(static(guidance_BG).layers(), dynamic(guidance_BG).layers(), strict=True):
        torch.testing.assert_close(apply_expert(x_BTD, ours), apply_expert(x_BTD, theirs), rtol=1e-5, atol=1e-5)


def test_constant_is_the_whole_generator_fed_with_one_guidance() -> None:
    """The control C3: as many parameters as the dynamic one, and no word of the sample in the weights."""
    net, dynamic = make(mode="constant"), make()
    a, b = net(torch.randn(1, G)), net(torch.randn(1, G))
    assert torch.equal(a.weights.down, b.weights.down) and torch.equal(a.weights.up, b.weights.up)
    assert [p.shape for p in net.parameters()] == [p.shape for p in dynamic.parameters()]
    torch.testing.assert_close(a.weights.down, dynamic(torch.ones(1, G)).weights.down)


def test_massive_dimensions_of_guidance_do_not_reach_the_weights() -> None:
    net, guidance = make(), torch.randn(1, G)
    torch.testing.assert_close(net(guidance).weights.down, net(1e4 * guidance).weights.down, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computes_in_its_own_dtype_whatever_is_around(dtype: str) -> None:
    net, guidance = make(dtype=dtype), torch.randn(2, G)
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == "float32" else torch.float16):
        low = net(guidance).weights
    assert low.up.dtype == getattr(torch, dtype) and torch.equal(low.up, net(guidance).weights.up)
    assert net.decoder_weight.dtype == torch.float32


def test_what_samples_and_layers_share_gathers_gradients_in_full_precision() -> None:
    """301 is no bf16 number: a sum over so many samples that went through bf16 would miss it."""
    static = make(mode="static")
    static(torch.randn(301, G), dtype=torch.bfloat16).weights.down.sum().backward()
    assert static.base.grad is not None and static.base.grad[:, : K * D].eq(301).all()
    factorised = make(generator="factorised")
    learned = factorised(torch.randn(2, G), dtype=torch.bfloat16)
    assert learned.weights.down.dtype == torch.bfloat16 and learned.factors is not None
    assert learned.factors.down_HD.dtype == learned.factors.base_up_LOK.dtype == torch.float32
    with torch.no_grad():
        assert {factor.dtype for factor in factorised(torch.randn(2, G), dtype=torch.bfloat16).factors} == {torch.bfloat16}


def test_pools_ignore_padding_and_empty_rows() -> None:
    x_BTD = torch.randn(3, 4, 5)
    mask_BT = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(masked_mean(x_BTD, mask_BT), torch.stack([x_BTD[0, :2].mean(0), x_BTD[1, 1:3].mean(0), torch.zeros(5)]))
    torch.testing.assert_close(last_marked(x_BTD, mask_BT), torch.stack([x_BTD[0, 1], x_BTD[1, 2], torch.zeros(5)]))


@pytest.mark.parametrize("generator", GENERATORS)
def test_statistics_see_collapse(generator: str) -> None:
    net = make(generator=generator)
    net.monitor = True
    net(torch.randn(8, G))
    assert net.statistics()["up_between_sample_variance"] > 1e-3
    net(torch.randn(1, G).expand(8, G))
    assert net.statistics()["up_between_sample_variance"] < 1e-9


def test_statistics_are_of_samples_that_have_guidance() -> None:
    """A dummy, whose guidance is zero, says nothing; one sample alone has no variance."""
    net, guidance_BG = make(), torch.randn(5, G)
    net.monitor = True
    net(guidance_BG)
    alone, whole = net.statistics(), net(guidance_BG).weights.up.detach().flatten(2)
    spread = whole.var(0).sum() / whole.mean(0).square().sum()
    assert alone["up_norm"] == pytest.approx(float(whole.norm(dim=-1).mean()), rel=1e-5)
    assert alone["up_between_sample_variance"] == pytest.approx(float(spread), rel=1e-4)
    net(torch.cat([guidance_BG, torch.zeros(3, G)]))
    assert net.statistics() == pytest.approx(alone, rel=1e-4)
    net(torch.cat([guidance_BG[:1], torch.zeros(3, G)]))
    assert set(net.statistics()) == {"down_norm", "up_norm"}
    net(torch.zeros(3, G))
    assert net.statistics() == {}


EXPERT_TENSORS_7B = {  # G1, b = 16, e = 64: encoder with bias, decoder weight + B2 + b(n), no separate W1
    "multi_modal_projector.visual_expert.encoder_weight": 1024 * 64,
    "multi_modal_projector.visual_expert.encoder_bias": 64,
    "multi_modal_projector.visual_expert.decoder_weight": 64 * 16 * (1024 + 4096),
    "multi_modal_projector.visual_expert.decoder_bias": 16 * (1024 + 4096),
    "multi_modal_projector.visual_expert.base": 16 * (1024 + 4096),
    "language_expert.encoder_weight": 16 * 4096 * 64,
    "language_expert.encoder_bias": 16 * 64,
    "language_expert.decoder_weight": 64 * 16 * (4096 + 4096),
    "language_expert.decoder_bias": 16 * (4096 + 4096),
    "language_expert.base": 16 * 16 * (4096 + 4096),
}


TEXT_7B = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
)
VISION_7B = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def test_parameter_count_of_the_7b_model() -> None:
    with torch.device("meta"):
        config = HyperLlavaConfig(text_config=TEXT_7B, vision_config=VISION_7B, visual_expert={}, language_expert={})
        model = HyperLlavaForConditionalGeneration(config)
    counts = {name.removeprefix("model."): p.numel() for name, p in model.named_parameters() if "_expert" in name}
    assert counts == EXPERT_TENSORS_7B
    assert sum(counts.values()) == 20_284_480
    assert model.model.language_expert is not None and model.model.language_expert.layers == 16
    assert [n for n, block in enumerate(model.model.language_model.layers) if hasattr(block, "expert_index")] == list(range(16, 32))


@pytest.mark.parametrize(
    ("settings", "language", "with_visual"),  # millions, counted by hand: encoders, decoders and b(n)
    [
        ({}, 14.8, 20.3),
        ({"activation": "swiglu"}, None, 26.7),
        ({"bottleneck": 64}, 46.7, 68.4),
        ({"generator": "per_layer"}, 140.5, None),
        ({"generator": "per_layer", "activation": "swiglu"}, 208.7, None),
        ({"generator": "per_layer", "bottleneck": 64}, 549.5, None),
        ({"generator": "factorised"}, 7.0, None),
        ({"generator": "factorised", "activation": "swiglu"}, 8.1, None),
        ({"generator": "factorised", "bottleneck": 64}, 13.6, None),
        ({"mode": "static"}, 2.1, None),
    ],
)
def test_parameter_counts_of_the_variants(settings: dict, language: float | None, with_visual: float | None) -> None:
    with torch.device("meta"):
        nets = [HyperNetwork(4096, 4096, 4096, 16, ExpertConfig(**settings)), HyperNetwork(1024, 1024, 4096, 1, ExpertConfig(**settings))]
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
    assert language is None or abs(counts[0] - language) <= 0.051
    assert with_visual is None or abs(sum(counts) - with_visual) <= 0.051


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({"language_expert": {"code_with": 8}}, "code_with"),
        ({"language_expert": {"bottleneck": 0}}, "positive integer"),
        ({"visual_expert": {"activation": "relu"}}, r"activation.*silu.*'relu'"),
        ({"visual_expert": {"layers": "posterior"}}, r"layers.*first.*'posterior'"),
        ({"language_expert": {"layers": "last"}}, "posterior, anterior, all or a list"),
        ({"language_expert": {"layers": [2, 1]}}, "rising block numbers"),
        ({"language_expert": {"layers": [2, 4]}}, r"does not fit a decoder of 4 blocks"),
        ({"language_expert": {"guidance_layer": 3}}, "between 0 and 2"),
        ({"language_expert": {"detach": "no"}}, "true or false"),
    ],
)
def test_settings_that_can_not_be_are_refused(experts: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        toy_model(**experts)
