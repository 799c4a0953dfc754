"""Opening pictures safely, and LLaVA's padding to a square.

A broken picture is a `SampleError` with a countable reason, never a crash in the middle of a run and never half a picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llava_collab.data.conversation import SampleError
from llava_collab.data.places import ShardError
from llava_collab.data.shards import ShardMember

MAX_PIXELS = 89_478_485  # Pillow's own mark of a decompression bomb (a quarter of a GiB of RGB); Pillow only warns there
# Copies of LLaVA's OCR-VQA images differ in this: the files came as .jpg, .png and .gif, the data file says .jpg.
ALIASES = (".jpg", ".jpeg", ".png", ".gif", ".webp")

Picture = Path | ShardMember
"""A picture's file, or its place in a shard."""


@overload
def resolve_image(path: Path | str) -> Path | None: ...
@overload
def resolve_image(path: Picture | str) -> Picture | None: ...
def resolve_image(path: Picture | str) -> Picture | None:
    """The file itself, or the same name under another image extension (`.gif` for `.jpg` ...); None if there is neither."""
    if isinstance(path, ShardMember):
        return path
    path = Path(path)
    if path.is_file():
        return path
    return next((alias for suffix in ALIASES if (alias := path.with_suffix(suffix)).is_file()), None)


def load_image(path: Picture | str, sample_id: str = "") -> Image.Image:
    """The picture as RGB, fully decoded; transparency on white, EXIF rotation applied, first frame of an animation.

    Raises `SampleError`: missing_image, truncated_image (any file that can't be decoded whole), image_too_large; and `ShardError`, naming
    the sample, where a shard is not what its index says: that is no matter of one sample.
    """
    found = resolve_image(path)
    if found is None:
        raise SampleError(sample_id, "missing_image", f"no image file {path} (nor one with another image extension)", str(path))
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a process-wide switch of Pillow that other libraries turn on
    try:
        with Image.open(io.BytesIO(found.read_bytes())) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            return _on_white(ImageOps.exif_transpose(image))
    except ShardError as error:
        raise ShardError(f"sample {sample_id or '?'}: {error}") from error
    except Image.DecompressionBombError as error:
        told = f"{found}: {error}; the limit is {MAX_PIXELS} pixels, scale it down"
        raise SampleError(sample_id, "image_too_large", told, str(path)) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        why = "no picture of a known kind" if isinstance(error, UnidentifiedImageError) else error  # Pillow's text has a memory address
        raise SampleError(sample_id, "truncated_image", f"{found} can't be decoded ({why}); fetch it again", str(path)) from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


def mean_colour(image_mean: tuple[float, ...] | list[float]) -> tuple[int, ...]:
    """The image processor's mean as an RGB colour, rounded down as LLaVA does: after normalisation the border is (nearly) 0."""
    return tuple(int(x * 255) for x in image_mean)


def expand_to_square(image: Image.Image, background_rgb: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side (LLaVA-1.5, `image_aspect_ratio: pad`, `mm_utils.expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_rgb)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def shrunk(image: str | Path | Image.Image, side: int, form: str) -> tuple[bytes, tuple[int, int]]:
    """A picture scaled down to at most `side` x `side` pixels, encoded (`JPEG` or `WEBP`), and its size. Raises SampleError."""
    image = load_image(image) if isinstance(image, str | Path) else image.convert("RGB")
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, form, quality=80)
    return stream.getvalue(), image.size
