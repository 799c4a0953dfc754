"""Assembles CMT-public in three passes: read every entry's id and pictures, choose, read again and write the chosen rows.

In memory are: of every entry its rank and the numbers of its pictures; of every picture its paths and hash; of the file that is read
what its entries are joined or grouped by (all annotations of VQA v2, captions of COCO, stories of VIST, OCR tokens of TextVQA); and
in the last pass the rows of the chosen entries. What takes long, the hashing of pictures, has a cache, so a build that was stopped
goes on there. Rows depend on the files, the seed and the pictures alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public.card import card, manifest_of
from llava_collab.cmt.public.choose import Candidate, Choice, Pictures, choose, rank_of
from llava_collab.cmt.public.duplicates import NearIndex, hash_pictures
from llava_collab.cmt.public.entries import IMAGES, Entry, Part, Place, SourceError, picture_key
from llava_collab.cmt.public.readers import READERS
from llava_collab.cmt.public.table import LLAVA_MIX, TABLE, VISUAL_GENOME, Source, extra_sources
from llava_collab.data.samples import iter_records
from llava_collab.files import sha256, write_chunks, write_json, write_text

TRAIN_ITEMS = 505_405  # HyperLLaVA on its CMT: 505,405 instruction groups for training, 1,149 for test
TEST_ITEMS = 1_149


@dataclass
class Reading:
    """What the first pass finds. A key says which picture (or album) it is and has a number; several files may be the same picture."""

    coco_of: Mapping[str, str]
    numbers: dict[str, int] = field(default_factory=dict)
    files: dict[int, set[str]] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)

    def picture(self, image: str) -> int:
        if image not in self.pictures:
            number = self.numbers.setdefault(picture_key(image, self.coco_of), len(self.numbers))
            self.files.setdefault(number, set()).add(image)
            self.pictures[image] = number
        return self.pictures[image]

    def add(self, part: Part, entry: Entry, seed: int) -> None:
        """Keep an entry, or count why not. Raises SourceError for a published id that comes twice."""
        part.source.check_category(entry.category)
        rank = rank_of(seed, part.source.name, entry.id)
        if rank in self.candidates:
            if part.source.own_ids:
                raise SourceError(f"{part.paths[0]}: id {entry.id} comes twice in {part.source.name}; {part.source.cure()}")
            part.skip("duplicate", entry.id)
            if entry.held:  # once published for evaluation is enough
                self.candidates[rank] = replace(self.candidates[rank], held=True)
        elif missing := [image for image in entry.images if not part.place.exists(image)]:
            part.skip("missing_image", missing[0])
        else:
            keys = [self.picture(image) for image in entry.images]
            keys += [self.numbers.setdefault(key, len(self.numbers)) for key in entry.together]
            self.candidates[rank] = Candidate(rank, entry.category, entry.family, entry.held, tuple(sorted(set(keys))))


def build_public(
    sources: Path,
    out: Path,
    *,
    train: int = TRAIN_ITEMS,
    test: int = TEST_ITEMS,
    llava: Sequence[Path] = (),
    seed: int = 0,
    workers: int = 2,
) -> dict[str, Any]:
    """Write `out/{train,test}.jsonl`, `manifest.json`, `README.md` and the link `out/images` to `sources`; gives the manifest.

    llava: JSON files of the LLaVA mix. Test has none of their pictures: training on these is no problem, testing on them is.
    Raises SourceError, SampleError or FileNotFoundError that names file, entry and cure.
    """
    if min(train, test) < 0 or workers < 1:
        raise ValueError(f"sizes must not be negative and workers must be positive, got train={train}, test={test}, workers={workers}")
    if not sources.is_dir():
        raise FileNotFoundError(f"{sources} is no folder; --sources has to name the one that holds the public sets")
    known = (*TABLE, *extra_sources(sources))
    _link(sources, out)
    place = Place(out)
    parts = [part for source in known for part in _parts(source, sources, place)]
    if not parts:
        places = "\n".join(f"  {source.files[0].paths[0]}  ({source.where})" for source in known)
        raise SourceError(f"{sources}: holds none of the known sources. They are looked for at\n{places}")
    mix_files = list(llava) or [sources / LLAVA_MIX] * (sources / LLAVA_MIX).is_file()
    reading = _read(parts, seed, _coco_numbers(sources / VISUAL_GENOME))
    mix = {f"{IMAGES}/{image}" for file in mix_files for image in _mix_images(file)}
    on_disk = {image for image in sorted(mix) if place.exists(image)}
    hashes = hash_pictures(out, on_disk.union(*reading.files.values()), workers)
    unreadable = _drop_unreadable(reading, hashes)
    categories = {candidate.category for candidate in reading.candidates.values()}
    scaled = {"train": round(train * len(categories) / len(CATEGORIES)), "test": test}
    choice = choose(list(reading.candidates.values()), _pictures(reading, hashes, mix), **scaled)
    splits = _write(out, [_again(part) for part in parts], choice, seed)
    manifest = manifest_of(
        root=sources,
        known=known,
        parts=parts,
        digests={path: _digest(path) for part in parts for path in part.paths} | {path: sha256(path) for path in mix_files},
        targets={"train": train, "test": test},
        choice=choice,
        splits=splits,
        mix={"files": mix_files, "pictures": len(mix), "on disk": len(on_disk)},
        pictures={"hashed": len(hashes), "unreadable": unreadable},
        seed=seed,
    )
    write_json(out / "manifest.json", manifest)
    write_text(out / "README.md", card(manifest))
    return manifest


def _link(sources: Path, out: Path) -> None:
    """`out/images` -> the sources: rows hold paths below it, so the data can be read from `out` without a copy of any picture."""
    out.mkdir(parents=True, exist_ok=True)
    link = out / IMAGES
    if link.exists() and not link.is_symlink():
        raise SourceError(f"{link} is there and no link; choose another --out")
    link.unlink(missing_ok=True)
    link.symlink_to(sources.resolve(), target_is_directory=True)


def _parts(source: Source, sources: Path, place: Place) -> list[Part]:
    """The files of a source that are there. Raises SourceError where a companion lacks, or a file that sources.yaml names."""
    parts = []
    for files in source.files:
        paths = [sources / path for path in files.paths]
        if paths[0].exists():
            if lacking := [path for path in paths if not path.exists()]:
                raise SourceError(f"{paths[0]} is there but {lacking[0]} is missing; get it from {source.where}")
            optional = [path for name in files.optional if (path := sources / name).exists()]
            parts.append(Part(source, (*paths, *optional), files.held, place))
        elif not source.listed:
            raise SourceError(f"source {source.name}: {paths[0]} is missing; mend its path in sources.yaml or take the source out")
    return parts


def _again(part: Part) -> Part:
    return Part(part.source, part.paths, part.held, part.place)


def _entries(part: Part, doing: str) -> Iterator[Entry]:
    return iter(tqdm(READERS[part.source.reader](part), desc=f"{doing} {part.paths[0].name}", unit="entry"))


def _read(parts: Sequence[Part], seed: int, coco_of: Mapping[str, str]) -> Reading:
    """The first pass. Raises SourceError for a source whose pictures are all missing, which is a wrong place rather than a gap."""
    reading = Reading(coco_of)
    for part in parts:
        before = len(reading.candidates)
        for entry in _entries(part, "reading"):
            reading.add(part, entry, seed)
        part.kept = len(reading.candidates) - before
        if not part.kept and part.skipped["missing_image"]:
            raise SourceError(
                f"{part.paths[0]}: none of its pictures is there, e.g. {part.place.out / part.examples['missing_image'][0]}; "
                f"put them (or a link) below the sources folder at {part.source.pictures}, or take the file away"
            )
    return reading


def _coco_numbers(path: Path) -> dict[str, str]:
    """Visual Genome picture -> its COCO number, for the half of Visual Genome that is COCO (`image_data.json`; {} without the file)."""
    records = iter_records(path) if path.is_file() else ()
    try:
        return {str(record["image_id"]): f"{record['coco_id']:012d}" for record in records if record["coco_id"] is not None}
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path}: lacks {error}; is it Visual Genome's image_data.json?") from error


def _mix_images(path: Path) -> Iterator[str]:
    """Paths of the pictures of a LLaVA mix."""
    for number, record in enumerate(tqdm(iter_records(path), desc=f"reading {path.name}", unit="record"), start=1):
        if not isinstance(record, dict) or "conversations" not in record:
            raise SourceError(f"{path}, record {number}: not a LLaVA record; --llava takes files such as llava_v1_5_mix665k.json")
        image = record.get("image") or []
        yield from [image] if isinstance(image, str) else image


def _drop_unreadable(reading: Reading, hashes: Mapping[str, int | str]) -> dict[str, int]:
    """Take out entries with a picture that can't be decoded; gives their number by reason."""
    bad = {number: str(hashes[file]) for number, files in reading.files.items() for file in sorted(files) if isinstance(hashes[file], str)}
    dropped = {rank: bad[key] for rank, found in reading.candidates.items() for key in found.keys if key in bad}
    for rank in dropped:
        del reading.candidates[rank]
    return dict(sorted(Counter(dropped.values()).items()))


