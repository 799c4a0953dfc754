"""The layer of LoRA, MoELoRA, HydraLoRA and TeamLoRA against loops that a reader would write from the equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_collab.adapters import METHODS, AdapterConfig, LowRankConfig, LowRankExperts, RoutingContext, checkpoint_context

IN, OUT = 12, 10
ROUTED = [name for name in METHODS if name != "lora"]


def experts(method: str = "teamlora", *, trained: bool = True, **settings: object) -> LowRankExperts:
    """float64, in eval mode; `trained`: B is not zero, and M is far from its start."""
    torch.manual_seed(0)
    layer = LowRankExperts(IN, OUT, LowRankConfig.read({"method": method, "rank": 3, "alpha": 5.0, **settings})).double().eval()
    if trained:
        nn.init.normal_(layer.up)
        if layer.interaction is not None:
            nn.init.normal_(layer.interaction, std=0.5)
    return layer


def loop(layer: LowRankExperts, x: Tensor) -> Tensor:
    """The update of one token x [I] as the papers write it: one expert after the other."""
    config, k, r = layer.config, layer.config.experts, layer.config.rank
    a, router = layer.down[: config.down_rank], layer.down[config.down_rank :]
    if config.routing == "uniform":
        w = [1.0 / k] * k
    else:
        scores = [float(row @ x) for row in router]
        top = sum(torch.tensor(scores).double().exp())
        phi = [float(torch.tensor(score).double().exp() / top) for score in scores]
        w = list(phi)
        if layer.interaction is not None:
            for i in range(k):
                for j in range(k):
                    m = float(layer.interaction[j, i])
                    if config.interaction == "bounded":
                        m = 0.0 if i == j else float(torch.tensor(m).double().tanh())
                    w[i] += phi[j] * m
            if config.interaction == "bounded":
                w = [max(weight, 1e-4) for weight in w]
            if config.normalise:
                w = [weight / sum(w) for weight in w] if sum(w) > 1e-4 else phi
    w = [k * weight if config.scale_by_k else weight for weight in w]
    total = torch.zeros(OUT, dtype=x.dtype)
    for i in range(k):
        own = a[i * r : (i + 1) * r] if config.split else a
        total = total + w[i] * (layer.up[:, i * r : (i + 1) * r] @ (own @ x))
    return total * config.alpha / r


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"alpha": 1}, {"experts": 2}, {"rank": 1}], ids=str)
def test_two_products_equal_the_loop(method: str, settings: dict) -> None:
    if method == "lora":
        settings = {key: value for key, value in settings.items() if key != "experts"}
    layer = experts(method, **settings)
    x, static = torch.randn(2, 5, IN).double(), torch.randn(2, 5, OUT).double()
    expected = torch.stack([loop(layer, token) for token in x.flatten(0, 1)]).view(2, 5, OUT)
    torch.testing.assert_close(layer(x, static) - static, expected, rtol=1e-6, atol=1e-6)  # phi is made in fp32


@pytest.mark.parametrize("switch", [{"normalise": False}, {"scale_by_k": False}, {"interaction": "none"}, {"split": False}], ids=str)
def test_every_switch_of_teamlora_equals_the_loop(switch: dict) -> None:
    layer = experts("teamlora", **switch)
    x = torch.randn(4, IN).double()
    expected = torch.stack([loop(layer, token) for token in x])
    torch.testing.assert_close(layer(x, torch.zeros(4, OUT).double()), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, torch.stack([loop(experts("teamlora"), token) for token in x]))


def test_collaboration_is_moelora_with_its_matrices_side_by_side() -> None:
    """TeamLoRA without its interaction = k pairs (A_i, B_i) and a router, the layer that MoELoRA runs as 2 k products."""
    layer = experts("moelora", experts=4)
    config, x = layer.config, torch.randn(7, IN).double()
    pairs = [(layer.down[3 * i : 3 * i + 3], layer.up[:, 3 * i : 3 * i + 3]) for i in range(4)]
    w = F.linear(x, layer.down[config.down_rank :]).float().softmax(-1).double()
    expected = sum(w[:, i : i + 1] * F.linear(F.linear(x, a), b) for i, (a, b) in enumerate(pairs)) * layer.scale
    torch.testing.assert_close(layer(x, torch.zeros(7, OUT).double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_layer_adds_exactly_nothing_but_learns(method: str) -> None:
    layer = experts(method, trained=False).train()
    x, static = torch.randn(5, IN).double(), torch.randn(5, OUT).double()
    out = layer(x, static)
    assert torch.equal(out, static)
    out.square().sum().backward()
    assert layer.up.grad is not None and layer.up.grad.abs().sum() > 0


def test_uniform_weights_are_lora_of_rank_k_r() -> None:
    """Interaction none, a router that prefers nobody, scaled by k: the plain LoRA of all columns, scale alpha / r."""
    layer, x = experts("teamlora", interaction="none"), torch.randn(5, IN).double()
    with torch.no_grad():
        layer.down[layer.config.down_rank :] = 0
    expected = x @ layer.down[:12].T @ layer.up.T * (5.0 / 3)
    torch.testing.assert_close(layer(x, torch.zeros(5, OUT).double()), expected, rtol=1e-12, atol=1e-12)
    plain = experts("teamlora", interaction="none", routing="uniform")
    with torch.no_grad():
        plain.down.copy_(layer.down[:12])
        plain.up.copy_(layer.up)
    torch.testing.assert_close(plain(x, torch.zeros(5, OUT).double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "settings", "millions", "percent"),
    [
        ("lora", {"rank": 32}, 46.4, 0.67),
        ("lora", {"rank": 128}, 185.6, 2.68),
        ("moelora", {"rank": 32}, 188.1, 2.71),
        ("hydralora", {"rank": 32}, 129.1, 1.86),  # the paper prints 1.84, HydraLoRA's own layer may differ
        ("teamlora", {"rank": 32}, 188.1, 2.71),
        ("teamlora", {"rank": 16}, 95.3, 1.375),  # the paper prints 1.35
    ],
)
def test_parameter_counts_are_the_papers(method: str, settings: dict, millions: float, percent: float) -> None:
    """TeamLoRA's table: FFN of LLaMA-2-7B with 55,296 tokens, 6.929 B parameters, k = 4."""
    config, count = LowRankConfig.read({"method": method, **settings}), 0
    with torch.device("meta"):
        for shape in ((4096, 11008), (4096, 11008), (11008, 4096)):
            count += 32 * sum(p.numel() for p in LowRankExperts(*shape, config).parameters())
    assert round(count / 1e6, 1) == millions
    assert 100 * count / 6.929e9 == pytest.approx(percent, abs=0.006)


