"""One `Distiller` for all that one model learns from another, and the labelers that tell the methods apart.

It minimises  sum_s w_s CE(student_s, target_s) / sum_s w_s  over the positions s of a batch: rows of a classifier, or supervised tokens of
a language model. *Who teaches, on which rows, how much* is the labeler's business:

    Targets                 plain labels, or a teacher's distributions: knowledge distillation (Hinton et al. 2015)
    two_stage_confidence    DS+'s 2CD: the large one's answer where the small was unsure and the large is sure, its own where it was sure
    WeakToStrong            weak labels mixed with the student's own hardened opinion (arXiv 2312.09390, appendix A.4)
    Tokens                  the tokens of rows that weigh differently, as TinyLLM's rationales do (arXiv 2402.04616)
    TeacherTokens           a larger language model's distributions over the next token: white-box distillation of a vocabulary

Shapes: M rows, B rows of a batch, S positions of a batch, C classes (or the vocabulary).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..files import read_json, write_bytes

STATE, TRAINED = "distil.safetensors", "training.json"


@dataclass(frozen=True)
class Positions:
    """What a labeler sees of a batch: its inputs [B], which row each position belongs to, int64 [S], the student's logits [S,C] without
    gradient (on its device; all else is on the CPU), the tokens that stand there, int64 [S] (None for a classifier), and how far the
    training is, from 0 to 1."""

    inputs: Sequence[Any]
    rows_S: Tensor
    logits_SC: Tensor
    tokens_S: Tensor | None
    progress: float


class Labeler(Protocol):
    """See the head of this file."""

    def __call__(self, at: Positions) -> tuple[Tensor, Tensor]:
        """Targets, distributions [S,C] or classes int64 [S], and weights [S]."""
        ...


@dataclass(frozen=True)
class Targets:
    """The same targets at every step: a teacher's distributions [M,C], or classes [M]; `weights_M` (default: 1 each)."""

    targets: Tensor
    weights_M: Tensor | None = None

    def __call__(self, at: Positions) -> tuple[Tensor, Tensor]:
        return self.targets[at.rows_S], torch.ones(len(at.rows_S)) if self.weights_M is None else self.weights_M[at.rows_S]


def two_stage_confidence(small_MC: Tensor, large_MC: Tensor, *, small_sure: float, large_sure: float, rehearsal: float = 1.0) -> Targets:
    """DS+'s two-stage confidence distillation (2CD). With Cs the frozen small model's and Cl the large one's distributions:

        T = { x : max Cs < small_sure  and  max Cl >= large_sure }    taught by the large model
        K = { x : max Cs >= small_sure }                              rehearsed from the small one, times `rehearsal` (lambda)

    Hard targets, as in the released code; all else weighs 0. Each sum is a mean over its own rows (the paper's expectations), so lambda
    does not depend on how many they are. Raises ValueError where T is empty: nothing could be learnt.
    """
    unsure_M = small_MC.max(1).values < small_sure
    taught_M = unsure_M & (large_MC.max(1).values >= large_sure)
    if not taught_M.any():
        raise ValueError(f"no row where the small model is below {small_sure} and the large one at {large_sure} or above: nothing to teach")
    targets_M = torch.where(taught_M, large_MC.argmax(1), small_MC.argmax(1))
    rate = len(targets_M)  # so that weights are of the order of 1
    weights_M = torch.where(taught_M, rate / taught_M.sum(), torch.zeros(()))
    weights_M = torch.where(unsure_M, weights_M, rehearsal * rate / (~unsure_M).sum().clamp(min=1))
    return Targets(targets_M, weights_M)


@dataclass(frozen=True)
class WeakToStrong:
    """(1 - a) weak + a harden(student), with `a` rising linearly from 0 to `alpha` over the first `warmup` of training, without a jump.

    The student's hardened opinion keeps the classes in the proportions of the weak labels: for two classes, the threshold is the quantile
    of the batch's logit differences (the paper's: half the batch positive, for balanced classes); for more, each class's logits are shifted
    until the student's mean probabilities on the batch are the weak labels' shares (ours; the paper has two classes only).
    `alpha` = 0 is naive training on the weak labels, exactly.
    """

    weak_MC: Tensor
    alpha: float = 0.5
    warmup: float = 0.2

    def mixed(self, progress: float) -> float:
        """`a` at this point of the training."""
        return self.alpha * min(1.0, progress / self.warmup if self.warmup else 1.0)

    def __call__(self, at: Positions) -> tuple[Tensor, Tensor]:
        weak_SC, a = self.weak_MC[at.rows_S], self.mixed(at.progress)
        if a > 0.0:
            own_S = harden(at.logits_SC.cpu(), self.weak_MC.mean(0))
            weak_SC = (1 - a) * weak_SC + a * F.one_hot(own_S, weak_SC.shape[1]).to(weak_SC)
        return weak_SC, torch.ones(len(at.rows_S))


