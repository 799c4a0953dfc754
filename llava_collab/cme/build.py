"""Builds CME-open: JSONL files of text-only conversations, a manifest and a card, with the same bytes every time.

The items of a family and split are drawn once, in an order of their own, and the first ones are taken. So a larger build holds all items
of a smaller one. A build takes less than a minute, is done in memory, and replaces each file by one rename.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_collab.assets import packages as table
from llava_collab.assets import unpacked as cached
from llava_collab.cme.items import KEY_WORDS, SPLITS, Item, Sources, packages
from llava_collab.cme.passages import MAIL_WORDS, PAIR_WORDS, POST_WORDS, SUBJECT_WORDS, TITLE_WORDS
from llava_collab.cme.tasks import TASKS
from llava_collab.cmt.phrases import phrase
from llava_collab.data.chance import rng_of
from llava_collab.data.texts import TEXT_SETS
from llava_collab.files import write_bytes, write_json, write_text

EDITION = "1.0"  # raise it whenever a change alters any item
BOOK = Path(__file__).with_name("phrases.yaml")

Row = dict[str, Any]


def build_cme(
    out: Path,
    *,
    train: int = 2_000,
    decision: int = 200,
    test: int = 500,
    seed: int = 0,
    unpacked: Callable[[str], Path] = cached,
) -> dict[str, Any]:
    """Write `out/{train,decision,test}.jsonl`, `manifest.json` and `README.md`; gives the manifest.

    The sizes are the most items that a task may have, shared evenly by its families; a family that has fewer gives what it has. Another
    seed draws other items and wordings, and moves no text to another split. `unpacked(package)` gives the folder of a package.
    Raises ValueError for sizes that make no sense and for a text in two splits, AssetError for packages that hold something else.
    """
    sizes: dict[str, int] = dict(zip(SPLITS, (train, decision, test), strict=True))
    if min(sizes.values()) < 1:
        raise ValueError(f"sizes must be positive, got {sizes}")
    sources = Sources(unpacked)
    jobs = [(split, task) for split in SPLITS for task in TASKS]
    columns: dict[str, list[list[Row]]] = {split: [] for split in sizes}
    for split, task in tqdm(jobs, desc="CME-open", unit="task"):
        columns[split].append(_task(sources, task, split, sizes[split], seed))
    rows = {split: _interleaved(found) for split, found in columns.items()}
    check_apart(rows)
    summary = {split: _write(out, split, found) for split, found in rows.items()}
    return _manifest(out, summary, sources, seed)


def check_apart(rows: dict[str, list[Row]]) -> None:
    """Raises ValueError for a text, word or fact that two splits show."""
    owners: dict[str, Row] = {}
    for split, found in rows.items():
        for row in found:
            for key in row["keys"]:
                other = owners.setdefault(key, row)
                if other["split"] != split:
                    raise ValueError(f"{row['id']} and {other['id']} show the same text ({key}): splits must not share any")


def _task(sources: Sources, task: str, split: str, most: int, seed: int) -> list[Row]:
    families = TASKS[task]
    quotas = (most // len(families) + (place < most % len(families)) for place in range(len(families)))
    columns = []
    for (family, make), quota in zip(families.items(), quotas, strict=True):
        items = make(sources, split, rng_of(f"cme-open|{seed}|{family}|{split}"))[:quota]
        wordings = rng_of(f"cme-open|{seed}|wording|{family}|{split}")
        columns.append([_row(item, task, family, split, number, wordings) for number, item in enumerate(items)])
    return _interleaved(columns)


def _row(item: Item, task: str, family: str, split: str, number: int, rng: random.Random) -> Row:
    """One line in LLaVA's format: the wording, and below it what is asked about. Test has wordings of its own."""
    asked = phrase(family, split == "test", rng, BOOK, **item.slots)
    prompt = f"{asked.prompt}\n\n{item.shown}" if item.shown else asked.prompt
    row: Row = {
        "id": f"cme-{family}-{split}-{number:05d}",
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": item.answers[0]}],
        "category": task,
        "family": family,
        "template": asked.template,
        "answers": list(item.answers),
        "keys": list(item.keys),
        "split": split,
    }
    return row | ({"choices": list(item.choices)} if item.choices else {})


def _interleaved(columns: list[list[Row]]) -> list[Row]:
    """One row of each column in turn, so that any first part holds all of them."""
    return [row for level in zip_longest(*columns) for row in level if row is not None]


def _write(out: Path, split: str, rows: list[Row]) -> dict[str, Any]:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes(out / f"{split}.jsonl", data)
    families: dict[str, Counter[str]] = {}
    for row in rows:
        families.setdefault(row["family"], Counter())[row["answers"][0]] += 1
    counts = {
        family: {"items": found.total(), "answers": len(found), "most_frequent": max(found.values())} for family, found in families.items()
    }
    return {"items": len(rows), "rows_sha256": hashlib.sha256(data).hexdigest(), "families": dict(sorted(counts.items()))}


def _manifest(out: Path, summary: dict[str, Any], sources: Sources, seed: int) -> dict[str, Any]:
    made_from = {name: table()[name] for name in packages()}
    hashes = json.dumps([[split, about["rows_sha256"]] for split, about in summary.items()])
    manifest = {
        "name": "CME-open",
        "edition": EDITION,
        "seed": seed,
        "content_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "words": {
            "post": POST_WORDS,
            "post_of_a_pair": PAIR_WORDS,
            "mail": MAIL_WORDS,
            "mail_without_subject": SUBJECT_WORDS,
            "subject": TITLE_WORDS,
            "key": KEY_WORDS,
        },
        "packages": {name: {"version": p.version, "sha256": p.sha256, "licence": p.licence} for name, p in made_from.items()},
        "sets": {
            name: {"package": texts.package, "split_by": texts.split_by, "left_out": sources.left_out[name]}
            for name, texts in TEXT_SETS.items()
        },
        "splits": summary,
    }
    write_json(out / "manifest.json", manifest)
    lines = [
        "# CME-open",
        "",
        f"Edition {EDITION}, seed {seed}; `data/cards/cme-open.md` of the repository says what this set can and can not show.",
    ]
    lines += ["", *table_of(manifest), "", "Made from (the texts keep these terms; do not pass them on):", ""]
    write_text(out / "README.md", "\n".join([*lines, *(f"- {name} {p.version}: {p.licence}" for name, p in made_from.items())]) + "\n")
    return manifest


def table_of(manifest: dict[str, Any]) -> list[str]:
    """The numbers of items by task, family and split, as lines of a Markdown table."""
    lines = [f"| task | family | {' | '.join(SPLITS)} |", "| --- | --- |" + " ---: |" * len(SPLITS)]
    for task, families in TASKS.items():
        for family in families:
            counts = (manifest["splits"][split]["families"].get(family, {}).get("items", 0) for split in SPLITS)
            lines.append(f"| {task} | {family} | {' | '.join(map(str, counts))} |")
    return [*lines, f"| all | | {' | '.join(str(manifest['splits'][split]['items']) for split in SPLITS)} |"]