def adversarial(value: float) -> Tensor:
    return torch.full((4, 4), value).double()


@pytest.mark.parametrize("settings", [{}, {"interaction": "free"}, {"normalise": False}, {"scale_by_k": False}], ids=str)
@pytest.mark.parametrize("value", [-1 / 3, -0.5, -1.0, -1e4, 1e4, 1e38, -1e38, float("inf")])
def test_no_interaction_matrix_gives_a_weight_that_is_no_number(settings: dict, value: float) -> None:
    layer = experts("teamlora", **settings)
    assert layer.interaction is not None
    with torch.no_grad():
        layer.interaction.copy_(adversarial(value))
        if "interaction" in settings:
            layer.interaction.fill_diagonal_(0.0)
    w = layer.weights(torch.randn(50, 4))
    assert w.isfinite().all()
    if layer.config.normalise:
        torch.testing.assert_close(w.sum(-1), torch.full((50,), 4.0 if layer.config.scale_by_k else 1.0), rtol=1e-4, atol=1e-3)
    if layer.config.interaction == "bounded":
        assert (w > 0).all()


def test_the_bounded_interaction_has_no_diagonal_and_leaves_gradients() -> None:
    layer = experts("teamlora")
    assert layer.interaction is not None
    scores = torch.randn(6, 4)
    before = layer.weights(scores)
    (before * torch.randn(6, 4)).sum().backward()
    gradient = layer.interaction.grad
    assert gradient is not None and (gradient.diagonal() == 0).all() and (gradient.fill_diagonal_(1) != 0).all()
    with torch.no_grad():
        layer.interaction.fill_diagonal_(9.0)
    torch.testing.assert_close(layer.weights(scores), before)


