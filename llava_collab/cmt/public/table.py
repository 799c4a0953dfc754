"""The table of public sources: files with their published paths, category, where to get them, licence; more come from sources.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public.entries import SourceError
from llava_collab.files import keyed

EXTRA_FILE = "sources.yaml"
LLAVA_MIX = "llava/llava_v1_5_mix665k.json"  # looked up for removal from test, where the user names no other
VISUAL_GENOME = "vg/image_data.json"  # says which Visual Genome pictures are COCO's


@dataclass(frozen=True)
class Files:
    """A file of a source with its companions, relative to the sources folder; `held`: published as validation or test data."""

    paths: tuple[str, ...]
    held: bool = False
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A public set. `images` is the folder of pictures for readers that take it from here, `own_ids` says that
    entries have published ids, `listed` that it stands in this table (and may be missing)."""

    name: str
    reader: str
    category: str
    files: tuple[Files, ...]
    pictures: str
    where: str
    licence: str
    own_ids: bool = True
    listed: bool = True
    images: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    def cure(self) -> str:
        """The end of an error about a file of this source."""
        return f"is it {self.name}'s file as published ({self.where})?"

    def check_category(self, category: str) -> None:
        """Raises SourceError for a name that is none of the seven."""
        if category not in CATEGORIES:
            raise SourceError(f"category {category!r} is none of {', '.join(CATEGORIES)}; give the source one in {EXTRA_FILE}")


def _split_files(pattern: str, train: str, *held: str) -> tuple[Files, ...]:
    return (Files((pattern.format(train),)), *(Files((pattern.format(split),), held=True) for split in held))


_COCO = "coco/train2017, coco/val2017 (or coco/train2014, coco/val2014 with the names of 2014)"

TABLE: tuple[Source, ...] = (
    Source(
        "vqav2", "vqav2", "Visual QA",
        tuple(
            Files((f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", f"vqav2/v2_mscoco_{split}_annotations.json"), split == "val2014")
            for split in ("train2014", "val2014")
        ),
        _COCO, "visualqa.org, download page", "annotations CC BY 4.0; pictures under Flickr terms",
    ),
    Source(
        "gqa", "gqa", "Visual QA", _split_files("gqa/{}_balanced_questions.json", "train", "val", "testdev"),
        "gqa/images", "GQA project page at Stanford, download page", "CC BY 4.0; pictures of Visual Genome",
    ),
    Source(
        "coco_captions", "coco_captions", "Visual Captioning", _split_files("coco/annotations/captions_{}2017.json", "train", "val"),
        _COCO, "cocodataset.org, download page", "annotations CC BY 4.0; pictures under Flickr terms",
    ),
    Source(
        "vsr", "vsr", "Spatial Inference", _split_files("vsr/data/splits/random/{}.jsonl", "train", "dev", "test"),
        _COCO, "GitHub: cambridgeltl/visual-spatial-reasoning (a clone as vsr/)", "Apache-2.0; pictures of COCO", own_ids=False,
    ),
    Source(
        "llava_detail", "llava", "Detailed Description", _split_files("llava/{}.json", "detail_23k"),
        "coco/train2017", "the LLaVA project's LLaVA-Instruct-150K", "CC BY 4.0, made with GPT-4 (its terms apply); pictures of COCO",
        own_ids=False, images="coco/train2017",
    ),
    Source(
        "vist", "vist", "Visual Storytelling", _split_files("vist/sis/{}.story-in-sequence.json", "train", "val", "test"),
        "vist/images/train, vist/images/val, vist/images/test", "visionandlanguage.net/VIST (stories of images in sequence)",
        "annotations for research; photos under Creative Commons licences of their owners",
    ),
    Source(
        "textvqa", "textvqa", "Knowledge OCR",
        tuple(
            Files((f"textvqa/TextVQA_0.5.1_{split}.json",), split == "val", (f"textvqa/TextVQA_Rosetta_OCR_v0.2_{split}.json",))
            for split in ("train", "val")
        ),
        "textvqa/train_images", "textvqa.org, dataset page", "CC BY 4.0; pictures of OpenImages",
    ),
    Source(
        "docvqa", "docvqa", "Text-Rich Images QA", _split_files("docvqa/{}_v1.0_withQT.json", "train", "val"),
        "docvqa/documents", "rrc.cvc.uab.es, DocVQA, Task 1 (after registration)",
        "research use; pages of the UCSF Industry Documents Library",
    ),
)  # fmt: skip

_KEYS = {"name", "format", "path", "category", "images", "columns", "held", "licence", "where"}
_COLUMNS = {"image", "question", "answers"}


def extra_sources(folder: Path) -> tuple[Source, ...]:
    """The sources that `sources.yaml` of the folder adds. Raises SourceError that names the entry."""
    path = folder / EXTRA_FILE
    if not path.is_file():
        return ()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SourceError(f"{path}: no YAML ({error})") from error
    entries = keyed(raw, str(path), {"sources"}, SourceError).get("sources")
    if not isinstance(entries, list):
        raise SourceError(f"{path}: `sources` has to be a list")
    sources = tuple(
        _extra(keyed(entry, f"{path}, source {n}", _KEYS, SourceError), f"{path}, source {n}") for n, entry in enumerate(entries, 1)
    )
    names = [source.name for source in (*TABLE, *sources)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{path}: the names {twice} are taken; choose others")
    return sources


def _extra(entry: dict[str, Any], where: str) -> Source:
    """`path` is the training file, `held` lists files of the same form that were published as validation or test data."""
    if missing := {"name", "format", "path"} - set(entry):
        raise SourceError(f"{where}: lacks {sorted(missing)}")
    if entry["format"] not in ("llava", "datasets"):
        raise SourceError(f"{where}: format {entry['format']!r} is neither llava nor datasets")
    columns = {name: name for name in _COLUMNS} | keyed(entry.get("columns") or {}, f"{where}, columns", _COLUMNS, SourceError)
    held = entry.get("held") or []
    if not isinstance(held, list):
        raise SourceError(f"{where}: `held` has to be a list of files, found {held!r}")
    images = str(entry.get("images", PurePosixPath(entry["path"]).parent if entry["format"] == "llava" else ""))
    source = Source(
        name=str(entry["name"]),
        reader=entry["format"],
        category=str(entry.get("category", "")),
        files=(Files((str(entry["path"]),)), *(Files((str(path),), held=True) for path in held)),
        pictures=images,
        where=str(entry.get("where", f"named in {EXTRA_FILE}")),
        licence=str(entry.get("licence", "not stated")),
        own_ids=False,
        listed=False,
        images=images,
        columns=columns,
    )
    if source.category or source.reader == "datasets":
        source.check_category(source.category)
    return source
