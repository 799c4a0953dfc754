"""What a reader of a public set is given (`Part`) and gives (`Entry`), and how it says that an entry or a whole file is bad."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llava_collab.data.images import resolve_image

if TYPE_CHECKING:
    from llava_collab.cmt.public.table import Source

EXAMPLES = 3
IMAGES = "images"  # in the built folder, a link to the folder of the sources
_COCO_2014 = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12})")
_WRONG = (KeyError, TypeError, IndexError, AttributeError, ValueError)  # what an entry of another form raises
_VISUAL_GENOME = {"gqa", "vg", "VG_100K", "VG_100K_2", "visual_genome"}

# Folders that share one numbering: a number is one picture in all of them.
_ONE_NUMBERING = {f"{IMAGES}/coco/{split}{year}": "coco" for split in ("train", "val") for year in (2014, 2017)} | {
    f"{IMAGES}/vist/images/{split}": "vist" for split in ("train", "val", "test")
}


class SourceError(ValueError):
    """A source that can't be read as published; the message names file, entry and cure."""


class Skip(Exception):
    """One entry is left out, for a reason that is counted; published sets hold such entries."""


@dataclass(frozen=True)
class Entry:
    """One instruction group. `id` is unique within the source; `images` are paths below the built folder.

    `turns` are (role, text) with the roles of LLaVA's files, `together` are further keys of things that must not be split (an album).
    """

    id: str
    family: str
    category: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    held: bool
    together: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def check_unicode(self) -> None:
        """Raises Skip for half a surrogate pair, which JSON can spell (a text cut inside an emoji) and no UTF-8 file can hold."""
        said = [self.id, self.images, self.turns, self.answers, self.extra]
        try:
            json.dumps(said, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Skip("not_utf8") from error

    def row(self, source: str, split: str) -> dict[str, Any]:
        """The line of CMT-public, in the form of CMT-open."""
        return {
            "id": f"{source}/{self.id}",
            "image": list(self.images),
            "conversations": [{"from": role, "value": text} for role, text in self.turns],
            "category": self.category,
            "family": self.family,
            "answers": list(self.answers),
            "split": split,
            **self.extra,
        }


class Place:
    """Finds pictures below the built folder, and remembers what it found."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._exists: dict[str, bool] = {}
        self._first: dict[tuple[str, ...], str] = {}  # millions of entries share far fewer pictures

    def exists(self, image: str) -> bool:
        """Whether there is such a file, or one of the same name with another image extension."""
        if image not in self._exists:
            self._exists[image] = resolve_image(self.out / image) is not None
        return self._exists[image]

    def first(self, *candidates: str) -> str:
        """Of paths below the sources folder, the first where a picture is, else the first of all, as a path below the built folder.

        Raises SourceError for a path that leaves the sources folder.
        """
        if candidates not in self._first:
            paths = [PurePosixPath(candidate) for candidate in candidates]
            for path in paths:
                if path.is_absolute() or ".." in path.parts:
                    raise SourceError(f"picture {str(path)!r} is not below the sources folder; write its path relative to that folder")
            found = [f"{IMAGES}/{path}" for path in paths]
            self._first[candidates] = next((image for image in found if self.exists(image)), found[0])
        return self._first[candidates]

    def coco(self, image_id: int) -> str:
        """A picture of MS COCO by its number: the same one has two file names, of 2014 and of 2017."""
        number = f"{int(image_id):012d}.jpg"
        return self.first(
            f"coco/train2017/{number}",
            f"coco/val2017/{number}",
            f"coco/train2014/COCO_train2014_{number}",
            f"coco/val2014/COCO_val2014_{number}",
        )


@dataclass
class Part:
    """One file (with its companions) of a source, and where to count what is left out of it.

    `held`: published as validation or test data, so test takes from here first, and train never.
    """

    source: Source
    paths: tuple[Path, ...]
    held: bool
    place: Place
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kept: int = 0

    def skip(self, reason: str, where: str) -> None:
        """Count an entry that is left out, and name the first few."""
        self.skipped[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(where)

    def each(self, path: Path, entries: Iterator[Any], make: Callable[[Any], Entry]) -> Iterator[Entry]:
        """`make` of every entry of a file. Raises SourceError at the first one that hasn't the published form."""
        number = 0
        for number, entry in enumerate(entries, start=1):
            where = f"{path.name}, entry {number}"
            try:
                made = make(entry)
                made.check_unicode()
            except Skip as skip:
                self.skip(str(skip), where)
            except _WRONG as error:
                raise self._refused(path, number, error) from error
            else:
                yield made
        if not number:
            raise SourceError(f"{path}: no entries found; {self.source.cure()}")

    def collect(self, path: Path, prefix: str, take: Callable[[Any], object]) -> None:
        """`take` every entry (see `stream`) of a file that is joined with another, or whose entries are grouped.

        Raises SourceError at the first one that hasn't the published form.
        """
        for number, entry in enumerate(stream(path, prefix), start=1):
            try:
                take(entry)
            except _WRONG as error:
                raise self._refused(path, number, error) from error

    def _refused(self, path: Path, number: int, error: Exception) -> SourceError:
        return SourceError(f"{path}, entry {number}: {_said(error)}; {self.source.cure()}")


def _said(error: Exception) -> str:
    return f"lacks the key {error}" if isinstance(error, KeyError) else str(error)


def stream(path: Path, prefix: str) -> Iterator[Any]:
    """Entries of a big JSON file in constant memory: "annotations.item" for a list under a key, "" for (key, value) of an object.

    Raises SourceError for text that is no JSON or is cut off, and without the library.
    """
    try:
        import ijson  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SourceError("reading these annotation files needs ijson: pip install 'llava_collab[public]'") from error
    number = 0
    with path.open("rb") as file:
        try:
            for entry in ijson.items(file, prefix, use_float=True) if prefix else ijson.kvitems(file, "", use_float=True):
                number += 1
                yield entry
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise SourceError(
                f"{path} is cut off or no JSON behind entry {number} ({str(error).splitlines()[0]}); fetch it again"
            ) from error


def texts(values: Any, reason: str = "empty_answer") -> tuple[str, ...]:
    """The non-empty ones of a list of texts, spacing tidied. Raises TypeError for anything else, Skip (`reason`) where none is left."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of texts, found {values!r:.80}")
    kept = tuple(tidy for value in values if (tidy := " ".join(value.split())))
    if not kept:
        raise Skip(reason)
    return kept


def picture_key(image: str, coco_of: Mapping[str, str]) -> str:
    """What makes two paths the same picture: the stem where it is an id by itself (8 characters or more), else whole folder and stem.

    The folders of COCO count as one, and so do those of VIST and of Visual Genome. COCO's prefix of 2014 goes, and a Visual Genome
    number becomes the COCO number that `coco_of` knows for it. Two pictures that share a long stem by chance are taken for one, which
    costs at most a test item.
    """
    path = PurePosixPath(image)
    match = _COCO_2014.fullmatch(path.stem)
    stem = match[1] if match else path.stem
    if len(stem) >= 8:
        return stem
    if _VISUAL_GENOME.intersection(path.parts[:-1]):
        return coco_of.get(stem, f"vg/{stem}")
    folder = str(path.parent)
    return f"{_ONE_NUMBERING.get(folder, folder)}/{stem}"
