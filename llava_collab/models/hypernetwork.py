"""The hypernetwork (paper, Eqs. 2-4) and the expert whose weights it writes (Eq. 5).

Shapes: B samples, L generated layers, G guidance width, C code width, K bottleneck, R rows of the down-projection (K, or 2 K where
the activation is a gate), D expert input width, O expert output width, T tokens, H = C width of the shared factors, W = R D + K O
numbers a layer.

    code    e(n) = E_n guidance                     one encoder a layer, with bias;  z = rms_norm(e) / sqrt(C)
    weights K(n) = W2 z(n) + B2 + b(n)              shared: W2, B2 for all layers, b(n) of each
            K(n) = W2(n) z(n) + b(n)                per_layer: all of each layer
            K(n) = (W1 z(n) + B1) W2 + b(n)         factorised: a small matrix a sample times one W2 for all layers and samples
    expert  E(x) = W_up act(W_down x)               both projections generated, no biases

Eq. 4 can be read flat (shared, per_layer) or as a product (factorised); where it is flat its W1 is not a module of its own: without
a non-linearity between them (none is written) W1 and E_n are one linear map. What the paper leaves open is chosen so that training
starts at the static model and stays stable: the guidance is RMS-normalised (mid-layer states of language models have massive
dimensions), so is the code, and z is scaled by 1/sqrt(C) because every row of a flat head sees the same z, so that one Adam
step moves every generated weight by about lr * |z|_1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import ExpertConfig

_TINY = 1e-3  # scale of the "small" initialisation, as the authors' summarisation code has it (IDEAL, arXiv 2407.10486)


class ExpertWeights(NamedTuple):
    """What was written for every sample and layer; batch first, so that it can be repeated for beams.

    Whole matrices down [B, L, R, D] and up [B, L, O, K]; of a factorised generator only its dynamic factors [B, L, R, H] and [B, L, K, H].
    """

    down: Tensor
    up: Tensor


class Factors(NamedTuple):
    """What all samples share in a factorised generator: W2 of both projections, and b(n)."""

    down_HD: Tensor
    up_HO: Tensor
    base_down_LRD: Tensor
    base_up_LOK: Tensor


class Generated(NamedTuple):
    """All that applying the experts of one call needs."""

    weights: ExpertWeights
    factors: Factors | None

    def to(self, dtype: torch.dtype) -> Generated:
        """The samples' own weights in another dtype, and what they share as it is."""
        return Generated(ExpertWeights(*(weight.to(dtype) for weight in self.weights)), self.factors)

    def layers(self) -> tuple[tuple[Tensor, ...], ...]:
        """The arguments of `apply_expert`, layer by layer: views, and one stack in the backward pass (indexing would add up L tensors of
        L layers each).
        """
        own = zip(self.weights.down.unbind(1), self.weights.up.unbind(1), strict=True)
        if self.factors is None:
            return tuple(own)
        down_HD, up_HO, base_down_LRD, base_up_LOK = self.factors
        bases = zip(base_down_LRD.unbind(0), base_up_LOK.unbind(0), strict=True)
        return tuple((*layer, down_HD, up_HO, *base) for layer, base in zip(own, bases, strict=True))


def apply_expert(x_BTD: Tensor, weights: tuple[Tensor, ...], activation: str = "silu", onto_BTO: Tensor | None = None) -> Tensor:
    """Eq. 5 for a batch, every sample with its own weights: `W_up act(W_down x)`, shape [B, T, O], in x's dtype or the autocast's.

    `weights`: down [B, R, D] and up [B, O, K]; or factors [B, R, H] and [B, K, H] with the shared W2 and b, which are applied in an
    order that never writes out a sample's matrix: `(A W2 + b) x = A (W2 x) + b x`. With `onto_BTO`, of x's dtype, the result is added
    to it in place: for inference, and never under autocast.
    """
    if not torch.is_autocast_enabled(x_BTD.device.type):
        weights = tuple(weight.to(x_BTD.dtype) for weight in weights)
    down, up, *shared = weights
    if not shared:
        hidden_BTK = _activate(_own_product(x_BTD, down), activation)
        return _own_product(hidden_BTK, up) if onto_BTO is None else onto_BTO.baddbmm_(hidden_BTK, up.transpose(1, 2))
    down_HD, up_HO, base_down_RD, base_up_OK = shared
    rows_BTR = _own_product(F.linear(x_BTD, down_HD), down) + F.linear(x_BTD, base_down_RD)
    hidden_BTK = _activate(rows_BTR, activation)
    out_BTO = _own_product(hidden_BTK, up.transpose(1, 2)) @ up_HO + F.linear(hidden_BTK, base_up_OK)
    return out_BTO if onto_BTO is None else onto_BTO.add_(out_BTO)


