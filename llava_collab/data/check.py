"""Judges a data file or local shards before a run: all that would be skipped or would crash later, counted, with examples and cures.

Recognises the layout of LLaVA's two files (`blip_laion_cc_sbu_558k.json`, `llava_v1_5_mix665k.json`), and says which of their
picture folders are missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_collab.data.conversation import SampleError, check_image_count, check_turns
from llava_collab.data.images import Picture, load_image, resolve_image
from llava_collab.data.places import names_shards
from llava_collab.data.samples import Sample, iter_records, parse_record, read_shards
from llava_collab.data.shards import ShardMember, open_shards

EXAMPLES = 5
LAYOUT_665K = "llava_v1_5_mix665k"
LAYOUT_558K = "blip_laion_cc_sbu_558k"
# Where LLaVA's README says the pictures of the 665K mixture come from.
FOLDERS_665K = {
    "coco/train2017": "COCO 2017 train images",
    "gqa/images": "GQA images",
    "ocr_vqa/images": "OCR-VQA images; .gif and .png files may keep their extension",
    "textvqa/train_images": "TextVQA train and val images",
    "vg/VG_100K": "Visual Genome images, part 1",
    "vg/VG_100K_2": "Visual Genome images, part 2",
}
CURES = {
    "bad_record": "repair the file at this place; nothing behind a broken record of a JSON array is read",
    "duplicate_id": "give every record an id of its own",
    "empty_answer": "drop the record or write its answer",
    "ends_with_user": "drop the last turn or answer it",
    "image_count": "write one <image> for each image into the human turns",
    "image_place": "take <image> out of gpt and system turns",
    "image_too_large": "scale these pictures down",
    "missing_image": "fetch these pictures, or pass the right image root",
    "starts_with_assistant": "drop the first gpt turn",
    "truncated_image": "fetch these pictures again",
    "turn_order": "let human and gpt take turns",
    "unknown_role": "use human, gpt and (first only) system",
}


@dataclass
class CheckReport:
    """What is in a file, and what is wrong with it. `problems` counts by reason, `examples` names a few of each."""

    path: Path
    layout: str | None = None
    samples: int = 0
    text_only: int = 0
    images: int = 0
    aliased: int = 0
    duplicate_ids: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    missing_folders: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Green: there are samples, and none of them has a problem."""
        return self.samples > 0 and not self.problems

    def add(self, reason: str, example: str) -> None:
        """Counts one problem."""
        self.problems[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def text(self) -> str:
        """The report for a person: facts, then each problem with its count, cure and examples."""
        lines = [f"{self.path}: {self.samples} samples ({self.text_only} without image), {self.images} different images"]
        if self.layout:
            lines.append(f"layout: LLaVA's {self.layout}")
        if self.aliased:
            lines.append(f"note: {self.aliased} images were found under another extension (.jpg, .png, .gif); they will be used")
        if self.duplicate_ids and "duplicate_id" not in self.problems:
            lines.append(f"note: {self.duplicate_ids} ids come more than once, as they do in LLaVA's own file")
        for reason, count in self.problems.most_common():
            lines += [f"PROBLEM {reason}: {count}. Cure: {CURES[reason]}", *(f"    {example}" for example in self.examples[reason])]
        for folder, count in self.missing_folders.most_common(20):
            source = FOLDERS_665K.get(folder) if self.layout == LAYOUT_665K else None
            lines.append(f"missing in {folder or '.'}: {count} images" + (f" ({source})" if source else ""))
        bad = f"{sum(self.problems.values())} problems" if self.samples else "no samples"
        return "\n".join([*lines, "OK" if self.ok else f"NOT OK: {bad}"])


def check_file(path: Path | str, image_root: Path | str | None = None, limit: int | None = None) -> CheckReport:
    """Reads a LLaVA JSON or JSONL file, or the index of shards, and opens every picture once; with `limit`, of the first so many records.

    Raises `FileNotFoundError` where there is no such file, `ShardError` where shards are not those of the index; all else is in the report.
    """
    path = Path(path)
    root = Path() if names_shards(path) else Path(image_root) if image_root is not None else path.parent
    report = CheckReport(path)
    seen_ids: set[str] = set()
    verdicts: dict[Picture, SampleError | None] = {}
    layouts: Counter[str] = Counter()
    for sample in tqdm(islice(_samples(path, root, report), limit), desc=f"checking {path.name}", unit="sample", total=limit):
        report.samples += 1
        if sample is None:
            continue
        if sample.id in seen_ids:
            report.duplicate_ids += 1
            report.add("duplicate_id", sample.id)
        seen_ids.add(sample.id)
        report.text_only += not sample.images
        layouts.update(_layout(_path(image), root) for image in sample.images)
        _check_text(sample, report)
        _check_images(sample, root, verdicts, report)
    report.images = len(verdicts)
    report.layout = _recognised(layouts)
    if report.layout:  # the ids of LLaVA's files are those of pictures, and a picture has several conversations there
        del report.problems["duplicate_id"]
        report.examples.pop("duplicate_id", None)
    return report


def _samples(path: Path, root: Path, report: CheckReport) -> Iterator[Sample | None]:
    """The samples; None for a record that is none (it is in the report then)."""
    if names_shards(path):
        shards = open_shards(path)
        shards.verify()
        yield from read_shards(shards)
        return
    try:
        for number, record in enumerate(iter_records(path), start=1):
            yield _sample(record, root, f"{path.name}, record {number}", report)
    except SampleError as error:  # no JSON: there is no next record to go on with
        report.add(error.reason, str(error))


def _sample(record: Any, root: Path, where: str, report: CheckReport) -> Sample | None:
    try:
        return parse_record(record, root, where)
    except SampleError as error:
        report.add(error.reason, str(error))
        return None


def _path(image: Picture) -> Path:
    """The picture's path, as the data file had it where it is in a shard."""
    return Path(image.file) if isinstance(image, ShardMember) else image


def _check_text(sample: Sample, report: CheckReport) -> None:
    for check in (check_turns, lambda turns, sample_id: check_image_count(turns, len(sample.images), sample_id=sample_id)):
        try:
            check(sample.turns, sample_id=sample.id)
        except SampleError as error:
            report.add(error.reason, str(error))


def _check_images(sample: Sample, root: Path, verdicts: dict[Picture, SampleError | None], report: CheckReport) -> None:
    for image in sample.images:
        if image not in verdicts:
            verdicts[image] = _open(image, sample.id)
            found = resolve_image(image)
            report.aliased += found not in (None, image)
            if found is None:
                report.missing_folders[_folder(_path(image), root)] += 1
        error = verdicts[image]
        if error is not None:
            report.add(error.reason, f"sample {sample.id}: {error.message}")


def _open(image: Picture, sample_id: str) -> SampleError | None:
    try:
        load_image(image, sample_id)
    except SampleError as error:
        return error
    return None


def _folder(image: Path, root: Path) -> str:
    return (image.relative_to(root) if image.is_relative_to(root) else image).parent.as_posix()


def _layout(image: Path, root: Path) -> str:
    folder = _folder(image, root)
    if folder in FOLDERS_665K:
        return LAYOUT_665K
    return LAYOUT_558K if re.fullmatch(r"\d{5}", folder) and re.fullmatch(r"\d{9}", image.stem) else ""


def _recognised(layouts: Counter[str]) -> str | None:
    """A layout is what nine in ten images follow."""
    name, count = layouts.most_common(1)[0] if layouts else ("", 0)
    return name if name and count >= 0.9 * sum(layouts.values()) else None
