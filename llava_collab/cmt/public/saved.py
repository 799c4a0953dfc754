"""Rows of a folder saved by `datasets.save_to_disk`; pictures that lie inside are unpacked once, byte for byte, under their sha256."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from llava_collab.cmt.public.entries import Part, SourceError
from llava_collab.files import write_bytes


def saved_rows(part: Part) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows of all splits, and whether they are held (any split but train). A picture that lies inside is {"bytes", "path"}.

    Raises SourceError for a folder that is no saved dataset or lacks a column, and without the library.
    """
    try:
        import datasets as library  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SourceError("reading saved datasets needs datasets: pip install 'llava_collab[public]'") from error
    folder, columns = part.paths[0], part.source.columns
    try:
        loaded = library.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise SourceError(f"{folder}: not saved by datasets.save_to_disk ({error})") from error
    splits = dict(loaded) if isinstance(loaded, library.DatasetDict) else {"": loaded}
    for name, table in sorted(splits.items()):
        if missing := sorted(set(columns.values()) - set(table.column_names)):
            raise SourceError(f"{folder}: no column {missing}; there are {table.column_names}. Name them in sources.yaml")
        if isinstance(table.features[columns["image"]], library.Image):
            table = table.cast_column(columns["image"], library.Image(decode=False))
        held = part.held or name not in ("", "train")
        for row in table.select_columns(sorted(set(columns.values()))):
            yield dict(row), held


def unpack(part: Part, picture: dict[str, Any]) -> str:
    """Write a picture's own bytes under their digest, and give the path below the built folder.

    Raises SourceError for a picture of which only the path was saved.
    """
    data = picture["bytes"]
    if data is None:
        raise SourceError(f"picture {picture['path']!r} was not saved inside; give the column of paths as text instead")
    try:
        suffix = (Image.open(io.BytesIO(data)).format or "bin").lower()
    except (OSError, Image.DecompressionBombError):
        suffix = "bin"  # hashing it will fail, and count it
    image = f"unpacked/{part.source.name}/{hashlib.sha256(data).hexdigest()}.{suffix}"
    if not (part.place.out / image).is_file():
        write_bytes(part.place.out / image, data, durable=False)
    return image
