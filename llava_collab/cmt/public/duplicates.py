"""Near-duplicate pictures: a 64-bit perceptual hash, a cache of hashes that survives a stop, and a search without comparing all pairs.

The hash is pHash as the ImageHash library computes it (which would bring scipy and PyWavelets along): grey, 32 x 32, DCT-II, the
8 x 8 lowest frequencies, one bit for each that is above their median. Copies of a photograph that were scaled or saved again differ in
at most 4 bits, and unrelated photographs hardly ever do; flat drawings and document pages are closer together, which costs training
entries, never the separation of the splits.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from llava_collab.cmt.public.entries import SourceError
from llava_collab.data.conversation import SampleError
from llava_collab.data.images import load_image, resolve_image
from llava_collab.files import write_text

DISTANCE = 4  # bits of 64
CACHE = "picture_hashes.jsonl"
_MADE_BY = json.dumps({"hash": "pHash, 32 x 32 to 64 bits", "Pillow": PIL.__version__}) + "\n"  # decoders differ in a last bit
_SIDE, _KEPT = 32, 8
_DCT = np.cos(np.pi * (2 * np.arange(_SIDE)[None] + 1) * np.arange(_KEPT)[:, None] / (2 * _SIDE))
# Five bands cover the 64 bits: two hashes that differ in 4 bits are equal in at least one of them.
_BANDS = tuple((start, min(start + 13, 64) - start) for start in range(0, 64, 13))

Known = dict[str, tuple[int, int, int]]  # path -> size, time of change (ns), hash


def perceptual_hash(image: Image.Image) -> int:
    """pHash of a picture, 64 bits."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_DCT @ grey @ _DCT.T).round(6)  # what is zero but for rounding must not depend on the machine
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def hash_pictures(out: Path, images: Iterable[str], workers: int) -> dict[str, int | str]:
    """Path below `out` -> hash, or the reason why the picture can't be read.

    A picture that is unchanged since its hash went into the cache isn't read again. What could not be read isn't cached: the cause may
    be a disk that was away for a moment. Another hash or another Pillow starts the cache anew.
    Raises SourceError where a worker was killed.
    """
    known = _read_cache(out / CACHE)
    stamps = {image: _stamp(out / image) for image in images}
    found: dict[str, int | str] = {image: known[image][2] for image in stamps if known.get(image, ())[:2] == stamps[image]}
    todo = [image for image in sorted(stamps) if image not in found]
    lines = (_line(image, *known[image]) for image in sorted(known))  # without a line that a stop cut off
    write_text(out / CACHE, _MADE_BY + "".join(lines))
    with (out / CACHE).open("a", encoding="utf8") as cache:
        for image, value in tqdm(_run([(out, image) for image in todo], workers), total=len(todo), desc="hashing", unit="picture"):
            found[image] = value
            if isinstance(value, int):
                cache.write(_line(image, *stamps[image], value))
                cache.flush()
    return found


def _read_cache(path: Path) -> Known:
    made_by, *lines = (path.read_text(encoding="utf8") if path.is_file() else "").splitlines(keepends=True) or [""]
    known: Known = {}
    for line in lines if made_by == _MADE_BY else ():
        try:
            image, size, changed, value = json.loads(line)
        except ValueError:
            continue  # the line during which an earlier build was stopped
        known[image] = (size, changed, value)
    return known


def _line(image: str, size: int, changed: int, value: int) -> str:
    return json.dumps([image, size, changed, value]) + "\n"


def _stamp(path: Path) -> tuple[int, int]:
    status = (resolve_image(path) or path).stat()
    return status.st_size, status.st_mtime_ns


def _work(task: tuple[Path, str]) -> tuple[str, int | str]:
    out, image = task
    try:
        return image, perceptual_hash(load_image(out / image))
    except SampleError as error:
        return image, error.reason


def _run(tasks: list[tuple[Path, str]], workers: int) -> Iterator[tuple[str, int | str]]:
    if workers == 1 or len(tasks) < 64:  # starting processes takes longer
        yield from map(_work, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # not forked: the caller may hold threads (torch does)
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            yield from pool.map(_work, tasks, chunksize=16)
    except BrokenProcessPool as error:
        raise SourceError(
            "a process that hashed pictures was killed, most often for want of memory; what it hashed is kept, run again with --workers 1"
        ) from error


class NearIndex:
    """All hashes within `DISTANCE` bits of one, found by equal bands (Manku et al. 2007): a look-up compares a few candidates only."""

    def __init__(self, hashes: Iterable[int]) -> None:
        self.hashes = np.fromiter(hashes, dtype=np.uint64)
        self._bands = []
        for band in _BANDS:
            values = _band(self.hashes, *band)
            order = np.argsort(values, kind="stable")
            self._bands.append((band, order, values[order]))

    def near(self, value: int) -> list[int]:
        """Positions of the hashes that are near `value`, ascending; a hash is near itself."""
        wanted = np.uint64(value)
        candidates = []
        for band, order, values in self._bands:
            key = _band(wanted, *band)
            candidates.append(order[np.searchsorted(values, key, "left") : np.searchsorted(values, key, "right")])
        found = np.unique(np.concatenate(candidates))
        return found[np.bitwise_count(self.hashes[found] ^ wanted) <= DISTANCE].tolist()


def _band(hashes: np.ndarray | np.uint64, start: int, width: int) -> np.ndarray:
    return np.asarray((hashes >> np.uint64(start)) & np.uint64((1 << width) - 1))
