"""Reads the Qt resource files (.rcc) in which GCompris packs its photographs, and the facts beside them in QML.

Own reader of the documented binary layout: a header with four offsets, a tree of fixed-size nodes, a table of UTF-16 names and a
table of length-prefixed data, each entry stored plainly or compressed with zlib (flag 1) or zstandard (flag 4).
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

from llava_collab.cmt.photos import Photo, first_words

_DIRECTORY, _ZLIB, _ZSTD = 2, 1, 4
_MAX_BYTES = 64 * 2**20  # no picture of the package comes near it; a wrong length must not fill the memory


def read_rcc(path: Path) -> dict[str, bytes]:
    """All files of a .rcc archive: {path inside: bytes}. Raises ValueError for another file format."""
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file: fetch gcompris-qt-data again")
    version, tree, data, names = struct.unpack(">4I", blob[4:20])
    node_size = 14 if version < 2 else 22
    found: dict[str, bytes] = {}
    stack = [(0, "")]
    while stack:
        index, prefix = stack.pop()
        at = tree + index * node_size
        name_offset, flags = struct.unpack(">IH", blob[at : at + 6])
        inside = f"{prefix}/{_name(blob, names + name_offset)}" if index else prefix
        if flags & _DIRECTORY:
            count, first = struct.unpack(">II", blob[at + 6 : at + 14])
            stack += [(child, inside) for child in range(first, first + count)]
        else:
            start = data + struct.unpack(">I", blob[at + 10 : at + 14])[0]
            (length,) = struct.unpack(">I", blob[start : start + 4])
            found[inside] = _expand(blob[start + 4 : start + 4 + length], flags)
    return found


def _name(blob: bytes, at: int) -> str:
    (length,) = struct.unpack(">H", blob[at : at + 2])
    return blob[at + 6 : at + 6 + 2 * length].decode("utf-16-be")


def _expand(data: bytes, flags: int) -> bytes:
    if flags & _ZLIB:
        return zlib.decompress(data[4:])
    if flags & _ZSTD:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("GCompris files are packed with zstandard: pip install 'llava_collab[assets]'") from error
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_BYTES)
    return data


_ENTRY = re.compile(r'"title":\s*qsTr\("([^"]+)"\),\s*"text":\s*qsTr\("([^"]+)"\).*?"image2":\s*"qrc:([^"]+)"', re.DOTALL)


def gcompris_photos(path: Path) -> list[Photo]:
    """The photographs of one activity with their title and the start of their text, sorted by path."""
    files = read_rcc(path)
    photos: dict[str, Photo] = {}
    for name in sorted(files):
        if not re.search(r"/board/board\d+\.qml$", name):
            continue
        for title, text, picture in _ENTRY.findall(files[name].decode("utf8")):
            if picture in files and picture.endswith((".webp", ".jpg", ".png")):
                photos[picture] = Photo(f"gcompris/{picture.rsplit('resource/', 1)[-1]}", title, first_words(text), files[picture])
    return [photos[key] for key in sorted(photos)]