def _pictures(reading: Reading, hashes: Mapping[str, int | str], mix: set[str]) -> Pictures:
    """Hashes by key, and which keys are in the mix or near one of its pictures."""
    by_key = {
        number: [value for file in sorted(files) if isinstance(value := hashes[file], int)] for number, files in reading.files.items()
    }
    keys = {picture_key(image, reading.coco_of) for image in mix}
    in_mix = frozenset(number for key in keys if (number := reading.numbers.get(key)) is not None)
    of_mix = {value for image in mix if isinstance(value := hashes.get(image), int)} | {
        value for key in in_mix for value in by_key.get(key, ())
    }
    index = NearIndex(sorted(of_mix))
    compared = tqdm(by_key.items(), desc="comparing with the mix", unit="picture") if of_mix else ()
    near = frozenset(number for number, values in compared if any(index.near(value) for value in values))
    return Pictures(by_key, in_mix, near)


def _write(out: Path, parts: Sequence[Part], choice: Choice, seed: int) -> dict[str, dict[str, Any]]:
    """The second reading: rows of the chosen entries, in the order of their ranks, so that any first part of a file is a fair sample."""
    (out / "manifest.json").unlink(missing_ok=True)  # it comes back last: what has a manifest is whole
    rows: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "test": {}}
    for part in parts:
        for entry in _entries(part, "writing"):
            rank = rank_of(seed, part.source.name, entry.id)
            split = "test" if rank in choice.test else "train"
            if (rank in choice.test or rank in choice.train) and all(map(part.place.exists, entry.images)):
                rows[split].setdefault(rank, entry.row(part.source.name, split))  # the entry that was chosen: a later one is a duplicate
    return {split: _write_split(out / f"{split}.jsonl", [rows[split][rank] for rank in sorted(rows[split])]) for split in rows}


def _write_split(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for row in rows:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            yield line

    write_chunks(path, lines())
    return {
        "items": len(rows),
        "images": len({image for row in rows for image in row["image"]}),
        "sha256": digest.hexdigest(),
        "ids_sha256": hashlib.sha256("\n".join(sorted(row["id"] for row in rows)).encode()).hexdigest(),
        "categories": {name: sum(row["category"] == name for row in rows) for name in CATEGORIES},
        "families": dict(sorted(Counter(row["family"] for row in rows).items())),
    }


def _digest(path: Path) -> str:
    """sha256 of a file, or of the names and digests of all files of a folder."""
    if path.is_file():
        return sha256(path)
    lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
