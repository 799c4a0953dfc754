"""Reading the assets of CMT-open: a miniature of every package is written on the spot (also used by the other CMT tests)."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_collab.cmt import catalogue
from llava_collab.cmt.elements import ELEMENTS
from llava_collab.cmt.gcompris import gcompris_photos, read_rcc
from llava_collab.cmt.photos import first_words, key_words
from llava_collab.cmt.sources import FONT_FILES, colour_shares, read_world

COUNTRIES = [f"{start}{end}" for start in ("Al", "Bo", "Ca", "Du", "Er", "Fi", "Ga", "Ho") for end in ("ba", "nia", "dor")]
REGIONS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
QUADRANTS = ((200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10))


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def rcc(files: dict[str, bytes], flag: int = 1) -> bytes:
    """A Qt resource file (version 1) with one folder per path component; `flag` 1 packs with zlib, 0 not at all."""
    tree: dict = {}
    for path, data in files.items():
        node = tree
        *folders, leaf = path.strip("/").split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = data
    nodes: list[tuple[str, object]] = [("", tree)]
    for _, node in nodes:  # grows while it is read: children of a folder come out side by side
        if isinstance(node, dict):
            nodes += sorted(node.items())
    names, data, entries, next_child = b"", b"", b"", 1
    for name, node in nodes:
        head = struct.pack(">I", len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(node, dict):
            entries += head + struct.pack(">HII", 2, len(node), next_child)
            next_child += len(node)
        else:
            packed = struct.pack(">I", len(node)) + zlib.compress(node) if flag else node
            entries += head + struct.pack(">HHHI", flag, 0, 0, len(data))
            data += struct.pack(">I", len(packed)) + packed
    header = b"qres" + struct.pack(">4I", 1, 20 + len(data) + len(names), 20, 20 + len(data))
    return header + data + names + entries


def kgm(divisions: list[tuple[str, tuple[int, int, int], str]], picture_name: str) -> str:
    rows = [
        f"<division><name>{name}</name>{extra}<color><red>{r}</red><green>{g}</green><blue>{b}</blue></color></division>"
        for name, (r, g, b), extra in divisions
    ]
    return f"<map><mapFile>{picture_name}</mapFile><name>M</name>{''.join(rows)}</map>"


def make_assets(root: Path) -> Callable[[str], Path]:
    """Write all packages below `root`; returns what `llava_collab.assets.unpacked` would be."""
    for index, stem in enumerate(sorted(catalogue.stamps())):
        colour = (40 + index % 200, 255 - index % 256, index * 7 % 256, 255)
        cutout = Image.new("RGBA", (60, 60))
        cutout.paste(colour, (10, 10 + index % 15, 50, 50))
        write(root / f"tuxpaint-stamps-default/usr/share/tuxpaint/stamps/{stem}.png", b"")
        cutout.save(root / f"tuxpaint-stamps-default/usr/share/tuxpaint/stamps/{stem}.png")
    for index, stem in enumerate(sorted(catalogue.BACKGROUNDS)):
        write(
            root / f"tuxpaint-data/usr/share/tuxpaint/templates/{stem}.jpg",
            picture((index * 6, 90, 255 - index * 6), (80, 60), kind="JPEG"),
        )
    write(root / "tuxpaint-data/usr/share/tuxpaint/templates/not_in_the_catalogue.jpg", picture((1, 2, 3), kind="JPEG"))
    geography = root / "kgeography-data/usr/share/kgeography"
    flags = [(name, (index, 1, 1), f"<flag>{name}.png</flag>") for index, name in enumerate(COUNTRIES)]
    write(geography / "world.kgm", kgm(flags, "world.png"))
    write(geography / "world.png", picture((255, 255, 255)))
    for index, name in enumerate(COUNTRIES):
        write(geography / f"flags/{name}.png", picture((index * 10, 255 - index * 10, 99), (60, 40)))
    for number in range(12):
        image = Image.new("RGB", (100 + number, 80), "white")
        for index, colour in enumerate(QUADRANTS):
            image.paste(colour, (50 * (index % 2) + 4, 40 * (index // 2) + 4, 50 * (index % 2) + 44 - 9 * index, 40 * (index // 2) + 36))
        write(geography / f"land{number}.png", b"")
        image.save(geography / f"land{number}.png")
        sea = [("Sea", (255, 255, 255), "<ignore>yes</ignore>")]
        write(geography / f"land{number}.kgm", kgm(sea + [(f"R{i}", c, "") for i, c in enumerate(QUADRANTS)], f"land{number}.png"))
    rows = [
        {"name": {"common": name}, "independent": True, "capital": [f"{name[:3]}ville"], "region": REGIONS[index % 5]}
        for index, name in enumerate(COUNTRIES)
    ]
    write(root / "world-countries/countries.json", json.dumps(rows))
    tools = "".join(
        f"<item><picture>{i}.png</picture><name>Tool {i}</name><desc>The tool number {i} measures water. It is used often.</desc></item>"
        for i in range(16)
    )
    write(root / "kalzium-data/usr/share/kalzium/data/tools.xml", f"<tools>{tools}</tools>")
    for i in range(16):
        write(root / f"kalzium-data/usr/share/kalzium/data/toolpics/{i}.png", picture((i * 15, 20, 200), (90, 120)))
    board = '{ "title": qsTr("Cow"), "text": qsTr("A cow says moo. It eats grass."), "image2": "qrc:/g/resource/animals/cow.webp" }'
    files = {"/g/resource/board/board1.qml": board.encode(), "/g/resource/animals/cow.webp": picture((90, 60, 30), kind="WEBP")}
    write(root / "gcompris-qt-data/usr/share/gcompris-qt/rcc/explore_farm_animals.rcc", rcc(files))
    vega = root / "vega-datasets"
    write(vega / "package.json", "{}")
    write(vega / "data/wheat.json", json.dumps([{"year": 1600 + i, "wheat": 20 + 7 * i} for i in range(9)]))
    write(vega / "data/obesity.json", json.dumps([{"id": i, "rate": 0.1 + 0.03 * i, "state": f"S{i}"} for i in range(9)]))
    import matplotlib

    for package, names in FONT_FILES.items():
        for name in names:
            write(root / package / name, b"")
            shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", root / package / name)
    return lambda package: root / package


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


def test_world_holds_every_source_and_hashes_it_without_machine_paths(unpacked):
    world = read_world(unpacked)
    assert len(world.things) == len({name for _, name in catalogue.stamps().values()})
    assert len(world.backgrounds) == len(catalogue.BACKGROUNDS), "a photograph outside of the catalogue must not be used"
    assert [country.name for country in world.countries] == sorted(COUNTRIES)
    assert len(world.maps) == 12 and all(len(region_map.regions) == 4 for region_map in world.maps)
    assert {photo.key.split("/")[0] for photo in world.photos} == {"kalzium", "gcompris"}
    assert {table.family for table in world.tables} == {"wheat", "obesity"}
    assert not any(str(unpacked("tuxpaint-data").parent) in name for name in world.files)
    assert all(len(digest) == 64 for digest in world.files.values())


def test_missing_source_is_named(unpacked, tmp_path):
    with pytest.raises(ValueError, match="things"):
        read_world(lambda package: tmp_path if package == "tuxpaint-stamps-default" else unpacked(package))


@pytest.mark.parametrize("flag", [0, 1])
def test_rcc_reader_returns_what_was_packed(tmp_path, flag):
    files = {"/a/b/one.txt": b"first" * 50, "/a/two.txt": b"second", "/c/ü.bin": bytes(range(256))}
    write(tmp_path / "x.rcc", rcc(files, flag))
    assert read_rcc(tmp_path / "x.rcc") == files


def test_rcc_reader_unpacks_zstandard_and_refuses_other_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(b"text" * 100)
    blob = rcc({"/a.txt": packed}, flag=0).replace(struct.pack(">HHHI", 0, 0, 0, 0), struct.pack(">HHHI", 4, 0, 0, 0))
    write(tmp_path / "z.rcc", blob)
    assert read_rcc(tmp_path / "z.rcc") == {"/a.txt": b"text" * 100}
    write(tmp_path / "bad.rcc", b"PK\3\4")
    with pytest.raises(ValueError, match="bad.rcc"):
        read_rcc(tmp_path / "bad.rcc")


def test_gcompris_pairs_photo_with_fact(unpacked):
    photos = gcompris_photos(unpacked("gcompris-qt-data") / "usr/share/gcompris-qt/rcc/explore_farm_animals.rcc")
    assert [(photo.key, photo.name, photo.text) for photo in photos] == [
        ("gcompris/animals/cow.webp", "Cow", "A cow says moo. It eats grass.")
    ]


def test_catalogue_names_are_short_and_senses_refer_to_names():
    names = {name for _, name in catalogue.stamps().values()}
    assert all(1 <= len(name.split()) <= 3 and name == name.lower() for name in names)
    assert {catalogue.sense_of(name) for name in names} <= names
    assert catalogue.sense_of("rooster") == catalogue.sense_of("chicken") != catalogue.sense_of("camel")


def test_every_name_has_one_group():
    groups: dict[str, set[str]] = {}
    for group, name in catalogue.stamps().values():
        groups.setdefault(name, set()).add(group)
    assert all(len(found) == 1 for found in groups.values())


def test_elements_are_in_order():
    table = {name: (symbol, number) for symbol, name, number in ELEMENTS}
    assert len(ELEMENTS) == 118 and len({symbol for symbol, _, _ in ELEMENTS}) == 118
    known = {"Hydrogen": ("H", 1), "Iron": ("Fe", 26), "Silver": ("Ag", 47), "Gold": ("Au", 79), "Oganesson": ("Og", 118)}
    assert {name: table[name] for name in known} == known


def test_text_of_a_fact_is_cut_at_sentences():
    assert first_words("One two three. Four five. Six.", limit=5) == "One two three. Four five."
    assert first_words("One two three four five six.", limit=3) == "One two three ..."
    assert key_words("Water Pump", "The water pump moves liquid through narrow pipes.") == (
        "water pump",
        "moves",
        "liquid",
        "narrow",
        "pipes",
    )


def test_colour_shares_are_exact():
    image = Image.new("RGB", (10, 10), (1, 2, 3))
    image.paste((255, 0, 0), (0, 0, 5, 5))
    assert colour_shares(image) == {0x010203: 0.75, 0xFF0000: 0.25}


@pytest.mark.assets
def test_the_catalogue_matches_the_real_packages():
    from llava_collab.assets.store import status
    from llava_collab.cmt.sources import PACKAGES

    states = {row.package.name: row.state for row in status()}
    missing = [name for name in PACKAGES if states.get(name) != "unpacked"]
    if missing:
        pytest.skip(f"not in the cache: {', '.join(missing)}")
    world = read_world()
    assert {thing.name for thing in world.things} == {name for _, name in catalogue.stamps().values()}
    assert sum(len(thing.paths) for thing in world.things) == len(catalogue.stamps())
    assert {background.name for background in world.backgrounds} == set(catalogue.BACKGROUNDS)
    assert len(world.photos) > 100 and len(world.maps) > 100 and len(world.countries) > 150 and len(world.tables) > 150
