"""What a small classifier sees in a picture, put in the form of CMT-open's `truth`, so that the rules of `cmt.oracle` can answer from it.

EfficientNet-lite0 (3.4 M, ImageNet) looks at the picture once; linear classifiers, fitted to training pictures, say of each quarter which
thing stands there, if any, and whether it is large, and of the whole where it was taken. Shapes: N pictures, Q = 4 quarters, V channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from llava_collab.data.images import load_image

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample

FAMILIES = ("exists", "which", "count", "kind", "name", "caption", "side", "relation", "neighbour", "inventory")
NOTHING = ""
_PICTURES, _BATCH, _SIDE = 2000, 16, 224


def sees(family: str) -> bool:
    """Is there a rule for what stands in this family's pictures?"""
    return family.startswith(FAMILIES)


class Quarters:
    """Features [N,Q,2V] of pictures: mean and maximum over each quarter (4 x 4 of EfficientNet-lite0's 7 x 7 cells, so they overlap)."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode
        from transformers import AutoModel, CLIPImageProcessorPil

        from llava_collab.models.bases import prepare
        from llava_collab.models.efficientnet_lite import EfficientNetLiteModel

        source = prepare("efficientnet-lite0")
        self._network: EfficientNetLiteModel = AutoModel.from_pretrained(source, dtype=torch.bfloat16).eval()
        self._processor = CLIPImageProcessorPil.from_pretrained(source)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            self._network(torch.zeros(1, 3, _SIDE, _SIDE, dtype=torch.bfloat16))
        self.flops = float(counter.get_total_flops())
        """FLOPs a picture."""

    @torch.inference_mode()
    def __call__(self, paths: Sequence[Path]) -> NDArray[np.float32]:
        found = []
        for at in tqdm(range(0, len(paths), _BATCH), desc="detector", unit="batch", disable=len(paths) <= _BATCH):
            images = [load_image(path) for path in paths[at : at + _BATCH]]
            pixels_N3HW = self._processor(images, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
            cells_NPV: Tensor = self._network(pixels_N3HW).last_hidden_state.float()
            side = int(cells_NPV.shape[1] ** 0.5)
            cells_NYXV, half = cells_NPV.unflatten(1, (side, side)), (side + 1) // 2
            ends = [(y, x) for y in (0, side - half) for x in (0, side - half)]
            parts = [cells_NYXV[:, y : y + half, x : x + half].flatten(1, 2) for y, x in ends]
            found.append(torch.stack([torch.cat([part.mean(1), part.amax(1)], -1) for part in parts], 1))
        return torch.cat(found).numpy()


class Detector:
    """Fitted to at most `pictures` training pictures whose `truth` names their things; `features` as of `Quarters`. Raises ValueError where
    no picture does."""

    def __init__(
        self, train: Iterable[Sample], features: Callable[[Sequence[Path]], NDArray[np.float32]], pictures: int = _PICTURES
    ) -> None:
        shown = {sample.images[0]: sample.meta["truth"][0] for sample in train if sees(sample.family) and sample.meta.get("truth")}
        known = [(Path(path), truth) for path, truth in shown.items() if truth.get("objects")][:pictures]
        if not known:
            raise ValueError("no training picture says which things it shows: the detector answers CMT-open, second edition, only")
        self._see = features
        seen_NQV = features([path for path, _ in known])
        quarters = [_by_quarter(truth["objects"]) for _, truth in known]
        names = [own[q][0] if q in own else NOTHING for own in quarters for q in range(4)]
        self._things = _fit(seen_NQV.reshape(-1, seen_NQV.shape[2]), names)
        sized = [(seen_NQV[n, q], large) for n, own in enumerate(quarters) for q, (_, large) in own.items()]
        self._large = _fit(np.stack([row for row, _ in sized]), [large for _, large in sized])
        self._place = _fit(seen_NQV.mean(1), [truth.get("place", "") for _, truth in known])

    def truth(self, path: Path) -> tuple[dict[str, Any], float]:
        """`truth` as far as it is seen, and how sure: the least probability of the four quarters' verdicts."""
        seen_QV = self._see([path])[0]
        p_QC = self._things.predict_proba(seen_QV)
        large_Q = self._large.predict(seen_QV)
        names = [str(name) for name in self._things.classes_[p_QC.argmax(1)]]
        objects = [{"name": name, "box": _box(q), "large": bool(large_Q[q])} for q, name in enumerate(names) if name != NOTHING]
        place = str(self._place.predict(seen_QV.mean(0, keepdims=True))[0])
        return {"objects": objects, "place": place}, float(p_QC.max(1).min())


def _by_quarter(objects: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, bool]]:
    """Name and size of what has its middle in each quarter (top left, top right, bottom left, bottom right)."""
    found = {}
    for one in objects:
        x0, y0, x1, y1 = one["box"]
        found[2 * (y0 + y1 > _SIDE) + (x0 + x1 > _SIDE)] = (one["name"], bool(one.get("large")))
    return found


def _box(quarter: int) -> list[int]:
    x, y = _SIDE // 2 * (quarter % 2), _SIDE // 2 * (quarter // 2)
    return [x, y, x + _SIDE // 2, y + _SIDE // 2]


def _fit(features_MV: NDArray[np.float32], labels: Sequence[Any]) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) == 1:
        return DummyClassifier().fit(features_MV, np.array(labels))
    width = min(256, *features_MV.shape)  # quicker than all channels, and no worse
    steps = StandardScaler(), PCA(width, svd_solver="randomized", random_state=0), LogisticRegression(C=0.1, max_iter=200)
    return make_pipeline(*steps).fit(features_MV, np.array(labels))
