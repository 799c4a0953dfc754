"""Builds CMT-open: pictures, JSONL files, a manifest and a card, on several processes, resumable, and with the same bytes every time.

Item `index` of a category and split belongs to group `index // per_group`; a group is made from its own seed alone. So an item is the
same whatever sizes are asked for, whatever the number of workers, and whether or not a build was interrupted. Finished groups are
recorded in `parts/`; what is recorded there, and whose pictures exist with the recorded size, is not drawn again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, features
from tqdm import tqdm

from llava_collab.cmt.families import BY_NAME, CATEGORIES, Category
from llava_collab.cmt.items import SIZE, Group, Pool, Question, pool_of
from llava_collab.cmt.sources import PACKAGES, World, read_world
from llava_collab.cmt.splits import SPLITS, group_rng
from llava_collab.files import read_json, write_bytes, write_json, write_text

log = logging.getLogger(__name__)
VERSION = "2.1"  # raise it whenever a change alters any item: finished parts of another version are not reused

PUBLISHED: dict[str, str] = json.loads(Path(__file__).with_name("packages.json").read_text(encoding="utf-8"))
"""Package -> hash of the files that edition VERSION uses of it."""

Task = tuple[str, str, int]  # split, category, group
Drawn = dict[str, dict[str, Any]]  # image file -> its size in bytes and the hash of its decoded pixels


def build_cmt(
    out: Path,
    *,
    train: int = 24_000,
    val: int = 700,
    test: int = 1_149,
    decision: int = 7_000,
    test_object: int = 700,
    test_template: int = 700,
    workers: int = 2,
    world: World | None = None,
) -> Path:
    """Write `out/{train,val,test,decision,test-object,test-template}.jsonl` with `out/images/`, `manifest.json` and `README.md`.

    The sizes are numbers of items, spread evenly over the seven categories; a split of size 0 that is there already stays. `world` replaces
    the real assets (for tests).
    Raises ValueError for sizes or workers that make no sense, and if the assets are incomplete.
    """
    sizes = dict(zip(SPLITS, (train, val, test, decision, test_object, test_template), strict=True))
    if min(sizes.values()) < 0 or workers < 1:
        raise ValueError(f"sizes must not be negative and workers must be positive, got {sizes} and workers={workers}")
    published = world is None
    world = world or read_world()
    if published and (changed := changed_packages(world)):
        log.warning("not the files that edition %s was published with: %s; the items made of them will differ", VERSION, ", ".join(changed))
    out = Path(out)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    quotas = {(split, name): _quota(sizes[split], index) for split in SPLITS for index, name in enumerate(CATEGORIES)}
    fingerprint = _fingerprint(world)
    parts = {key: _Part(out, key[0], BY_NAME[key[1]], fingerprint) for key in quotas if sizes[key[0]]}
    tasks = [
        (split, name, group)
        for (split, name), part in parts.items()
        for group in range(-(-quotas[split, name] // _per_group(BY_NAME[name], split)))
        if group not in part.groups
    ]
    for (split, name, group), images, rows in tqdm(_run(tasks, world, out, workers), total=len(tasks), desc="CMT-open", unit="group"):
        parts[split, name].add(group, images, rows)
    for part in parts.values():
        part.close()
    earlier = _earlier(out, world)
    summary = {}
    for split in SPLITS:
        if not sizes[split] and split in earlier:
            summary[split] = earlier[split]  # nothing was asked of it now: its items stay
            continue
        rows = list(_interleaved([parts[split, name].rows(quotas[split, name]) for name in CATEGORIES])) if sizes[split] else []
        pixels = {file: sha for name in CATEGORIES if sizes[split] for file, sha in parts[split, name].pixels.items()}
        summary[split] = _write_split(out, split, rows, pixels)
    _write_manifest(out, world, summary)
    return out


def _earlier(out: Path, world: World) -> dict[str, Any]:
    """Splits that an earlier build of the same edition and sources left in this folder."""
    manifest = read_json(out / "manifest.json") if (out / "manifest.json").is_file() else {}
    if manifest.get("edition") != VERSION or manifest.get("packages_sha256") != world.packages:
        return {}
    return {split: info for split, info in manifest["splits"].items() if info["items"] and (out / f"{split}.jsonl").is_file()}


def _quota(total: int, index: int) -> int:
    """Items of category number `index`: the first ones take what does not divide by seven."""
    return total // len(CATEGORIES) + (index < total % len(CATEGORIES))


def _per_group(category: Category, split: str) -> int:
    """Only train asks several questions about the same pictures (their features are cached); the items of a test must be independent."""
    return category.per_group if split == "train" else 1


def _fingerprint(world: World) -> str:
    """What all pixels depend on: this generator, the drawing library and the source files."""
    return _sha(json.dumps([VERSION, SIZE, PIL.__version__, world.files], sort_keys=True).encode())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Part:
    """The finished groups of one category and split: an append-only JSONL file whose first line is the fingerprint."""

    def __init__(self, out: Path, split: str, category: Category, fingerprint: str) -> None:
        self.path = out / "parts" / f"{split}--{category.slug}.jsonl"
        self.groups: dict[int, list[dict[str, Any]]] = {}
        self.pixels: dict[str, str] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        good = self._reuse(out, lines[1:]) if lines and lines[0] == json.dumps({"fingerprint": fingerprint}).encode() else []
        write_bytes(self.path, "".join(line + "\n" for line in [json.dumps({"fingerprint": fingerprint}), *good]).encode())
        self.handle = self.path.open("a", encoding="utf8")

    def _reuse(self, out: Path, lines: list[bytes]) -> list[str]:
        good = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line during which an earlier build was stopped, maybe within a character
            files = record["images"].items()
            if all((out / name).is_file() and (out / name).stat().st_size == drawn["bytes"] for name, drawn in files):
                self.groups[record["group"]] = record["rows"]
                self.pixels |= {name: drawn["pixels"] for name, drawn in files}
                good.append(line.decode())
        return good

    def add(self, group: int, images: Drawn, rows: list[dict[str, Any]]) -> None:
        self.groups[group] = rows
        self.pixels |= {name: drawn["pixels"] for name, drawn in images.items()}
        self.handle.write(json.dumps({"group": group, "images": images, "rows": rows}, ensure_ascii=False) + "\n")
        self.handle.flush()

    def close(self) -> None:
        self.handle.close()

    def rows(self, quota: int) -> list[dict[str, Any]]:
        return [row for group in sorted(self.groups) for row in self.groups[group]][:quota]


@dataclass
class _Maker:
    """Makes groups in one process: pools of the splits and, through `draw`, decoded pictures are kept between groups."""

    world: World
    out: Path

    def __post_init__(self) -> None:
        self.pools: dict[str, Pool] = {}

    def __call__(self, task: Task) -> tuple[Task, Drawn, list[dict[str, Any]]]:
        split, name, number = task
        if split not in self.pools:
            self.pools[split] = pool_of(self.world, split)
        category = BY_NAME[name]
        count = _per_group(category, split)
        group = category.make(self.pools[split], group_rng(name, split, number), count)
        if len(group.questions) != count:
            raise RuntimeError(f"{name} made {len(group.questions)} questions instead of {count} for group {number} of {split}")
        files = []
        drawn = {}
        for index, image in enumerate(group.images):
            file = f"images/{split}/{category.slug}/{number:06d}-{index}.webp"
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=90, method=2)
            write_bytes(self.out / file, buffer.getvalue(), durable=False)  # a resumed build checks sizes
            files.append(file)
            drawn[file] = {"bytes": len(buffer.getvalue()), "pixels": _pixels(buffer)}
        rows = [_row(question, group, category, split, number * count + index, files) for index, question in enumerate(group.questions)]
        return task, drawn, rows


def _row(question: Question, group: Group, category: Category, split: str, index: int, files: list[str]) -> dict[str, Any]:
    """One line in LLaVA's format: one `<image>` mark per picture in front of the question; `truth` says what each picture shows."""
    images = [files[image] for image in question.images]
    prompt = "<image>\n" * len(images) + question.prompt
    row: dict[str, Any] = {
        "id": f"cmt-{category.slug}-{split}-{index:06d}",
        "image": images,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answers[0]}],
        "category": category.name,
        "family": question.family,
        "template": question.asked.template,
        "slots": question.asked.slots,
        "answers": list(dict.fromkeys(question.answers)),
        "objects": list(question.objects),
        "split": split,
        "truth": [group.truths[image] for image in question.images],
    }
    extra = {"choices": question.choices, "checklist": question.checklist, "beats": question.beats}
    return row | {key: value for key, value in extra.items() if value}


