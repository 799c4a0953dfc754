"""Reads the real assets once into a `World` of names, facts and file paths; all later rendering works from that alone.

Pictures are kept as paths (or as bytes, for those packed inside GCompris), so a World is small and travels to worker processes.
Everything is sorted: a World does not depend on the order in which a file system lists its files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from llava_collab.cmt import catalogue
from llava_collab.cmt.gcompris import gcompris_photos
from llava_collab.cmt.photos import Photo, first_words
from llava_collab.cmt.tables import Table, vega_tables

Unpacked = Callable[[str], Path]

# Package -> licence, as the package itself states it; the pixels made from them inherit these.
PACKAGES = {
    "tuxpaint-stamps-default": "GPL-2.0",
    "tuxpaint-data": "GPL-2.0-or-later",
    "mate-backgrounds": "GPL-2.0-or-later, CC-BY-SA-4.0",
    "lomiri-wallpapers-16.04": "CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0",
    "gcompris-qt-data": "GPL-3.0-or-later; photographs CC-BY-SA or public domain",
    "kalzium-data": "GPL-2.0-or-later",
    "kgeography-data": "GPL-2.0-or-later",
    "world-countries": "ODbL-1.0",
    "vega-datasets": "BSD-3-Clause",
    "@fontsource/roboto": "OFL-1.1",
    "@fontsource/caveat": "OFL-1.1",
    "@fontsource/bangers": "OFL-1.1",
}
FONT_FILES = {
    "@fontsource/roboto": ("files/roboto-latin-400-normal.woff2", "files/roboto-latin-700-normal.woff2"),
    "@fontsource/caveat": ("files/caveat-latin-700-normal.woff2",),
    "@fontsource/bangers": ("files/bangers-latin-400-normal.woff2",),
}


@dataclass(frozen=True)
class Thing:
    """A name of the catalogue with the cutouts that show it."""

    name: str
    group: str
    sense: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Background:
    """A background photograph; `place` is the word a story may use for it, or empty."""

    name: str
    path: str
    place: str


@dataclass(frozen=True)
class Country:
    """A country of world-countries that has a flag picture in kgeography."""

    name: str
    capital: str
    region: str
    flag: str


@dataclass(frozen=True)
class RegionMap:
    """A kgeography map; a region is the set of pixels of one colour code 0xRRGGBB. `land` holds the colours of the tiny regions too."""

    name: str
    path: str
    regions: tuple[int, ...]
    land: tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Everything that can be drawn, before any split is made."""

    things: tuple[Thing, ...]
    backgrounds: tuple[Background, ...]
    countries: tuple[Country, ...]
    maps: tuple[RegionMap, ...]
    photos: tuple[Photo, ...]
    tables: tuple[Table, ...]
    fonts: tuple[str, ...]  # plain, legible faces first
    files: dict[str, str] = field(default_factory=dict)  # "package:path" -> SHA-256 of every file used

    @property
    def packages(self) -> dict[str, str]:
        """One SHA-256 a package, over the names and hashes of its files that are used."""
        lines: dict[str, list[str]] = {}
        for name, sha in sorted(self.files.items()):
            lines.setdefault(name.split(":", 1)[0], []).append(f"{name} {sha}\n")
        return {package: hashlib.sha256("".join(found).encode()).hexdigest() for package, found in lines.items()}


