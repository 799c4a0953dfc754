"""Which samples make which step: of one modality where possible, random otherwise, sorted by length inside; resumable to the step.

As LLaVA's `group_by_modality_length` (its `LLaVATrainer`), whose mega-batch is one global batch: mixing text-only samples with pictures
in a step, or short with long ones in a micro-batch, wastes the device. Steps themselves are not sorted by length: on a mixture of tasks
that would make every step one task (tried: the loss of a small model then swings from task to task and falls more slowly).

Where pictures come out of remote shards, a shuffle over everything would want every shard at every step. A `Window` shuffles the shards
and lets each one's samples fall at random into the stretch where it and its neighbours are open: a step draws from about `size` shards,
and one shard is taken up and one given back at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """`shards`: the number of each sample's shard, -1 where it needs none. `size`: how many shards are drawn from at a time."""

    shards: Sequence[int]
    size: int

    def places(self, rng: np.random.Generator, first: int) -> np.ndarray:
        """A place in the order for each sample, float64 [samples]; the shard of sample `first` is among those that open the epoch.

        Shard number r of the shuffled ones spreads over [r, r + size); at the beginning `size` shards start together, and nothing goes
        past the end, so that no step is of one shard alone. Samples without shard may be anywhere.
        """
        shards = np.asarray(self.shards, dtype=np.int64)
        count = int(shards.max(initial=-1)) + 1
        order = rng.permutation(count)
        if shards[first] >= 0:
            order = np.concatenate([[shards[first]], order[order != shards[first]]])
        rank = np.empty(count, dtype=np.int64)
        rank[order] = np.arange(count)
        own = rank[shards] if count else shards
        low = np.where((shards < 0) | (own < self.size), 0, own)
        high = np.where(shards < 0, max(count, 1), np.minimum(own + self.size, count))
        return low + (high - low) * rng.random(len(shards))


class GroupedBatchSampler:
    """Yields lists of indices, one optimizer step's worth each, endlessly: the trainer counts steps.

    Every sample comes exactly once an epoch. The last batch that is cut of an epoch's left-overs may be smaller and may mix
    modalities; the batch with the longest sample comes first, so that a run that doesn't fit in memory stops at once. The order
    depends on `(seed, epoch)` and the `window` alone. The number of batches an epoch, `len(sampler)`, is the same for every epoch, so
    the whole state is the number of batches taken.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, seed: int = 0, window: Window | None = None
    ) -> None:
        """`window`: draw from few shards at a time (default: one shuffle over everything).

        Raises `ValueError` for no samples, lengths that don't match, or a batch size below 1.
        """
        if not lengths or len(lengths) != len(has_image) or batch_size < 1:
            sizes = f"{len(lengths)} lengths, {len(has_image)} has_image, batch_size {batch_size}"
            raise ValueError(f"need at least one sample, as many has_image as lengths, and batch_size >= 1; got {sizes}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
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
        places = None if self.window is None else self.window.places(rng, int(self.lengths.argmax()))
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (True, False):
            indices = np.flatnonzero(self.has_image == modality)
            indices = rng.permutation(indices) if places is None else indices[np.argsort(places[indices], kind="stable")]
            whole = len(indices) - len(indices) % self.batch_size
            full += self._cut(indices[:whole])
            rest.append(indices[whole:])
        left_over = np.concatenate(rest)
        full += [left_over[k : k + self.batch_size] for k in range(0, len(left_over), self.batch_size)]
        order = rng.permutation(len(full)) if places is None else np.argsort([places[step].mean() for step in full], kind="stable")
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
            "samples": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on exactly behind the batches taken. Raises `ValueError` where the data or settings are others."""
        own = self.state_dict()
        keys = [key for key in own if key != "step" and state.get(key) != own[key]]
        changed = [f"{key} was {state.get(key)!r}, is {own[key]!r}" for key in keys]
        if changed:
            raise ValueError("can't resume the order of samples: " + "; ".join(changed))
        self.step = int(state["step"])

    @property
    def fingerprint(self) -> str:
        """Names the samples: two samplers of one fingerprint, seed and batch size give one order."""
        content = self.lengths.tobytes() + self.has_image.tobytes()
        if self.window is not None:
            content += np.asarray([*self.window.shards, self.window.size], dtype=np.int64).tobytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        return f"{len(self.lengths)}:{digest}"
