"""Controls that show whether a model looks: questions with another question's image, and questions without any image.

An accuracy that survives either was not earned by looking.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llava_collab.data.conversation import IMAGE_MARK

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample

_log = logging.getLogger(__name__)


def blind(samples: Iterable[Sample]) -> list[Sample]:
    """The same questions without images and without their `<image>` marks (with the line break that follows a mark)."""
    return [
        replace(
            sample,
            images=(),
            turns=tuple(replace(t, text=t.text.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").strip()) for t in sample.turns),
        )
        for sample in samples
    ]


def permute_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Give every sample the images of another one that asks the same question (same category, family and prompt, as many images).

    Within such a group images are permuted, so that each is used as often as before, and nobody keeps its own or an equal one. Where a
    group does not allow this (one sample, or one image in more than half of them), its samples are permuted within their family, and as a
    last resort get the images of a random other sample of the family. What can't be changed at all stays as it is, and is warned of.
    `meta["images_from"]` names the donor. Samples keep their order.
    """
    rng = random.Random(seed)  # noqa: S311 - an experiment's seed, not a secret
    donors: dict[int, int] = {}
    with_images = [i for i, sample in enumerate(samples) if sample.images]
    for narrow in (_question, _family):
        left = [i for i in with_images if i not in donors]
        for group in _groups(samples, left, narrow):
            donors |= _derange(samples, group, rng)
    for group in _groups(samples, with_images, _family):
        for i in group:
            others = [j for j in group if samples[j].images != samples[i].images]
            if i not in donors and others:
                donors[i] = rng.choice(others)
    kept = [samples[i].id for i in with_images if i not in donors]
    if kept:
        _log.warning("%d of %d samples keep their image, no other of their family has another: %s", len(kept), len(samples), kept[:5])
    return [
        replace(sample, images=samples[donors[i]].images, meta={**sample.meta, "images_from": samples[donors[i]].id})
        if i in donors
        else sample
        for i, sample in enumerate(samples)
    ]


def _family(sample: Sample) -> tuple[str, ...]:
    return (sample.category, sample.family, str(len(sample.images)))


def _question(sample: Sample) -> tuple[str, ...]:
    return (*_family(sample), *(turn.text for turn in sample.turns if turn.role != "assistant"))


def _groups(samples: Sequence[Sample], indices: Iterable[int], key: Callable[[Sample], tuple[str, ...]]) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in indices:
        groups[key(samples[i])].append(i)
    return list(groups.values())


def _derange(samples: Sequence[Sample], group: list[int], rng: random.Random) -> dict[int, int]:
    """Donors within the group, each sample used once; {} where that is not possible.

    Sorted into blocks of equal images and rotated by the largest block, no sample meets its own block: this works exactly when no block
    is larger than half of the group.
    """
    counts = Counter(samples[i].images for i in group)
    largest = max(counts.values())
    if 2 * largest > len(group):
        return {}
    block = {images: rng.random() for images in counts}
    order = sorted(group, key=lambda i: (block[samples[i].images], rng.random()))
    return {i: order[(at + largest) % len(order)] for at, i in enumerate(order)}
