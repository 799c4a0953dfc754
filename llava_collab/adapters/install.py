"""Low-rank experts put on the linear layers of a module, in place: same modules, same names, same parameters, and an `adapter` beside."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import Tensor, nn

from .layer import AdapterConfig, LowRankExperts


class Mixin(nn.Module):
    """What is put in front of a module's class, in place: the module stays, with its names and parameters, and does something else."""

    @classmethod
    def onto(cls, stock: type[nn.Module]) -> type[nn.Module]:
        """The class of `stock` modules with this mixed in; always the same one."""
        return _mixed(cls, stock)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled (for processes that are spawned) by the two classes: the mixed one has no name that another process could look up.
        mixin, stock = type(self).__bases__
        return _remade, (mixin, stock), self.__dict__


@cache
def _mixed(mixin: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__.removesuffix('Block')}{stock.__name__}", (mixin, stock), {"__module__": mixin.__module__})


def _remade(mixin: type[nn.Module], stock: type[nn.Module]) -> nn.Module:
    kind = _mixed(mixin, stock)
    return kind.__new__(kind)


class Adapted(Mixin):
    """Mixed in front of a linear layer's class: `y = x W0 + update`. State dicts keep their names, with `<layer>.adapter.*` beside."""

    adapter: LowRankExperts

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, super().forward(x))


def install_adapters(module: nn.Module, config: AdapterConfig) -> list[str]:
    """Turn the linear layers that `config.target` names into adapted ones; returns their paths.

    Both names and regular expressions are looked for in the blocks of `module`'s language model: every layer there sees every position,
    prompt and padding alike, as routing supposes. Raises ValueError for a pattern or a name that no linear layer has.
    """
    pattern = config.target
    if not isinstance(pattern, str):
        pattern = rf".*\.({'|'.join(map(re.escape, pattern))})"
    blocks = module.get_submodule("language_model.layers")
    linears = [(name, linear) for name, linear in blocks.named_modules() if isinstance(linear, nn.Linear)]
    chosen = [(name, linear) for name, linear in linears if re.fullmatch(pattern, name)]
    leaves = {name.rpartition(".")[2] for name, _ in chosen}
    missed = [] if isinstance(config.target, str) else sorted(set(config.target) - leaves)
    if missed or not chosen:
        there = sorted({name.rpartition(".")[2] for name, _ in linears})
        raise ValueError(
            f"adapter.target {missed or config.target!r} is no linear layer there; linear layers are called {', '.join(there)}"
        )
    for _, linear in chosen:
        linear.__class__ = Adapted.onto(type(linear))  # pyright: ignore[reportAttributeAccessIssue]
        linear.adapter = LowRankExperts(linear.in_features, linear.out_features, config)
    return [f"language_model.layers.{name}" for name, _ in chosen]