def _own_product(x_BTI: Tensor, matrix_BOI: Tensor) -> Tensor:
    """Every sample's tokens times its own matrix, [B, T, O].

    A compiled decode step gets it in products and sums: the compiler fuses those with what stands around them, on a GPU it would leave
    a bmm alone between two other kernels.
    """
    if torch.compiler.is_compiling() and x_BTI.shape[1] == 1:
        return (x_BTI * matrix_BOI).sum(-1).unsqueeze(1)
    return torch.bmm(x_BTI, matrix_BOI.transpose(1, 2))


def _activate(rows_BTR: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_BTK, value_BTK = rows_BTR.chunk(2, dim=-1)
        return F.silu(gate_BTK) * value_BTK
    return F.silu(rows_BTR) if activation == "silu" else F.gelu(rows_BTR)


def _copied(parameter: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Cast to one dtype after the other; never the parameter itself."""
    out = parameter
    for dtype in dtypes:
        out = out.to(dtype)
    return out.clone() if out is parameter else out


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked positions in fp32, [B, D]; a row without any gives zeros. Padding-side independent."""
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (x_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)


def last_marked(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The last marked position in fp32, [B, D]; a row without any gives zeros. Padding-side independent."""
    last_B = (mask_BT.long() * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)).amax(1)
    picked_BD = x_BTD[torch.arange(len(last_B), device=x_BTD.device), (last_B - 1).clamp(min=0)].float()
    return picked_BD * (last_B > 0).unsqueeze(-1)


class HyperNetwork(nn.Module):
    """Writes the weights of `layers` experts from one guidance vector a sample (Eqs. 3-4).

    Parameters stay in fp32 and the generator computes in `config.dtype`, whatever the model's dtype or an autocast around it; what it
    wrote is cast once, to what applies it. Everything is made in one call for all layers, so that a sharded module is
    gathered once a forward. In the `static` mode there are no codes and no decoder: K(n) = b(n), the expert's static twin.
    """

    def __init__(self, guidance_width: int, in_width: int, out_width: int, layers: int, config: ExpertConfig) -> None:
        super().__init__()
        self.in_width, self.out_width, self.layers = in_width, out_width, layers
        self.guidance_width, self.config = guidance_width, config
        self.rows = config.bottleneck * (2 if config.activation == "swiglu" else 1)
        width, code = self.rows * in_width + config.bottleneck * out_width, config.code_width
        if config.mode != "static":
            self.encoder_weight = nn.Parameter(torch.empty(layers, code, guidance_width))  # E_n
            self.encoder_bias = nn.Parameter(torch.empty(layers, code))
            if config.encoder_layers == 2:
                self.encoder_2_weight = nn.Parameter(torch.empty(layers, code, code))
                self.encoder_2_bias = nn.Parameter(torch.empty(layers, code))
            if config.generator == "shared":
                self.decoder_weight = nn.Parameter(torch.empty(width, code))  # W2
                self.decoder_bias = nn.Parameter(torch.empty(width))  # B2
            elif config.generator == "per_layer":
                self.decoder_weight = nn.Parameter(torch.empty(layers, width, code))  # W2(n)
            else:
                rows = (self.rows + config.bottleneck) * code
                self.decoder_weight = nn.Parameter(torch.empty(rows, code))  # W1
                self.decoder_bias = nn.Parameter(torch.empty(rows))  # B1
                self.factor_down = nn.Parameter(torch.empty(code, in_width))  # W2
                self.factor_up = nn.Parameter(torch.empty(code, out_width))
        self.base = nn.Parameter(torch.empty(layers, width))  # b(n)
        self.monitor = False  # when set, a forward keeps detached scalars for `statistics` (never weights)
        self._statistics: dict[str, Tensor] = {}
        self.reset_parameters()

    @property
    def factorised(self) -> bool:
        """Whether weights are kept as factors."""
        return self.config.generator == "factorised" and self.config.mode != "static"

    def reset_parameters(self) -> None:
        """zero_output: W2 = B2 = 0 and b_up = 0, so E(x) is exactly 0 and the model exactly the static one; b_down ~ N(0, 1/D).

        Zeroing b_down too would make every gradient zero: the expert would never start. small: W2 uniform at 1e-3 of the scale that
        would keep variances, b(n) = 0, as in the authors' summarisation code; E(x) is then not 0 but almost.
        """
        small = self.config.initialisation == "small"
        parameters = dict(self.named_parameters())
        for name in ("encoder_weight", "encoder_bias", "encoder_2_weight", "encoder_2_bias"):
            if name in parameters:
                fan_in = parameters[name.replace("bias", "weight")].shape[-1]
                init.uniform_(parameters[name], -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        for name in ("decoder_weight", "factor_down", "factor_up"):
            if name in parameters:
                inner = name == "decoder_weight" and self.factorised  # W1: the zero, or the tiny scale, is W2's
                bound = _TINY * math.sqrt(3 / (self.config.code_width * self.in_width)) if small else 0.0
                bound = 1 / math.sqrt(self.config.code_width) if inner else bound
                init.uniform_(parameters[name], -bound, bound) if bound else init.zeros_(parameters[name])
        if "decoder_bias" in parameters:
            init.zeros_(self.decoder_bias)
        base_LW = torch.zeros_like(self.base.data)
        if not small:
            base_LW[:, : self._down_size].normal_(std=1 / math.sqrt(self.in_width))
        init.copy_(self.base, base_LW)

    @property
    def _down_size(self) -> int:
        return self.rows * self.in_width

    def code(self, guidance_BG: Tensor) -> Tensor:
        """z [B, L, C]: the normalised layer codes of RMS-normalised guidance, in `config.dtype`."""
        dtype = getattr(torch, self.config.dtype)
        if self.config.mode == "constant":  # any constant will do: the encoder that reads it is learned
            guidance_BG = torch.ones_like(guidance_BG)
        guidance_BG = F.rms_norm(guidance_BG.float(), guidance_BG.shape[-1:]).to(dtype)
        code_BLC = torch.einsum("bg,lcg->blc", guidance_BG, self.encoder_weight.to(dtype)) + self.encoder_bias.to(dtype)
        if self.config.encoder_layers == 2:
            code_BLC = torch.einsum("blc,lec->ble", F.relu(code_BLC), self.encoder_2_weight.to(dtype)) + self.encoder_2_bias.to(dtype)
        return F.rms_norm(code_BLC, code_BLC.shape[-1:]) / math.sqrt(code_BLC.shape[-1])

    def decode(self, code_BLC: Tensor) -> ExpertWeights:
        """The weights that the codes stand for."""
        dtype = code_BLC.dtype
        if self.factorised:
            rows_BL = F.linear(code_BLC, self.decoder_weight.to(dtype), self.decoder_bias.to(dtype))
            down_BLRH, up_BLKH = rows_BL.unflatten(-1, (self.rows + self.config.bottleneck, -1)).split(
                [self.rows, self.config.bottleneck], dim=-2
            )
            return ExpertWeights(down_BLRH, up_BLKH)
        if self.config.generator == "shared":
            generated_BLW = F.linear(code_BLC, self.decoder_weight.to(dtype), self.decoder_bias.to(dtype))
        else:
            generated_BLW = torch.einsum("blc,lwc->blw", code_BLC, self.decoder_weight.to(dtype))
        return self._matrices(generated_BLW + self.base.to(dtype))

    def _matrices(self, weights_xW: Tensor) -> ExpertWeights:
        down_xW, up_xW = weights_xW.split([self._down_size, weights_xW.shape[-1] - self._down_size], dim=-1)
        return ExpertWeights(down_xW.unflatten(-1, (self.rows, self.in_width)), up_xW.unflatten(-1, (self.out_width, -1)))

    def forward(self, guidance_BG: Tensor | None, given: ExpertWeights | None = None, dtype: torch.dtype | None = None) -> Generated:
        """The weights of all layers for each sample's guidance; or, with `given` ones of an earlier call, just what is shared beside them.

        They come in `dtype` (default: that of the computation), cast once here and not by every layer that applies them; what layers or
        samples share is cast so only where nothing is learned, since its gradients are to be summed in full precision. Nothing that comes
        out is a parameter itself: an engine that shards the module may free those after this call.
        """
        own: torch.dtype = getattr(torch, self.config.dtype)
        if given is not None and not self.factorised:  # a decoding step: nothing to do
            return Generated(given, None).to(dtype or own)
        dtype = dtype or own
        first = own if self.monitor or torch.is_grad_enabled() else dtype  # figures, too, are of what was written, before the cast
        with torch.autocast(self.base.device.type, enabled=False):
            if given is None:
                assert guidance_BG is not None
                if self.config.mode == "static":
                    base_LW = _copied(self.base, own, first)
                    given = self._matrices(base_LW.expand(guidance_BG.shape[0], *base_LW.shape))
                else:
                    given = self.decode(self.code(guidance_BG))
            factors = None
            if self.factorised:
                down_HD, up_HO, base_LW = (_copied(p, own, first) for p in (self.factor_down, self.factor_up, self.base))
                factors = Factors(down_HD, up_HO, *self._matrices(base_LW))
        generated = Generated(given, factors)
        if self.monitor and guidance_BG is not None:
            self._watch(generated, guidance_BG)
        return generated.to(dtype)

    @staticmethod
    def materialise(generated: Generated) -> ExpertWeights:
        """Whole matrices down [B, L, R, D] and up [B, L, O, K], also of a factorised generator."""
        (down_BLRH, up_BLKH), factors = generated
        if factors is None:
            return generated.weights
        down_BLRD = down_BLRH @ factors.down_HD + factors.base_down_LRD
        return ExpertWeights(down_BLRD, (up_BLKH @ factors.up_HO).transpose(-1, -2) + factors.base_up_LOK)

    @torch.no_grad()
    def _watch(self, generated: Generated, guidance_BG: Tensor) -> None:
        present_B = (guidance_BG.abs().sum(-1) > 0).float()  # dummy samples (no image) say nothing about the experts
        count = present_B.sum()
        self._statistics = {"samples": count}
        for name, w_BLIJ in self.materialise(generated)._asdict().items():
            w_BLW = w_BLIJ.detach().float().flatten(2)
            self._statistics[f"{name}_norm"] = (w_BLW.norm(dim=-1).mean(1) * present_B).sum() / count
            mean_LW = torch.tensordot(present_B, w_BLW, 1) / count
            spread_B = (w_BLW - mean_LW).square().sum((1, 2))
            spread = (spread_B * present_B).sum() / (count - 1) / mean_LW.square().sum().clamp(min=1e-20)
            self._statistics[f"{name}_between_sample_variance"] = spread  # near zero = the generator collapsed to a static expert

    def record_ratio(self, expert_BTO: Tensor, static_BTO: Tensor) -> None:
        """Keep |E(x)| / |static(x)| (RMS over the batch), while monitored; above 1 the expert drowns what it is added to."""
        if self.monitor and self._statistics:
            expert, static = (torch.linalg.vector_norm(x.detach(), dtype=torch.float32) for x in (expert_BTO, static_BTO))
            ratio = expert / static.clamp(min=1e-12)
            highest = self._statistics.get("output_ratio")
            self._statistics["output_ratio"] = ratio if highest is None else torch.maximum(highest, ratio)

    def statistics(self) -> dict[str, float]:
        """Scalars of the last monitored forward: norms, between-sample variance over squared mean, output ratio (max over layers)."""
        figures = {name: float(value) for name, value in self._statistics.items()}  # the first wait for the device
        samples = figures.pop("samples", 0)
        if samples == 0:  # no sample of the batch had guidance: the figures are of dummies
            return {}
        return figures if samples > 1 else {name: value for name, value in figures.items() if not name.endswith("variance")}
