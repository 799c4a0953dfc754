"""The hypernetwork against the equations written as loops, its initialisation, its sizes."""

import torch
import torch.nn.functional as F
from toy import toy_model

from llava_collab.models import ExpertConfig, HyperLlavaConfig, HyperLlavaForConditionalGeneration, HyperNetwork
from llava_collab.models.hypernetwork import apply_expert, masked_mean


def make(layers: int = 3, trained: bool = True) -> HyperNetwork:
    torch.manual_seed(0)
    net = HyperNetwork(guidance_width=12, in_width=10, out_width=14, layers=layers, config=ExpertConfig(bottleneck=4, code_width=6))
    if trained:
        for parameter in (net.decoder_weight, net.decoder_bias, net.base):
            torch.nn.init.normal_(parameter)
    return net


def test_weights_equal_the_loop_over_samples_and_layers() -> None:
    net, guidance_BG = make(), torch.randn(5, 12)
    weights = net(guidance_BG)
    for b in range(5):
        g = guidance_BG[b] / guidance_BG[b].pow(2).mean().add(torch.finfo(torch.float32).eps).sqrt()
        for n in range(3):
            e = net.encoder_weight[n] @ g + net.encoder_bias[n]  # Eq. 3
            z = e / e.pow(2).mean().add(torch.finfo(torch.float32).eps).sqrt() / 6**0.5
            k = net.decoder_weight @ z + net.decoder_bias + net.base[n]  # Eq. 4
            torch.testing.assert_close(weights.down_BLKD[b, n], k[:40].view(4, 10))
            torch.testing.assert_close(weights.up_BLOK[b, n], k[40:].view(14, 4))


def test_expert_equals_equation_5_per_token() -> None:
    net, x_BTD = make(), torch.randn(2, 7, 10)
    down, up = net(torch.randn(2, 12)).layer(1)
    got = apply_expert(x_BTD, down, up)
    for b in range(2):
        for t in range(7):
            torch.testing.assert_close(got[b, t], up[b] @ F.silu(down[b] @ x_BTD[b, t]))


def test_starts_at_exactly_zero_but_with_a_gradient() -> None:
    net = make(trained=False)
    down, up = net(torch.randn(2, 12)).layer(0)
    out = apply_expert(torch.randn(2, 5, 10), down, up)
    assert torch.equal(out, torch.zeros_like(out))
    assert abs(down.std().item() * 10**0.5 - 1) < 0.4  # b_down ~ N(0, 1/D)
    (out * torch.randn_like(out)).sum().backward()
    assert net.base.grad is not None and net.base.grad.abs().sum() > 0
    assert net.decoder_weight.grad is not None and net.decoder_weight.grad.abs().sum() > 0


def test_without_the_generated_part_the_expert_is_static() -> None:
    net = make()
    torch.nn.init.zeros_(net.decoder_weight)
    torch.nn.init.zeros_(net.decoder_bias)
    a, b = net(torch.randn(1, 12)), net(torch.randn(1, 12))
    assert torch.equal(a.down_BLKD, b.down_BLKD) and torch.equal(a.up_BLOK, b.up_BLOK)
    assert torch.equal(a.down_BLKD.flatten(), net.base[:, :40].flatten())


def test_massive_dimensions_of_guidance_do_not_reach_the_weights() -> None:
    net, guidance = make(), torch.randn(1, 12)
    torch.testing.assert_close(net(guidance).down_BLKD, net(1e4 * guidance).down_BLKD, rtol=1e-3, atol=1e-3)


def test_computes_in_fp32_under_autocast() -> None:
    net, guidance = make(), torch.randn(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(guidance)
    assert low.up_BLOK.dtype == torch.float32 and torch.equal(low.up_BLOK, net(guidance).up_BLOK)


def test_masked_mean_ignores_padding_and_empty_rows() -> None:
    x_BTD = torch.randn(3, 4, 5)
    mask_BT = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(masked_mean(x_BTD, mask_BT), torch.stack([x_BTD[0, :2].mean(0), x_BTD[1, 2:].mean(0), torch.zeros(5)]))


def test_statistics_see_collapse() -> None:
    net = make()
    net.monitor = True
    net(torch.randn(8, 12))
    assert net.statistics()["up_between_sample_variance"] > 1e-3
    net(torch.randn(1, 12).expand(8, 12))
    assert net.statistics()["up_between_sample_variance"] < 1e-9


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


def test_parameter_count_of_the_7b_model() -> None:
    text = dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
    )
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = HyperLlavaForConditionalGeneration(
            HyperLlavaConfig(text_config=text, vision_config=vision, visual_expert={}, language_expert={})
        )
    counts = {name.removeprefix("model."): p.numel() for name, p in model.named_parameters() if "_expert." in name}
    assert counts == EXPERT_TENSORS_7B
    assert sum(counts.values()) == 20_284_480
    assert model.model.language_expert is not None and model.model.language_expert.encoder_weight.shape[0] == 16
    assert list(model.config.expert_layers) == list(range(16, 32))


def test_unknown_expert_keys_are_refused() -> None:
    import pytest

    with pytest.raises(ValueError, match="code_with"):
        toy_model(language_expert={"code_with": 8})
    with pytest.raises(ValueError, match="positive integer"):
        toy_model(language_expert={"bottleneck": 0})
