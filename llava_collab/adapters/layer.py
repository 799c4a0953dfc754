"""The one layer of LoRA, MoELoRA, HydraLoRA and TeamLoRA (arXiv 2408.09856): low-rank experts beside a frozen linear layer.

Shapes: x any leading axes, I input width, O output width, k experts, r rank of one expert, R rank of the down-projection (k r, or r where
it is shared).

    z   = x A                            A for all experts                        one GEMM, the router's rows in the same matrix
    phi = softmax(x S)                   the router, in fp32
    u   = phi + phi M                    TeamLoRA's interaction, optional         w = k u / sum(u)
    y   = x W0 + s (z * w) B             expert i reads its own r columns of z    one GEMM, added up as it is written

TeamLoRA's collaboration (z is split among the experts) is MoELoRA with the experts' down-projections side by side: same functions, same
numbers, fewer and wider products. HydraLoRA's experts all read the same r columns. Routed experts can't be merged into W0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .routing import current, watching

EPSILON = 1e-4
"""Least weight of an expert where the interaction is bounded, and least sum that a free one is divided by."""

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"experts": 1, "routing": "uniform", "interaction": "none"},
    "moelora": {"interaction": "none", "scale_by_k": False},
    "hydralora": {"split": False, "interaction": "none", "scale_by_k": False},
    "teamlora": {},
    "teamlora_released": {"interaction": "free"},
    "teamlora_paper": {"interaction": "free", "normalise": False, "scale_by_k": False},
}
"""What each published method sets; everything else is the default of `LowRankConfig`."""


@dataclass
class LowRankConfig:
    """What the experts of one layer are. Defaults are TeamLoRA's, with its interaction kept within bounds.

    [paper] stands in the paper or its figure; [released] in code that was public for a day; [open] both are silent: our choice.
    """

    experts: int = 4
    """k. [paper: 4 is best]"""
    rank: int = 32
    """Of one expert, r; the down-projection has k times as many columns where it is split. [paper's "rank"]"""
    alpha: float = 64.0
    """Scale: the update is alpha / rank times the weighted sum over experts. [open: 2 r]"""
    dropout: float = 0.05
    """In training. [open]"""
    dropout_at: Literal["rank", "input"] = "rank"
    """Drop of z [released], or of x before the down-projection, as peft's LoRA does."""
    split: bool = True
    """Every expert reads its own columns of z (TeamLoRA, MoELoRA); false: all read the same ones (HydraLoRA)."""
    routing: Literal["token", "sample", "uniform"] = "token"
    """Weights for each token [released]; for each sample, from its prompt; or the same for all, which is plain LoRA and can be merged."""
    interaction: Literal["bounded", "free", "none"] = "bounded"
    """M of `u = phi + phi M`. bounded: tanh, zero on the diagonal, weights at least epsilon; free: as released, any M, and where
    weights would add up to nothing or less phi alone counts; none: u = phi."""
    train_interaction: bool = True
    """False: M stays what it was drawn as (a control)."""
    normalise: bool = True
    """Divide u by its sum [released; the paper does not say]."""
    scale_by_k: bool = True
    """Times k, so that balanced weights are 1 [released]. It also multiplies the step size by k: a control."""
    balance: float = 0.0
    """Weight of the balance loss. [paper: cross-entropy only; released: computed, use unknown]"""

    def __post_init__(self) -> None:
        hints = get_type_hints(LowRankConfig)
        for name, hint in hints.items():
            value = getattr(self, name)
            kinds = {int: (int,), float: (int, float), bool: (bool,)}.get(hint)
            if kinds is not None and (not isinstance(value, kinds) or (hint is not bool and isinstance(value, bool))):
                raise ValueError(f"adapter: `{name}` must be {hint.__name__}, got {value!r}")
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"adapter: `{name}` must be one of {list(get_args(hint))}, got {value!r}")
        if self.experts < 1 or self.rank < 1:
            raise ValueError(f"adapter: experts and rank must be at least 1, got {self.experts} and {self.rank}")
        if self.experts == 1 and self.routing != "uniform":
            raise ValueError("adapter: one expert has no others to be weighed against; set routing: uniform (method: lora)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter: dropout must be in [0, 1), got {self.dropout}")
        if self.balance < 0:
            raise ValueError(f"adapter: balance must not be negative, got {self.balance}")

    @classmethod
    def read(cls, value: dict[str, Any], where: str = "adapter") -> Self:
        """From a plain dict. `method`, one of `METHODS`, sets what makes that method; keys beside it win over it.

        Raises ValueError for an unknown key or method and for values that can't be.
        """
        given = dict(value)
        method = given.pop("method", "teamlora")
        if method not in METHODS:
            raise ValueError(f"`{where}.method` must be one of {sorted(METHODS)}, got {method!r}")
        known = {key.name for key in fields(cls)}
        if unknown := set(given) - known:
            raise ValueError(f"`{where}` has unknown keys {sorted(unknown)}; it knows method, {', '.join(sorted(known))}")
        return cls(**(METHODS[method] | given))

    @property
    def down_rank(self) -> int:
        """Columns of A."""
        return self.rank * (self.experts if self.split else 1)

    @property
    def mergeable(self) -> bool:
        """Whether the update is one matrix for all inputs."""
        return self.routing == "uniform"

    @property
    def needs_context(self) -> bool:
        """Whether a forward (for the balance loss: one with gradients) must know which positions are padding and which the prompt."""
        return self.routing == "sample" or (self.balance > 0 and self.routing != "uniform")

    @property
    def balanced_weight(self) -> float:
        """An expert's weight where all have the same."""
        return 1.0 if self.scale_by_k else 1 / self.experts


