"""Low-rank experts put on the linear layers of a module, in place: same modules, same names, same parameters, and an `adapter` beside."""

from __future__ import annotations

import re
from functools import cache

from torch import Tensor, nn

from .layer import AdapterConfig, LowRankExperts


class AdaptedLinear(nn.Module):
    """Mixed in front of a linear layer's class: `y = x W0 + update`. State dicts keep their names, with `<layer>.adapter.*` beside."""

    adapter: LowRankExperts

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, super().forward(x))


@cache
def _adapted(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{stock.__name__}", (AdaptedLinear, stock), {"__module__": __name__})


def install_adapters(module: nn.Module, config: AdapterConfig) -> list[str]:
    """Turn the linear layers that `config.target` names into adapted ones; returns their paths.

    Names are looked for in the blocks of `module`'s language model; a regular expression has to match a whole path in `module`.
    Raises ValueError for a pattern or a name that no linear layer has.
    """
    pattern = config.target
    if not isinstance(pattern, str):
        pattern = rf"language_model\.layers\..*\.({'|'.join(map(re.escape, pattern))})"
    linears = [(name, linear) for name, linear in module.named_modules() if isinstance(linear, nn.Linear)]
    chosen = [(name, linear) for name, linear in linears if re.fullmatch(pattern, name)]
    leaves = {name.rpartition(".")[2] for name, _ in chosen}
    missed = [] if isinstance(config.target, str) else sorted(set(config.target) - leaves)
    if missed or not chosen:
        there = sorted({name.rpartition(".")[2] for name, _ in linears})
        raise ValueError(
            f"adapter.target {missed or config.target!r} is no linear layer there; linear layers are called {', '.join(there)}"
        )
    for _, linear in chosen:
        linear.__class__ = _adapted(type(linear))  # pyright: ignore[reportAttributeAccessIssue]
        linear.adapter = LowRankExperts(linear.in_features, linear.out_features, config)
    return [name for name, _ in chosen]
