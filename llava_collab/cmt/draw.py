"""Drawing helpers: decoded pictures kept per process, backgrounds, cutouts, and text that is made to fit."""

from __future__ import annotations

import random
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageStat

from llava_collab.cmt.items import SIZE
from llava_collab.cmt.sources import Background

Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont

_CUTOUT_SIDE = 200  # no cutout is ever drawn larger
_BACKGROUND_SIDE = 320
_FAINT = 24
LEAST_TEXT = 14  # pixels of the face; smaller print can not be relied on at 224 pixels
_LEAST_CONTRAST = 45  # grey levels between a cutout and what lies behind it


@cache
def cutout(path: str) -> Image.Image:
    """RGBA stamp without its empty margin. Faint specks (alpha < 24) count as empty."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").point([0] * _FAINT + [255] * (256 - _FAINT)).getbbox()
    image = image.crop(box) if box else image
    image.thumbnail((_CUTOUT_SIDE, _CUTOUT_SIDE), Image.Resampling.LANCZOS)
    return image


@cache
def _background(path: str) -> Image.Image:
    """RGB photograph with its shorter side at 320 px, slightly out of focus, so that the cutouts stand out."""
    with Image.open(path) as opened:
        opened.draft("RGB", (2 * _BACKGROUND_SIDE, 2 * _BACKGROUND_SIDE))
        image = opened.convert("RGB")
    scale = _BACKGROUND_SIDE / min(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    return image.filter(ImageFilter.GaussianBlur(1.5))


def background(rng: random.Random, chosen: Background) -> Image.Image:
    """A random square crop of a background, 224 x 224 RGB, with a little change of brightness."""
    image = _background(chosen.path)
    side = rng.uniform(0.7, 1.0) * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    cropped = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(cropped).enhance(rng.uniform(0.75, 1.1))


def paper(rng: random.Random) -> Image.Image:
    """An empty light page of a random tint, 224 x 224: so that no two splits hold the very same drawing."""
    tint = (rng.randint(226, 255), rng.randint(226, 255), rng.randint(226, 255))
    return Image.new("RGB", (SIZE, SIZE), tint)


def paste_visibly(image: Image.Image, cutout: Image.Image, at: tuple[int, int]) -> None:
    """Paste a cutout in place; on a ground of nearly its own brightness it gets a soft, light or dark rim (a black bull at dusk)."""
    alpha = cutout.getchannel("A")
    box = (*at, at[0] + cutout.width, at[1] + cutout.height)
    tone = ImageStat.Stat(cutout.convert("L"), alpha).mean[0]
    ground = ImageStat.Stat(image.crop(box).convert("L"), alpha).mean[0]
    if abs(tone - ground) < _LEAST_CONTRAST:
        margin = 8
        rim = Image.new("L", (cutout.width + 2 * margin, cutout.height + 2 * margin))
        rim.paste(alpha, (margin, margin))
        rim = rim.filter(ImageFilter.GaussianBlur(4)).point([min(215, 3 * level) for level in range(256)])
        image.paste("white" if tone < 128 else "black", (at[0] - margin, at[1] - margin), rim)
    image.paste(cutout, at, cutout)


def font(path: str, size: int) -> Font:
    """A face at a size in pixels, kept per process. Raises OSError, naming the file, if FreeType can not read it."""
    return _font(path, size)


@lru_cache(maxsize=512)
def _font(path: str, size: int) -> Font:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise OSError(f"can not read the font {Path(path).name}: install Pillow from its own wheel, which reads WOFF2") from error


def fitting_font(path: str, text: str, width: float, height: float, largest: int = 72) -> Font:
    """The largest size at which `text` stays inside width x height pixels (not below LEAST_TEXT)."""
    low, high = LEAST_TEXT, largest
    while low < high:
        middle = (low + high + 1) // 2
        left, top, right, bottom = font(path, middle).getbbox(text)
        if right - left <= width and bottom - top <= height:
            low = middle
        else:
            high = middle - 1
    return font(path, low)


def centred_text(draw: ImageDraw.ImageDraw, box: Box, text: str, face: str, colour: str, largest: int = 72) -> int:
    """Draw `text` in the middle of `box`, as large as fits; a text of several words takes two lines where that makes it larger.

    Returns the size of the face in pixels.
    """
    x0, y0, x1, y1 = box
    words = text.split()
    best = (fitting_font(face, text, x1 - x0, y1 - y0, largest), text)
    for cut in range(1, len(words)):
        lines = "\n".join((" ".join(words[:cut]), " ".join(words[cut:])))
        longest = max(lines.split("\n"), key=len)
        chosen = fitting_font(face, longest, x1 - x0, (y1 - y0) / 2.4, largest)
        if chosen.size > best[0].size:
            best = (chosen, lines)
    draw.multiline_text(((x0 + x1) / 2, (y0 + y1) / 2), best[1], font=best[0], fill=colour, anchor="mm", align="center")
    return round(best[0].size)