def test_a_frozen_interaction_is_saved_and_does_not_learn() -> None:
    layer = experts("teamlora", train_interaction=False)
    assert "interaction" in layer.state_dict() and "interaction" not in dict(layer.named_parameters())


def test_weights_are_made_in_fp32() -> None:
    layer = experts("moelora").bfloat16()
    assert layer.weights(torch.randn(3, 4).bfloat16()).dtype == torch.float32
    assert layer(torch.randn(3, IN).bfloat16(), torch.zeros(3, OUT).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["rank", "input"])
def test_dropout_is_of_training_only_and_keeps_the_mean(place: str) -> None:
    layer = experts("moelora", dropout=0.5, dropout_at=place)
    x, zero = torch.randn(1, IN).double(), torch.zeros(1, OUT).double()
    still = layer(x, zero)
    torch.testing.assert_close(layer(x, zero), still)
    layer.train()
    many = torch.cat([layer(x.expand(500, -1), zero.expand(500, -1)) for _ in range(20)])
    assert many.std(0).min() > 0
    assert ((many.mean(0) - still[0]).abs() < 5 * many.std(0) / 100).all()  # five standard errors of 10,000 draws


class Two(nn.Module):
    """Two adapted layers in a row, the first of them checkpointed if asked."""

    def __init__(self, config: LowRankConfig, again: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers, self.again = nn.ModuleList([LowRankExperts(IN, IN, config), LowRankExperts(IN, IN, config)]), again
        for layer in self.layers:
            nn.init.normal_(layer.up, std=0.3)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            run = lambda x, layer=layer: layer(x, x).tanh()  # noqa: E731
            x = checkpoint(run, x, use_reentrant=False, context_fn=checkpoint_context) if self.again else run(x)  # pyright: ignore
        return x


@pytest.mark.parametrize("settings", [{"balance": 0.3}, {"routing": "sample"}, {"routing": "sample", "balance": 0.3}], ids=str)
def test_checkpointing_changes_neither_loss_nor_gradients(settings: dict) -> None:
    mask, x, results = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.randn(2, 4, IN), []
    for again in (False, True):
        model = Two(LowRankConfig.read({"rank": 3, "dropout": 0.0, **settings}), again)
        with RoutingContext(mask) as context:
            loss = model(x).square().sum()
        extra = context.balance_loss()
        assert (extra is None) == ("balance" not in settings)
        loss = loss if extra is None else loss + extra
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_the_balance_loss_is_zero_at_uniform_routing_and_blind_to_padding() -> None:
    layer = experts("teamlora", interaction="none", balance=1.0)
    x, zero = torch.randn(2, 6, IN).double(), torch.zeros(2, 6, OUT).double()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

    def balance(x: Tensor, mask: Tensor | None) -> float:
        with RoutingContext(mask) as context:
            layer(x, zero[:, : x.shape[1]])
        loss = context.balance_loss()
        assert loss is not None
        return float(loss)

    found = balance(x, mask)
    assert found > 1e-4
    changed = x.clone()
    changed[0, 4:] = 100.0
    assert balance(changed, mask) == pytest.approx(found, rel=1e-6)
    assert balance(changed, None) != pytest.approx(found, rel=1e-2)
    with RoutingContext():
        w = layer.weights(F.linear(x, layer.down[12:])).detach()
    mean = w.flatten(0, 1)[mask.flatten().bool()].mean(0)
    assert found == pytest.approx(float((mean - 1).square().mean()), rel=1e-5)
    with torch.no_grad():
        layer.down[12:] = 0
    assert balance(x, mask) == pytest.approx(0, abs=1e-12)


def test_routing_by_sample_reads_the_prompt_alone() -> None:
    layer = experts("teamlora", routing="sample")
    x, zero = torch.randn(2, 5, IN).double(), torch.zeros(2, 5, OUT).double()
    prompt = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    with RoutingContext(prompt_BT=prompt):
        out = layer(x, zero)
    for row in range(2):  # the mean of the prompt, put in as the only token, has these weights
        mean = x[row][prompt[row].bool()].mean(0, keepdim=True)
        with RoutingContext():
            expected = layer.weights(F.linear(mean[None], layer.down[12:]))[0, 0]
        z = F.linear(x[row], layer.down[:12]).view(5, 4, 3) * expected[:, None].double()
        torch.testing.assert_close(out[row], z.flatten(1) @ layer.up.T * layer.scale, rtol=1e-6, atol=1e-6)
    later = x.clone()
    later[:, 3:] += 1.0
    with RoutingContext(prompt_BT=prompt):
        torch.testing.assert_close(layer(later, zero)[:, :3], out[:, :3])


def test_a_generation_keeps_its_prefills_weights() -> None:
    layer = experts("teamlora", routing="sample")
    x = torch.randn(1, 4, IN).double()
    zero = torch.zeros(1, 4, OUT).double()
    with torch.no_grad(), RoutingContext(prompt_BT=torch.tensor([[1, 1, 1, 0]])):
        whole = layer(x, zero)
    with torch.no_grad(), RoutingContext(prompt_BT=torch.tensor([[1, 1, 1]])):
        parts = [layer(x[:, :3], zero[:, :3]), layer(x[:, 3:], zero[:, 3:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with torch.no_grad(), RoutingContext(), pytest.raises(ValueError, match="open a new one"):
        layer(x, zero)
        layer(x.expand(2, -1, -1), zero.expand(2, -1, -1))


def test_what_needs_a_context_says_so() -> None:
    for settings in ({"routing": "sample"}, {"balance": 0.1}):
        with pytest.raises(RuntimeError, match="RoutingContext"):
            experts("teamlora", **settings)(torch.randn(2, IN).double(), torch.zeros(2, OUT).double())
    with torch.no_grad():  # balancing is of training
        experts("teamlora", balance=0.1)(torch.randn(2, IN).double(), torch.zeros(2, OUT).double())
    layer = experts("teamlora", routing="sample")
    with RoutingContext(torch.ones(2, 3)), pytest.raises(ValueError, match=r"mask has shape \(2, 3\)"):
        layer(torch.randn(2, 4, IN).double(), torch.zeros(2, 4, OUT).double())


def test_the_load_is_the_mean_weight_of_real_positions() -> None:
    layer, x = experts("moelora"), torch.randn(2, 3, IN).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with RoutingContext(mask, watch=True) as context:
        layer(x, torch.zeros(2, 3, OUT).double())
    sums, count = context.load[layer]
    assert count == 3
    torch.testing.assert_close(sums, layer.weights(F.linear(x, layer.down[12:]))[mask.bool()].sum(0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "teamlira"}, "method"),
        ({"rnk": 4}, "unknown keys"),
        ({"rank": 0}, "at least 1"),
        ({"rank": "8"}, "must be int"),
        ({"rank": True}, "must be int"),
        ({"experts": 1}, "uniform"),
        ({"dropout": 1.0}, "dropout"),
        ({"balance": -1.0}, "balance"),
        ({"routing": "expert"}, "routing"),
        ({"target": []}, "target"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig.read(given)


@pytest.mark.parametrize("method", ROUTED)
def test_routed_experts_refuse_to_be_merged(method: str) -> None:
    with pytest.raises(ValueError, match="no merge"):
        experts(method).factors()