class _Ledger:
    """Hashes each file that is used, under a name without the machine's own folders."""

    def __init__(self, unpacked: Unpacked) -> None:
        self.unpacked = unpacked
        self.files: dict[str, str] = {}

    def use(self, package: str, relative: str | Path) -> Path:
        path = self.unpacked(package) / relative
        self.files[f"{package}:{Path(relative).as_posix()}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return path


def read_world(unpacked: Unpacked | None = None) -> World:
    """Read all sources; `unpacked(package)` gives the folder of an unpacked package (default: the asset cache, fetching if need be).

    Raises ValueError, naming the package, if a source holds too little to build from.
    """
    if unpacked is None:
        from llava_collab.assets import unpacked as cached

        unpacked = cached
    ledger = _Ledger(unpacked)
    world = World(
        things=_things(ledger),
        backgrounds=_backgrounds(ledger),
        countries=_countries(ledger),
        maps=_maps(ledger),
        photos=tuple(sorted(_kalzium(ledger) + _gcompris(ledger), key=lambda photo: photo.key)),
        tables=vega_tables(ledger.use("vega-datasets", "package.json").parent, lambda name: ledger.use("vega-datasets", name)),
        fonts=_fonts(ledger),
        files=ledger.files,
    )
    for name, least in (("things", 8), ("backgrounds", 2), ("countries", 2), ("maps", 1), ("photos", 2), ("tables", 1), ("fonts", 1)):
        if len(getattr(world, name)) < least:
            raise ValueError(f"CMT-open needs at least {least} {name}, found {len(getattr(world, name))}: fetch the assets again")
    return world


def _things(ledger: _Ledger) -> tuple[Thing, ...]:
    root = Path("usr/share/tuxpaint/stamps")
    base = ledger.unpacked("tuxpaint-stamps-default")
    paths: dict[tuple[str, str], list[str]] = {}
    for stem, (group, name) in sorted(catalogue.stamps().items()):
        relative = root / f"{stem}.png"
        if (base / relative).is_file():
            paths.setdefault((name, group), []).append(str(ledger.use("tuxpaint-stamps-default", relative)))
    return tuple(Thing(name, group, catalogue.sense_of(name), tuple(found)) for (name, group), found in sorted(paths.items()))


def _backgrounds(ledger: _Ledger) -> tuple[Background, ...]:
    folders = (
        ("tuxpaint-data", "usr/share/tuxpaint/templates"),
        ("mate-backgrounds", "usr/share/backgrounds/mate/nature"),
        ("lomiri-wallpapers-16.04", "usr/share/backgrounds"),
    )
    found = []
    for package, folder in folders:
        for path in sorted((ledger.unpacked(package) / folder).glob("*.jpg")):
            if path.stem in catalogue.BACKGROUNDS:
                used = ledger.use(package, f"{folder}/{path.name}")
                found.append(Background(path.stem, str(used), catalogue.BACKGROUNDS[path.stem]))
    return tuple(found)


def _divisions(path: Path) -> list[ET.Element]:
    """The regions of a .kgm file; those marked `ignore` are sea, frontiers or click-only names."""
    divisions = ET.parse(path).getroot().findall("division")
    return [d for d in divisions if d.findtext("ignore") not in ("yes", "allowClickMode")]


def _countries(ledger: _Ledger) -> tuple[Country, ...]:
    folder = "usr/share/kgeography"
    base = ledger.unpacked("kgeography-data")
    table = json.loads(ledger.use("world-countries", "countries.json").read_text(encoding="utf8"))
    facts = {row["name"]["common"]: row for row in table if row["independent"] and row["capital"]}
    found: dict[str, Country] = {}
    for stem in ("africa", "asia", "europe", "ncamerica", "southamerica", "oceania", "world"):
        if not (base / folder / f"{stem}.kgm").is_file():
            continue
        for division in _divisions(ledger.use("kgeography-data", f"{folder}/{stem}.kgm")):
            name, flag = division.findtext("name") or "", division.findtext("flag")
            row = facts.get(name)
            if row is None or not flag or not (base / folder / "flags" / flag).is_file():
                continue
            capital = row["capital"][0]
            if name.isascii() and capital.isascii() and len(name) <= 16:
                path = ledger.use("kgeography-data", f"{folder}/flags/{flag}")
                found[name] = Country(name, capital, row["region"], str(path))
    return tuple(found[name] for name in sorted(found))


def colour_codes(image: Image.Image) -> np.ndarray:
    """[height, width] int32 of 0xRRGGBB: one number a pixel, so that a region is found with one comparison."""
    pixels_HW3 = np.asarray(image.convert("RGB")).astype(np.int32)
    return pixels_HW3[..., 0] << 16 | pixels_HW3[..., 1] << 8 | pixels_HW3[..., 2]


def colour_shares(image: Image.Image) -> dict[int, float]:
    """Share of the picture's pixels by colour code."""
    codes, counts = np.unique(colour_codes(image), return_counts=True)
    return {int(code): int(count) / image.width / image.height for code, count in zip(codes, counts, strict=True)}


def _maps(ledger: _Ledger) -> tuple[RegionMap, ...]:
    folder = "usr/share/kgeography"
    found = []
    for kgm in sorted((ledger.unpacked("kgeography-data") / folder).glob("*.kgm")):
        root = ET.parse(kgm).getroot()
        picture = kgm.parent / (root.findtext("mapFile") or "")
        if not picture.is_file():
            continue
        with Image.open(picture) as opened:
            share = colour_shares(opened)
        land = []
        for division in _divisions(kgm):
            red, green, blue = (int(division.findtext(f"color/{key}") or 0) for key in ("red", "green", "blue"))
            land.append(red << 16 | green << 8 | blue)
        regions = [code for code in land if share.get(code, 0.0) > 0.006]  # about 300 of 224 x 224 pixels: large enough to be seen
        if len(regions) >= 4:
            ledger.use("kgeography-data", f"{folder}/{kgm.name}")
            found.append(RegionMap(kgm.stem, str(ledger.use("kgeography-data", f"{folder}/{picture.name}")), tuple(regions), tuple(land)))
    return tuple(found)


def _kalzium(ledger: _Ledger) -> list[Photo]:
    folder = Path("usr/share/kalzium/data")
    path = ledger.use("kalzium-data", folder / "tools.xml")
    photos = []
    for item in ET.parse(path).getroot().iter("item"):
        picture, name, text = ((item.findtext(key) or "").strip() for key in ("picture", "name", "desc"))
        relative = folder / "toolpics" / picture
        if picture and text and (ledger.unpacked("kalzium-data") / relative).is_file():
            data = ledger.use("kalzium-data", relative).read_bytes()
            photos.append(Photo(f"kalzium/{picture}", name, first_words(text), data))
    return photos


def _gcompris(ledger: _Ledger) -> list[Photo]:
    folder = "usr/share/gcompris-qt/rcc"
    photos = []
    for stem in ("explore_monuments", "explore_world_animals", "explore_farm_animals"):
        if (ledger.unpacked("gcompris-qt-data") / folder / f"{stem}.rcc").is_file():
            photos += gcompris_photos(ledger.use("gcompris-qt-data", f"{folder}/{stem}.rcc"))
    return photos


def _fonts(ledger: _Ledger) -> tuple[str, ...]:
    """Faces from packages of a pinned version only: a font of the machine would change the pixels from one machine to the next."""
    found = [str(ledger.use(package, name)) for package, names in FONT_FILES.items() for name in names]
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("matplotlib ships the DejaVu fonts that CMT-open draws with: pip install matplotlib")
    dejavu = Path(spec.origin).parent / "mpl-data/fonts/ttf"
    plain = [str(dejavu / f"DejaVu{face}.ttf") for face in ("Sans", "Sans-Bold", "Serif-Bold")]
    ledger.files |= {f"matplotlib:{Path(path).name}": hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in plain}
    return (*found[:2], *plain, *found[2:])