_MAKER: _Maker | None = None


def _start_worker(world: World, out: Path) -> None:
    global _MAKER
    _MAKER = _Maker(world, out)


def _work(task: Task) -> tuple[Task, Drawn, list[dict[str, Any]]]:
    if _MAKER is None:
        raise RuntimeError("worker used before it was started")
    return _MAKER(task)


def _run(tasks: list[Task], world: World, out: Path, workers: int) -> Iterator[tuple[Task, Drawn, list[dict[str, Any]]]]:
    """Results in the order of the tasks. Processes are spawned, not forked: the caller may hold threads (torch does)."""
    if workers == 1 or len(tasks) < 2:
        yield from map(_Maker(world, out), tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=partial(_start_worker, world, out)) as pool:
        yield from pool.imap(_work, tasks, chunksize=8)


def _interleaved(columns: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One item of each category in turn, so that any first part of a file holds all categories."""
    for index in range(max(map(len, columns), default=0)):
        for column in columns:
            if index < len(column):
                yield column[index]


def _pixels(file: io.BytesIO) -> str:
    """SHA-256 of the decoded RGB pixels and their size: what a model sees, however the file was encoded."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    return _sha(f"{image.width}x{image.height}".encode() + image.tobytes())


def _write_split(out: Path, split: str, rows: list[dict[str, Any]], pixels: dict[str, str]) -> dict[str, Any]:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes(out / f"{split}.jsonl", data)
    images = sorted({image for row in rows for image in row["image"]})
    return {
        "items": len(rows),
        "images": len(images),
        "rows_sha256": _sha(data),
        "pixels_sha256": _sha("".join(f"{image} {pixels[image]}\n" for image in images).encode()),
        "categories": dict(Counter(row["category"] for row in rows)),
        "families": dict(sorted(Counter(row["family"] for row in rows).items())),
    }


def _write_manifest(out: Path, world: World, summary: dict[str, Any]) -> None:
    pools = {split: pool_of(world, split) for split in ("train", "test", "test-object")}
    manifest = {
        "name": "CMT-open",
        "edition": VERSION,
        "content_sha256": _sha(json.dumps([[s, i["rows_sha256"], i["pixels_sha256"]] for s, i in summary.items()]).encode()),
        "drawn_with": {"pillow": PIL.__version__, **{name: features.version(name) for name in ("webp", "freetype2")}},
        "image_size": SIZE,
        "licences": PACKAGES,
        "packages_sha256": world.packages,
        "changed_packages": changed_packages(world),
        "known_things": len(pools["train"].things),
        "unseen_things": len(pools["test-object"].things),
        "train_backgrounds": [background.name for background in pools["train"].backgrounds],
        "test_backgrounds": [background.name for background in pools["test"].backgrounds],
        "splits": summary,
        "source_files": dict(sorted(world.files.items())),
    }
    write_json(out / "manifest.json", manifest)
    rows = [f"| {split} | {info['items']} | {info['images']} |" for split, info in summary.items()]
    licences = [f"- {package}: {licence}" for package, licence in PACKAGES.items()]
    card = ["# CMT-open", "", f"Edition {VERSION}; see `data/README.md` of the repository for what this set can and can not show.", ""]
    card += ["| split | items | images |", "| --- | ---: | ---: |", *rows, ""]
    card += ["Made from (the pictures inherit these licences):", "", *licences]
    write_text(out / "README.md", "\n".join(card) + "\n")


def changed_packages(world: World) -> list[str]:
    """Packages whose files are not those that this edition was published with; their pictures, hence the hashes, will differ."""
    return sorted(name for name, sha in PUBLISHED.items() if world.packages.get(name) != sha)
