"""What low-rank experts must know of a call beside their input: which positions are real, which are the prompt, whose they are.

Shapes: B rows, T positions, S samples (rows, unless rows are packed), k experts.

Only routing by sample and the balance loss need it; routing by token needs nothing. A context lasts for one forward, or for one
generation, whose prefill's weights it keeps for the steps behind it. Nothing of a sample is kept on a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import LowRankExperts

_CURRENT: ContextVar[RoutingContext | None] = ContextVar("routing", default=None)
_watching = 0


def current() -> RoutingContext | None:
    """The context that is open, if one is."""
    return _CURRENT.get()


def watching() -> bool:
    """Whether any context that is open watches. A plain number, because torch.compile can't look into a ContextVar."""
    return _watching > 0


class RoutingContext:
    """`with RoutingContext(attention_mask): model(...)`: one forward, or one `generate`.

    attended_BT: real positions (bool or 0/1; None: all). prompt_BT: those that routing by sample reads (None: all real ones; in
    training leave the answer out, or its weights would depend on it). sample_BT: int64, in packed rows whose position each is, from 0.
    watch: also add up what every expert weighs (`load`), whatever the routing. pending: a HyperLLaVA fills the masks in at its first call.
    """

    def __init__(
        self,
        attended_BT: Tensor | None = None,
        prompt_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        *,
        watch: bool = False,
        pending: bool = False,
    ) -> None:
        self.attended_BT = None if attended_BT is None else attended_BT.bool()
        self.prompt_BT = self.attended_BT if prompt_BT is None else prompt_BT.bool()
        self.sample_BT = sample_BT
        self.watch, self.pending = watch, pending
        self.load: dict[LowRankExperts, tuple[Tensor, Tensor]] = {}
        """With `watch`: summed weights [k] and count of the real positions, by layer."""
        self._balance: list[Tensor] = []
        self._routed: dict[LowRankExperts, Tensor] = {}
        self._again = False  # in the backward pass of gradient checkpointing
        self._tokens: list = []

    def __enter__(self) -> RoutingContext:
        global _watching
        _watching += self.watch
        self._tokens.append(_CURRENT.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching -= self.watch
        _CURRENT.reset(self._tokens.pop())

    def take(self, other: RoutingContext) -> RoutingContext:
        """Take over another's masks, when nothing is pending any more."""
        self.attended_BT, self.prompt_BT, self.sample_BT, self.pending = other.attended_BT, other.prompt_BT, other.sample_BT, False
        return self

    def per_sample(self, layer: LowRankExperts, scores_BTK: Tensor) -> Tensor:
        """[B, T, k]: every position gets its sample's mean score over the prompt (the router is linear: it is the score of the mean).

        Without gradients a layer's first call is the prefill, whose scores the later ones get. Raises ValueError for other shapes.
        """
        if layer in self._routed and not torch.is_grad_enabled():
            kept_SK = self._routed[layer]
            if kept_SK.shape[0] != scores_BTK.shape[0]:
                raise ValueError(f"a RoutingContext of {kept_SK.shape[0]} samples was used again for {scores_BTK.shape[0]}: open a new one")
            return kept_SK.unsqueeze(1).expand_as(scores_BTK)
        mask_BT = self._fit(self.prompt_BT, scores_BTK)
        if self.sample_BT is None:
            mean_SK = (scores_BTK * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
            self._routed[layer] = mean_SK.detach()
            return mean_SK.unsqueeze(1).expand_as(scores_BTK)
        sample_N, mask_N1 = self.sample_BT.flatten(), mask_BT.flatten().unsqueeze(-1)
        samples = scores_BTK.shape[0] * scores_BTK.shape[1]  # at most so many: no wait for the device to count them
        empty_SK = scores_BTK.new_zeros(samples, scores_BTK.shape[-1])
        sums_SK = empty_SK.index_add(0, sample_N, scores_BTK.flatten(0, 1) * mask_N1)
        counts_S1 = empty_SK[:, :1].index_add(0, sample_N, mask_N1)
        return (sums_SK / counts_S1.clamp(min=1)).index_select(0, sample_N).view_as(scores_BTK)

    def observe(self, layer: LowRankExperts, w_BTK: Tensor) -> None:
        """Take a layer's weights into the balance loss and, with `watch`, into its load."""
        balanced = layer.config.balance > 0 and torch.is_grad_enabled()
        if not balanced and not self.watch:
            return
        counts_BT = self._fit(self.attended_BT, w_BTK)
        if balanced:  # also when it is gone through again, or the checkpoint would miss what this keeps for the backward pass
            loss = layer.balance_loss(w_BTK, counts_BT) * layer.config.balance
            if not self._again:
                self._balance.append(loss)
        if self.watch and not self._again:
            sums_K, count = self.load.get(layer, (0, 0))
            self.load[layer] = (sums_K + (w_BTK.detach() * counts_BT.unsqueeze(-1)).flatten(0, -2).sum(0), count + counts_BT.sum())

    def balance_loss(self) -> Tensor | None:
        """The mean over the layers of this forward, times their `balance`; None where none is balanced."""
        return torch.stack(self._balance).mean() if self._balance else None

    def _fit(self, mask_BT: Tensor | None, like_BTK: Tensor) -> Tensor:
        """A mask as fp32 [B, T]; rows repeated for beams."""
        if mask_BT is None:
            return like_BTK.new_ones(like_BTK.shape[:-1], dtype=torch.float32)
        rows, beams = like_BTK.shape[0], like_BTK.shape[0] // max(1, mask_BT.shape[0])
        if mask_BT.shape[1:] != like_BTK.shape[1:-1] or mask_BT.shape[0] * beams != rows:
            raise ValueError(
                f"the RoutingContext's mask has shape {tuple(mask_BT.shape)}, the layer's input {tuple(like_BTK.shape[:-1])}: open a "
                "context for every forward (or one around `generate`), with the masks of its batch"
            )
        return mask_BT.to(like_BTK.device).repeat_interleave(beams, 0).float()


def checkpoint_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch's checkpoint: the backward pass goes through a block again in the context that the forward was in.

    `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})`
    """
    context = current()
    return nullcontext(), nullcontext() if context is None else _again(context)


@contextmanager
def _again(context: RoutingContext) -> Iterator[None]:
    context._again = True
    try:
        with context:
            yield
    finally:
        context._again = False