@dataclass
class AdapterConfig(LowRankConfig):
    """A HyperLLaVA's low-rank experts: what they are, and on which of its layers."""

    target: str | list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    """Names of linear layers in the language model's blocks [paper: the FFN's]; or a regular expression for paths there, from the block's
    number on, such as `(2|3)\\.mlp\\..*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target or not (isinstance(self.target, str) or all(isinstance(name, str) for name in self.target)):
            raise ValueError(
                f"adapter: target must name linear layers, such as [gate_proj], or be a regular expression, not {self.target!r}"
            )


class LowRankExperts(nn.Module):
    """The experts of one linear layer. `down` [R (+ k), I]: A, and below it the router's rows; `up` [O, k r]: the experts side by side."""

    def __init__(self, in_features: int, out_features: int, config: LowRankConfig) -> None:
        super().__init__()
        self.config = config
        routed = 0 if config.mergeable else config.experts
        self.down = nn.Parameter(torch.empty(config.down_rank + routed, in_features))
        self.up = nn.Parameter(torch.empty(out_features, config.experts * config.rank))
        self.interaction: Tensor | None = None
        if routed and config.interaction != "none":
            m_KK = torch.empty(routed, routed)
            if config.train_interaction:
                self.interaction = nn.Parameter(m_KK)
            else:
                del self.interaction
                self.register_buffer("interaction", m_KK)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and router Kaiming-uniform (a = sqrt 5, so by input width alone), B zero, M uniform within 0.1 and zero on the diagonal."""
        bound = 1 / math.sqrt(self.down.shape[1])
        init.uniform_(self.down, -bound, bound)
        init.zeros_(self.up)
        if self.interaction is not None:
            draw_KK = torch.empty_like(self.interaction).uniform_(-0.1, 0.1)
            init.copy_(self.interaction, draw_KK.fill_diagonal_(0.0))

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    def forward(self, x: Tensor, static: Tensor) -> Tensor:
        """`static` [..., O], what the frozen layer makes of x [..., I], plus the experts' update.

        Raises RuntimeError where the configuration needs a `RoutingContext` and none is open.
        """
        config = self.config
        down = self.down.to(x.dtype)
        dropping = self.training and config.dropout > 0
        if dropping and config.dropout_at == "input":  # the router reads what was not dropped
            z_xR = F.linear(F.dropout(x, config.dropout), down[: config.down_rank])
            scores_xK = None if config.mergeable else F.linear(x, down[config.down_rank :])
        else:
            rows = F.linear(x, down)
            z_xR, scores_xK = (rows, None) if config.mergeable else rows.split([config.down_rank, config.experts], dim=-1)
            z_xR = F.dropout(z_xR, config.dropout) if dropping else z_xR
        z_xKr = z_xR.unflatten(-1, (-1, config.rank))  # [..., 1, r] where all experts read the same
        if scores_xK is None:
            z_xKr, scale = z_xKr.expand(*x.shape[:-1], config.experts, config.rank), self.scale * config.balanced_weight
        else:
            z_xKr, scale = z_xKr * self.weights(scores_xK).to(z_xKr.dtype).unsqueeze(-1), self.scale
        z_NR = z_xKr.reshape(-1, config.experts * config.rank).to(static.dtype)
        return torch.addmm(static.flatten(0, -2), z_NR, self.up.to(static.dtype).t(), alpha=scale).view(static.shape)

    def weights(self, scores_xK: Tensor) -> Tensor:
        """The experts' weights [..., k] in fp32, from the router's scores."""
        config = self.config
        needed = config.routing == "sample" or (config.balance > 0 and torch.is_grad_enabled())
        context = current() if needed or watching() else None
        if needed and context is None:
            raise RuntimeError(
                "these experts are routed by sample or balanced, for which they must know the prompt and the padding: call the model "
                "inside `with RoutingContext(...)`; with gradient checkpointing pass context_fn=checkpoint_context too"
            )
        with torch.autocast(scores_xK.device.type, enabled=False):
            scores_xK = scores_xK.float()
            if config.routing == "sample" and context is not None:
                scores_xK = context.per_sample(self, scores_xK)
            w_xK = self._interact(scores_xK.softmax(-1))
        if context is not None:
            context.observe(self, w_xK)
        return w_xK

    def _interact(self, phi_xK: Tensor) -> Tensor:
        config, times = self.config, self.config.experts if self.config.scale_by_k else 1
        if self.interaction is None:
            return phi_xK * times
        one_KK = torch.eye(config.experts, dtype=torch.bool, device=phi_xK.device)
        if config.interaction == "bounded":
            u_xK = (phi_xK @ self.interaction.float().tanh().masked_fill(one_KK, 1.0)).clamp(min=EPSILON)
            return u_xK * (times / u_xK.sum(-1, keepdim=True)) if config.normalise else u_xK * times
        u_xK = phi_xK @ (self.interaction.float() + one_KK)
        if config.normalise:
            sum_x1 = u_xK.sum(-1, keepdim=True)
            sound_x1 = (sum_x1 > EPSILON) & sum_x1.isfinite()
            u_xK = torch.where(sound_x1, u_xK / torch.where(sound_x1, sum_x1, 1.0), phi_xK)
        return u_xK * times

    def balance_loss(self, w_xK: Tensor, counts_x: Tensor) -> Tensor:
        """Mean over experts of (mean weight over counted positions - balanced weight)^2; 0 where all experts do as much."""
        share_x1 = (counts_x / counts_x.sum().clamp(min=1)).unsqueeze(-1)
        mean_K = (w_xK * share_x1).flatten(0, -2).sum(0)
        return (mean_K - self.config.balanced_weight).square().mean()

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [k r, I] and B [O, k r] of the plain LoRA that these experts are: the update is `B A`. Raises ValueError for routed experts."""
        config = self.config
        if not config.mergeable:
            raise ValueError(
                f"there is no merge: experts routed by {config.routing} weigh every input anew, so no static weights equal them. "
                "Keep them apart, or train with routing: uniform (plain LoRA)"
            )
        down = self.down if config.split else self.down.repeat(config.experts, 1)
        return down.detach().clone(), self.up.detach() * (self.scale * config.balanced_weight)