def harden(logits_SC: Tensor, prior_C: Tensor) -> Tensor:
    """int64 [S]: the student's opinions as classes, in the proportions of `prior_C` (see `WeakToStrong`)."""
    if logits_SC.shape[1] == 2:
        margin_S = logits_SC[:, 1] - logits_SC[:, 0]
        return (margin_S > torch.quantile(margin_S, float(prior_C[0].clamp(0, 1)))).long()
    shift_C = torch.zeros(logits_SC.shape[1])
    for _ in range(20):
        shares_C = (logits_SC + shift_C).softmax(1).mean(0)
        shift_C += (prior_C.clamp(min=1e-6) / shares_C.clamp(min=1e-6)).log()
    return (logits_SC + shift_C).argmax(1)


@dataclass(frozen=True)
class Tokens:
    """The tokens that stand there, each weighing as its row does: 1 for answers, alpha_m for the rationales of teacher m."""

    weights_M: Tensor

    def __call__(self, at: Positions) -> tuple[Tensor, Tensor]:
        if at.tokens_S is None:
            raise ValueError("this labeler is for language models: the student has to be a `TokenStudent`")
        return at.tokens_S, self.weights_M[at.rows_S]


@dataclass(frozen=True)
class TeacherTokens:
    """A teacher's distributions over the next token, at `temperature`; `share` of the target, the rest is the token that stands there.

    Raises ValueError where teacher and student do not write the same tokens, or not out of one vocabulary.
    """

    teacher: TokenStudent
    temperature: float = 1.0
    share: float = 1.0

    def __call__(self, at: Positions) -> tuple[Tensor, Tensor]:
        if at.tokens_S is None or not torch.equal(self.teacher.positions(at.inputs)[1], at.tokens_S):
            raise ValueError("teacher and student have to write an answer in the same tokens: one tokenizer, and one chat template")
        with torch.no_grad():
            soft_SC = (self.teacher(at.inputs).float() / self.temperature).softmax(-1).to(at.logits_SC.device)
        if soft_SC.shape != at.logits_SC.shape:
            raise ValueError(f"teacher and student have to share a vocabulary, theirs are {soft_SC.shape[1]} and {at.logits_SC.shape[1]}")
        own_SC = F.one_hot(at.tokens_S.to(soft_SC.device), soft_SC.shape[1])
        return self.share * soft_SC + (1 - self.share) * own_SC, torch.ones(len(at.rows_S))


