"""The hypernetwork (paper, Eqs. 2-4) and the expert whose weights it writes (Eq. 5).

Shapes: B samples, L generated layers, G guidance width, C code width, K bottleneck, D expert input width, O expert output width,
T tokens, W = K * (D + O) numbers a layer.

    code    e(n) = E_n guidance                     one encoder a layer, with bias
    weights K(n) = W2 z(n) + B2 + b(n)              W2 and B2 shared by all layers, b(n) of each layer; z = rms_norm(e) / sqrt(C)
    expert  E(x) = W_up silu(W_down x)              both projections generated, no biases

This is variant G1 of the two legal readings of Eq. 4: a flat decoder. Eq. 4's W1 is not a module of its own: without a
non-linearity between them (none is written) W1 and E_n are one linear map. What the paper leaves open is chosen so that training
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


class ExpertWeights(NamedTuple):
    """Generated weights of every sample and layer, batch first so that they can be repeated for beams."""

    down_BLKD: Tensor
    up_BLOK: Tensor

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """`(down [B, K, D], up [B, O, K])` of one layer."""
        return self.down_BLKD[:, index], self.up_BLOK[:, index]


def apply_expert(x_BTD: Tensor, down_BKD: Tensor, up_BOK: Tensor) -> Tensor:
    """Eq. 5 for a batch, every sample with its own weights: `W_up silu(W_down x)`, shape [B, T, O], in x's dtype."""
    hidden_BTK = F.silu(torch.bmm(x_BTD, down_BKD.to(x_BTD.dtype).transpose(1, 2)))
    return torch.bmm(hidden_BTK, up_BOK.to(hidden_BTK.dtype).transpose(1, 2)).to(x_BTD.dtype)


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked positions in fp32, [B, D]; a row without any gives zeros. Padding-side independent."""
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (x_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)


class HyperNetwork(nn.Module):
    """Writes the weights of `layers` experts from one guidance vector a sample (Eqs. 3-4).

    Parameters stay and compute in fp32, whatever the model's dtype or an autocast around it; the generated weights are cast where
    they are applied. Everything is made in one call for all layers, so that a sharded module is gathered once a forward.
    """

    def __init__(self, guidance_width: int, in_width: int, out_width: int, layers: int, config: ExpertConfig) -> None:
        super().__init__()
        self.in_width, self.out_width, self.bottleneck = in_width, out_width, config.bottleneck
        weights = config.bottleneck * (in_width + out_width)
        self.encoder_weight = nn.Parameter(torch.empty(layers, config.code_width, guidance_width))  # E_n
        self.encoder_bias = nn.Parameter(torch.empty(layers, config.code_width))
        self.decoder_weight = nn.Parameter(torch.empty(weights, config.code_width))  # W2
        self.decoder_bias = nn.Parameter(torch.empty(weights))  # B2
        self.base = nn.Parameter(torch.empty(layers, weights))  # b(n)
        self.monitor = False  # when set, a forward keeps detached scalars for `statistics` (never weights)
        self._statistics: dict[str, Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W2 = B2 = 0 and b_up = 0, so E(x) is exactly 0 and the model exactly the static one; b_down ~ N(0, 1/D).

        Zeroing b_down too would make every gradient zero: the expert would never start.
        """
        bound = 1 / math.sqrt(self.encoder_weight.shape[-1])
        init.uniform_(self.encoder_weight, -bound, bound)
        init.uniform_(self.encoder_bias, -bound, bound)
        init.zeros_(self.decoder_weight)
        init.zeros_(self.decoder_bias)
        base_LW = torch.zeros_like(self.base.data)
        base_LW[:, : self._down_size].normal_(std=1 / math.sqrt(self.in_width))
        init.copy_(self.base, base_LW)

    @property
    def _down_size(self) -> int:
        return self.bottleneck * self.in_width

    def code(self, guidance_BG: Tensor) -> Tensor:
        """z [B, L, C]: the normalised layer codes of RMS-normalised guidance."""
        guidance_BG = F.rms_norm(guidance_BG.float(), guidance_BG.shape[-1:])
        code_BLC = torch.einsum("bg,lcg->blc", guidance_BG, self.encoder_weight.float()) + self.encoder_bias.float()
        return F.rms_norm(code_BLC, code_BLC.shape[-1:]) / math.sqrt(code_BLC.shape[-1])

    def forward(self, guidance_BG: Tensor) -> ExpertWeights:
        """The weights of all layers for each sample's guidance, fp32."""
        with torch.autocast(guidance_BG.device.type, enabled=False):
            code_BLC = self.code(guidance_BG)
            generated_BLW = F.linear(code_BLC, self.decoder_weight.float(), self.decoder_bias.float())
            weights_BLW = generated_BLW + self.base.float()
        down_BLW, up_BLW = weights_BLW.split([self._down_size, weights_BLW.shape[-1] - self._down_size], dim=-1)
        weights = ExpertWeights(
            down_BLW.unflatten(-1, (self.bottleneck, self.in_width)), up_BLW.unflatten(-1, (self.out_width, self.bottleneck))
        )
        if self.monitor:
            self._watch(weights, guidance_BG)
        return weights

    @torch.no_grad()
    def _watch(self, weights: ExpertWeights, guidance_BG: Tensor) -> None:
        present_B = guidance_BG.abs().sum(-1) > 0  # dummy samples (no image) say nothing about the experts
        self._statistics = {}
        for name, w in (("down", weights.down_BLKD), ("up", weights.up_BLOK)):
            w = w.detach()[present_B]
            if w.shape[0] == 0:
                continue
            self._statistics[f"{name}_norm"] = w.flatten(2).norm(dim=-1).mean()
            if w.shape[0] > 1:  # near zero = the generator collapsed to a static expert (spec, 8.1)
                spread = w.var(dim=0, unbiased=True).sum() / w.mean(dim=0).square().sum().clamp(min=1e-20)
                self._statistics[f"{name}_between_sample_variance"] = spread

    def record_ratio(self, expert_BTO: Tensor, static_BTO: Tensor) -> None:
        """Keep |E(x)| / |static(x)| (RMS over the batch), while monitored; above 1 the expert drowns what it is added to."""
        if self.monitor:
            ratio = expert_BTO.detach().float().norm() / static_BTO.detach().float().norm().clamp(min=1e-12)
            self._statistics["output_ratio"] = torch.maximum(self._statistics.get("output_ratio", ratio), ratio)

    def statistics(self) -> dict[str, float]:
        """Scalars of the last monitored forward: norms, between-sample variance over squared mean, output ratio (max over layers)."""
        return {name: float(value) for name, value in self._statistics.items()}
