"""What must be equal for two runs to be the same one: hashes of data, pictures, metrics and limits, kept in `run.json`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_collab.data.images import resolve_image
from llava_collab.evaluation.metrics import Scorer, references
from llava_collab.files import sha256
from llava_collab.types import Model

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample

SCORED_BY = ("human_answers", "choices", "objects", "checklist", "beats")
"""What metrics read of a sample's `meta`."""


def run_identity(
    model: Model, samples: Sequence[Sample], scorer: Scorer, max_new_tokens: Mapping[str, int], split: str, more: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be equal for two runs to be the same one; also what a reader needs to trust a number."""
    frequencies = scorer.context.frequencies
    metrics: dict[str, Any] = {"versions": scorer.versions, "categories": dict(scorer.categories)}
    metrics["families"] = {f"{category}/{family}": metric for (category, family), metric in sorted(scorer.families.items())}
    metrics["frequencies_sha256"] = frequencies.sha256() if frequencies else None
    metrics["objects_sha256"] = _digest(scorer.context.objects)
    return {
        "model": model.name,
        "split": split,
        "data_sha256": data_sha256(samples),
        "images_sha256": images_sha256(samples),
        "items": dict(sorted(Counter(sample.category for sample in samples).items())),
        "max_new_tokens": dict(max_new_tokens),
        "metrics": metrics,
        **more,
    }


def data_sha256(samples: Sequence[Sample]) -> str:
    """Hash of what is asked and what counts as right: ids, turns, image file names, references and what else metrics read, whatever the
    order of the samples.
    """
    return _digest(sorted(map(_asked, samples)))


def _asked(sample: Sample) -> list[Any]:
    turns, images = [[turn.role, turn.text] for turn in sample.turns], [image.name for image in sample.images]
    return [sample.id, turns, images, list(references(sample)), [sample.meta.get(key) for key in SCORED_BY]]


def images_sha256(samples: Sequence[Sample]) -> str:
    """Hash of the bytes of every sample's image files, whatever the order of the samples; a file that isn't there counts as such.

    Beside `data_sha256`, so that a difference says which of the two moved. A process reads each file once for this; the evaluation reads
    it anyway.
    """
    return _digest(sorted([s.id, [_file_sha256(image) for image in s.images]] for s in samples if s.images))


def _file_sha256(path: Path) -> str:
    found = resolve_image(path)
    if found is None:
        return "missing"
    stat = found.stat()
    return _remembered(found, stat.st_mtime_ns, stat.st_size)


@cache
def _remembered(path: Path, modified: int, size: int) -> str:
    return sha256(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
