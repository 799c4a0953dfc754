"""Two guards around the optimiser step: nothing that is not finite gets in, and every parameter that should learn does learn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from llava_collab.files import write_json
from llava_collab.training.components import IMAGE_ONLY, component_of

if TYPE_CHECKING:
    from llava_collab.training.engines import DataParallel


class NonFiniteError(RuntimeError):
    """A loss or a gradient is infinite or not a number; raised before the weights are touched."""


class CoverageError(RuntimeError):
    """A parameter that the recipe trains gets no gradient, or does not move."""


def check_finite(
    step: int,
    total: float,
    losses: Sequence[Tensor],
    sample_ids: Sequence[list[str]],
    norms: dict[str, Tensor],
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Raise NonFiniteError, on all ranks, if the step's loss or a gradient norm is not finite; writes `folder/nan_report.json`.

    total: the loss summed over ranks. losses, sample_ids: of this rank's micro-batches. norms: of the summed gradients, so the same
    on all ranks. The samples named are those of the micro-batches whose own loss is not finite, or else all of the step.
    """
    norm_values = {component: float(norm) for component, norm in norms.items()}
    if math.isfinite(total) and all(math.isfinite(norm) for norm in norm_values.values()):
        return
    values = [float(loss) for loss in losses]
    batches = [{"loss": repr(v), "finite": math.isfinite(v), "sample_ids": ids} for v, ids in zip(values, sample_ids, strict=True)]
    ranks = gather_object([batches]) if accelerator.num_processes > 1 else [batches]
    narrow = any(not batch["finite"] for rank in ranks for batch in rank)
    suspects = [[i for batch in rank if not (narrow and batch["finite"]) for i in batch["sample_ids"]] for rank in ranks]
    shown = {component: repr(norm) for component, norm in norm_values.items()}  # JSON has no nan
    report = {"step": step, "micro_batches_by_rank": ranks, "grad_norms": shown}
    if accelerator.is_main_process:
        write_json(folder / "nan_report.json", report)
    where = "; ".join(f"rank {rank}: samples {', '.join(ids)}" for rank, ids in enumerate(suspects) if ids)
    norms_text = ", ".join(f"{component} {norm:.3g}" for component, norm in norm_values.items())
    raise NonFiniteError(
        f"step {step}: the loss or a gradient is not finite ({where}). Gradient norms: {norms_text}. The weights were not updated; "
        f"details are in {folder / 'nan_report.json'}. Look at these samples, lower optim.lr, or go on in fp32 in a new run."
    )


class LossSpikes:
    """Notices a step whose loss stands far above those before it: by 8 median deviations and a third over the median of the last 50."""

    LAST, FIRST = 50, 20

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.LAST)

    def look(self, loss: float) -> float | None:
        """The median of the losses before, if this one is a spike; None if not, or if there are too few before it."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < self.FIRST:
            return None
        middle = median(before)
        spread = median(abs(value - middle) for value in before)
        return middle if loss > max(middle + 8 * spread, middle * 4 / 3) else None


class Coverage:
    """Checks that every trainable parameter gets a gradient at the first step and has moved after the third step with a positive rate.

    For parts that only images reach, steps with images count. `exempt` parts (those, in a blind run) are not checked. Some of a
    hypernetwork's gradients are exactly zero at its first step by design (its output layer starts at zero), so the first check asks
    for a gradient that is there and finite, not for one that differs from zero.
    """

    MOVE_STEPS = 3

    def __init__(self, engine: DataParallel, exempt: frozenset[str] = frozenset()) -> None:
        self.engine = engine
        names = [name for name in engine.trainable if component_of(name) not in exempt]
        self.need_gradient = set(names)
        self.need_move = set(names)
        self._start = {name: _fingerprint(engine.local(name)) for name in names}
        self._steps = {False: 0, True: 0}  # steps with a positive rate: all, and those with images

    def after_backward(self, step: int, missing: set[str], has_images: bool) -> None:
        """`missing`: names without a gradient on any rank. Raises CoverageError listing those that should have had one."""
        due = {name for name in self.need_gradient if has_images or not _image_only(name)}
        bad = sorted(due & missing)
        if bad:
            raise CoverageError(
                f"step {step}: {len(bad)} trainable parameters got no gradient: {_listed(bad)}. They are not used by the "
                "forward pass, or the graph to them is cut; freeze them in the recipe's tune section or connect them."
            )
        self.need_gradient -= due

    def after_step(self, step: int, rates: dict[str, float], has_images: bool) -> None:
        """`rates`: learning rate by part. Raises CoverageError listing parameters that should have moved by now."""
        if not self.need_move or max(rates.values()) <= 0:
            return
        self._steps[False] += 1
        self._steps[True] += has_images
        due = [name for name in sorted(self.need_move) if self._steps[_image_only(name)] >= self.MOVE_STEPS]
        moved = self.engine.anywhere([_fingerprint(self.engine.local(name)) != self._start[name] for name in due])
        still = [name for name, has in zip(due, moved, strict=True) if not has]
        self.need_move -= set(due) - set(still)
        # A rate that is small beside a weight may be rounded away: look again at the next step
        large = self.engine.anywhere([rates[component_of(name)] > _least(self.engine.local(name)) for name in still])
        bad = [name for name, is_large in zip(still, large, strict=True) if is_large]
        if bad:
            raise CoverageError(
                f"step {step}: {len(bad)} trainable parameters have not moved after {self.MOVE_STEPS} steps: {_listed(bad)}. Their "
                "gradient is zero, or the optimiser does not hold them."
            )

    def unchecked(self) -> list[str]:
        """What the run was too short, or saw too few images, to check."""
        left = self.need_gradient | self.need_move
        if not left:
            return []
        return [f"not checked, the run was too short or had too few images: {len(left)} parameters: {_listed(sorted(left), 5)}"]


def _image_only(name: str) -> bool:
    return component_of(name) in IMAGE_ONLY


def _least(parameter: Tensor) -> float:
    """The smallest step that is sure to change the largest weight; infinite where a rank holds no part of a parameter."""
    return 4 * torch.finfo(parameter.dtype).eps * float(parameter.abs().max()) if parameter.numel() else math.inf


def _fingerprint(parameter: Tensor) -> int:
    """Sum of the bit patterns: changes when the values do (but for coincidences), without keeping a copy."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
    return int(parameter.contiguous().view(integer).sum(dtype=torch.int64))


def _listed(names: list[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
