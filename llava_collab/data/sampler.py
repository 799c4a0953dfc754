"""Which samples make which step: of one modality where possible, random otherwise, sorted by length inside; resumable to the step.

As LLaVA's `group_by_modality_length` (its `LLaVATrainer`), whose mega-batch is one global batch: mixing text-only samples with pictures
in a step, or short with long ones in a micro-batch, wastes the device. Steps themselves are not sorted by length: on a mixture of tasks
that would make every step one task (tried: the loss of a small model then swings from task to task and falls more slowly).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class GroupedBatchSampler:
    """Yields lists of indices, one optimizer step's worth each, endlessly: the trainer counts steps.

    Every sample comes exactly once an epoch. The last batch that is cut of an epoch's left-overs may be smaller and may mix
    modalities; the batch with the longest sample comes first, so that a run that doesn't fit in memory stops at once. The order
    depends on `(seed, epoch)` alone. The number of batches an epoch, `len(sampler)`, is the same for every epoch, so the whole
    state is the number of batches taken.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, seed: int = 0) -> None:
        """Raises `ValueError` for no samples, lengths that don't match, or a batch size below 1."""
        if not lengths or len(lengths) != len(has_image) or batch_size < 1:
            sizes = f"{len(lengths)} lengths, {len(has_image)} has_image, batch_size {batch_size}"
            raise ValueError(f"need at least one sample, as many has_image as lengths, and batch_size >= 1; got {sizes}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.step // len(self)

    def __iter__(self) -> Iterator[list[int]]:
        """Goes on from where the state is, for ever."""
        while True:
            epoch = self.epoch
            batches = self.batches(epoch)
            while self.epoch == epoch:
                batch = batches[self.step % len(self)]
                self.step += 1  # before the batch is handed out: whoever asks for the state now has taken it
                yield batch

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch, in order."""
        rng = np.random.default_rng([self.seed, epoch])
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (True, False):
            indices = rng.permutation(np.flatnonzero(self.has_image == modality))
            whole = len(indices) - len(indices) % self.batch_size
            full += self._cut(indices[:whole])
            rest.append(indices[whole:])
        left_over = np.concatenate(rest)
        full += [left_over[k : k + self.batch_size] for k in range(0, len(left_over), self.batch_size)]
        order = rng.permutation(len(full))
        longest = max(order, key=lambda k: self.lengths[full[k]].max())
        return [full[k].tolist() for k in [longest, *(k for k in order if k != longest)]]

    def _cut(self, indices: np.ndarray) -> list[np.ndarray]:
        """Steps from shuffled indices (a multiple of the batch size), each sorted, longest first, so that micro-batches are even."""
        steps = indices.reshape(-1, self.batch_size)
        return list(np.take_along_axis(steps, np.argsort(-self.lengths[steps], axis=1, kind="stable"), axis=1))

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """JSON-able state. `taken`: batches trained on since batch 0 of epoch 0, if a loader that prefetches has drawn more."""
        return {
            "step": self.step if taken is None else taken,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on exactly behind the batches taken. Raises `ValueError` where the data or settings are others."""
        own = self.state_dict()
        keys = [key for key in own if key != "step" and state.get(key) != own[key]]
        changed = [f"{key} was {state.get(key)!r}, is {own[key]!r}" for key in keys]
        if changed:
            raise ValueError("can't resume the order of samples: " + "; ".join(changed))
        self.step = int(state["step"])

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes() + self.has_image.tobytes()).hexdigest()[:16]
        return f"{len(self.lengths)}:{digest}"
