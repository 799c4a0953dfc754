"""What a frozen vision tower sees, computed once: one bf16 safetensors file per picture, found by the picture's bytes.

The tower and its preprocessing are named by `tower_key`, so features of one tower are never taken for those of another;
all are computed in bf16 (`models.build.feature_cache`).
Shapes: N images, P image tokens, D width of the tower.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from llava_collab.data.conversation import SampleError
from llava_collab.data.images import Picture, load_image, resolve_image
from llava_collab.data.shards import ShardMember
from llava_collab.files import write_bytes


@dataclass
class FillReport:
    """What `FeatureCache.fill` did: pictures computed, pictures that were there, and paths skipped, by reason."""

    computed: int = 0
    cached: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)


class FeatureCache:
    """Features [P,D] by picture. Safe for several processes: files appear whole or not at all, and the same key has the same content."""

    def __init__(self, root: Path, tower_key: str) -> None:
        """Raises `ValueError` where `tower_key` can't be a folder name."""
        if not re.fullmatch(r"[\w.+-]+", tower_key) or tower_key.startswith("."):
            raise ValueError(f"tower_key {tower_key!r} may hold letters, digits and . _ + - only (it names a folder)")
        self.folder = Path(root) / tower_key
        self._keys: dict[ShardMember | tuple[str, int, int], str] = {}

    def key(self, picture: Picture | str) -> str:
        """sha256 of the picture's bytes, remembered while its file keeps size and time. Raises `SampleError` (missing_image)."""
        path = resolve_image(picture)
        if path is None:
            raise SampleError("", "missing_image", f"no image file {picture}", str(picture))
        if isinstance(path, ShardMember):
            known = path
        else:
            stat = path.stat()
            known = (str(path), stat.st_mtime_ns, stat.st_size)
        if known not in self._keys:
            self._keys[known] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._keys[known]

    def get(self, path: Picture | str) -> torch.Tensor | None:
        """Features [P,D] bf16 of the picture, or None where they aren't there or their file is damaged (`put` replaces it)."""
        file = self._file(self.key(path))
        if not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as opened:
                features_PD, checksum = opened.get_tensor("features"), (opened.metadata() or {}).get("crc32")
        except (SafetensorError, OSError, ValueError):
            return None
        return features_PD if checksum == _crc32(features_PD) else None

    def put(self, path: Picture | str, tensor: torch.Tensor) -> None:
        """Keeps features [P,D] of the picture as bf16. Raises `OSError` naming the folder where they can't be written (disk full)."""
        file = self._file(self.key(path))
        features_PD = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        try:
            write_bytes(file, save({"features": features_PD}, metadata={"crc32": _crc32(features_PD)}))
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"can't write features to {file.parent} ({reason}); free some space or move the cache") from error

    def fill(self, paths: Iterable[Picture | str], extract: Callable[[list[Image.Image]], torch.Tensor], batch_size: int) -> FillReport:
        """Computes what is missing; started again it goes on where it stopped. `extract`: N pictures -> [N,P,D].

        Pictures that can't be opened are skipped and reported; errors of `extract` and of the disk are raised.
        """
        report = FillReport()
        seen: set[str] = set()
        batch: list[tuple[Picture | str, Image.Image]] = []
        for path in tqdm(list(paths), desc="vision features", unit="image"):
            try:
                key = self.key(path)
                if key in seen:
                    continue
                seen.add(key)
                if self.get(path) is not None:
                    report.cached += 1
                    continue
                batch.append((path, load_image(path)))
            except SampleError as error:
                report.skipped.setdefault(error.reason, []).append(str(path))
            if len(batch) == batch_size:
                self._compute(batch, extract, report)
                batch = []
        self._compute(batch, extract, report)
        return report

    def _compute(
        self, batch: list[tuple[Picture | str, Image.Image]], extract: Callable[[list[Image.Image]], torch.Tensor], report: FillReport
    ) -> None:
        if batch:
            features_NPD = extract([image for _, image in batch])
            for (path, _), features_PD in zip(batch, features_NPD, strict=True):
                self.put(path, features_PD)
            report.computed += len(batch)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _crc32(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes()):08x}"