class TokenStudent(torch.nn.Module):
    """A language or vision-language model as a student: logits [S,V] where the next token is supervised.

    Inputs are samples as `collate` takes them (what a processor's `encode` gives: `input_ids`, `labels`, pixels or features).
    """

    def __init__(self, network: torch.nn.Module, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.network, self.collate = network, collate

    def forward(self, inputs: Sequence[Any]) -> Tensor:
        device = next(self.network.parameters()).device
        batch = self.collate(inputs)
        fields = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k not in ("labels", "guidance_mask")}
        if "guidance_mask" in batch and getattr(getattr(self.network, "config", None), "model_type", "") == "hyper_llava":
            fields["guidance_mask"] = batch["guidance_mask"].to(device)
        return self.network(**fields).logits[:, :-1][(batch["labels"][:, 1:] != -100).to(device)]

    def positions(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Which of the inputs each position belongs to, int64 [S], and the token that stands there, int64 [S]."""
        labels_BT = self.collate(inputs)["labels"][:, 1:]
        rows_S, _ = (labels_BT != -100).nonzero(as_tuple=True)
        return rows_S, labels_BT[labels_BT != -100]


@dataclass(frozen=True)
class Distiller:
    """How to learn; `fit` does it. A student is a module whose call on a list of inputs gives logits [B,C], or a `TokenStudent`."""

    steps: int = 500
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises; then it falls along a cosine to 0."""
    clip_norm: float = 1.0
    seed: int = 0
    """Draws the order of the rows."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); parameters and loss stay in their type."""

    def fit(
        self,
        student: torch.nn.Module,
        inputs: Sequence[Any],
        labeler: Labeler,
        *,
        folder: Path | None = None,
        save_every: int = 0,
        of: str = "",
        quiet: bool = False,
    ) -> list[float]:
        """Train `student` in place on `inputs` [M]; the losses of all steps.

        With `folder` and `save_every` (steps), the same call after a kill goes on from the last save, to the same result; `of` tells apart
        what the settings here do not: data, teacher, base. Raises ValueError for no inputs, for a folder of another training, and for a
        loss that is not finite, with step and rows, before the update.
        """
        if not inputs:
            raise ValueError("nothing to learn from: no rows")
        parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=self.weight_decay)
        kept, same = folder / STATE if folder is not None and save_every else None, {"distiller": json.dumps(asdict(self)), "of": of}
        losses = json.loads(load_state(kept, parameters, optimizer, same).get("losses", "[]")) if kept is not None else []
        student.train()
        with tqdm(total=self.steps, initial=len(losses), desc="distil", unit="step", disable=quiet) as bar:
            for step in range(len(losses), self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * rate(step, self.steps, self.warmup)
                losses.append(self._step(student, inputs, labeler, optimizer, step))
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
                if kept is not None and (step + 1) % save_every == 0:
                    save_state(kept, parameters, optimizer, same | {"losses": json.dumps(losses)})
        student.eval()
        return losses

    def _step(
        self, student: torch.nn.Module, inputs: Sequence[Any], labeler: Labeler, optimizer: torch.optim.Optimizer, step: int
    ) -> float:
        rows_B = rows_of(step, self.batch_size, len(inputs), self.seed)
        batch = [inputs[row] for row in rows_B.tolist()]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=self.bf16):
            logits_SC = student(batch)
        logits_SC = logits_SC.float()
        at_S, tokens_S = student.positions(batch) if isinstance(student, TokenStudent) else (torch.arange(len(batch)), None)
        if len(at_S) != len(logits_SC):
            raise ValueError(f"the student gave {len(logits_SC)} rows of logits for {len(at_S)} positions")
        at = Positions(batch, rows_B[at_S], logits_SC.detach(), tokens_S, step / max(1, self.steps - 1))
        targets, weights_S = (value.to(logits_SC.device) for value in labeler(at))
        total = weights_S.sum()
        losses_S = F.cross_entropy(logits_SC, targets.to(logits_SC.dtype) if targets.is_floating_point() else targets, reduction="none")
        loss = (weights_S * losses_S).sum() / total.clamp(min=1e-12)  # a batch of rows that all weigh 0 moves nothing
        if not torch.isfinite(loss):
            first = rows_B[:8].tolist()
            raise ValueError(f"step {step + 1}: the loss is {loss.item()}; the batch's rows start with {first}. Look at them, or lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        optimizer.step()
        return float(loss.detach())


def finished_before(folder: Path, arguments: Mapping[str, str]) -> bool:
    """Whether TRAINED, which a program writes last, is there; says so. Raises ValueError where it is of other arguments."""
    if not (folder / TRAINED).is_file():
        return False
    if read_json(folder / TRAINED)["arguments"] != arguments:
        raise ValueError(f"{folder} holds a training by other arguments ({TRAINED}); name another folder")
    print(f"{folder}: finished before")
    return True


def save_state(
    path: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, about: Mapping[str, str]
) -> None:
    """What learns, its moments, and `about` in one file, so that a kill leaves the old one or the new one."""
    tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": torch.as_tensor(value).detach().cpu().contiguous() for key, value in optimizer.state[p].items()}
    write_bytes(path, save(tensors, dict(about)))


def load_state(
    path: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, same: Mapping[str, str]
) -> dict[str, str]:
    """Put back what `save_state` wrote; its `about`, or nothing where there is no file. Raises ValueError where `about` has other values
    than `same`, or where something else learns."""
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    cure = "delete it, or name another folder"
    if differ := sorted(key for key, value in same.items() if about.get(key) != value):
        raise ValueError(f"{path} is of another training: {differ[0]} is {about.get(differ[0])!r} there, {same[differ[0]]!r} here; {cure}")
    tensors = load_file(path)
    stored = {key.removeprefix("parameter.") for key in tensors if key.startswith("parameter.")}
    if stored != parameters.keys():
        raise ValueError(f"{path} is of another student: {sorted(stored ^ parameters.keys())[0]!r} differs; {cure}")
    for name, p in parameters.items():
        p.data.copy_(tensors[f"parameter.{name}"])
        moments = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]  # none where no gradient ever came
        optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(p.device if key != "step" else "cpu") for key in moments}
    return dict(about)


def rows_of(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """int64 [B] of a step: every epoch is a permutation drawn from seed and epoch, so that a resumed training sees the same."""
    size = min(batch_size, count)
    places = range(step * size, (step + 1) * size)
    return torch.stack([_order(seed, place // count, count)[place % count] for place in places])


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: up along a line over the share `warmup` of the steps, then down along a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
