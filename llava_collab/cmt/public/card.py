"""What was built, told twice: `manifest.json` for programs, and a card for people. Neither names a place of this machine or a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL

from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.public.choose import TEST_SHARE, Choice
from llava_collab.cmt.public.duplicates import DISTANCE
from llava_collab.cmt.public.entries import EXAMPLES, IMAGES, Part
from llava_collab.cmt.public.table import Source

VERSION = "1.0"  # raise it whenever a change alters a row or a choice


def manifest_of(
    *,
    root: Path,
    known: Sequence[Source],
    parts: Sequence[Part],
    digests: Mapping[Path, str],
    targets: Mapping[str, int],
    choice: Choice,
    splits: Mapping[str, Mapping[str, Any]],
    mix: Mapping[str, Any],
    pictures: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """All of it, in an order that depends on the sources alone."""
    here = {part.source.name for part in parts}
    return {
        "name": "CMT-public",
        "version": VERSION,
        "seed": seed,
        "image_root": IMAGES,
        "complete": all(splits[split]["items"] == targets[split] for split in targets),
        "targets": dict(targets),
        "splits": {split: dict(info) for split, info in splits.items()},
        "not_in_test": dict(sorted(choice.not_test.items())),
        "not_in_train": dict(sorted(choice.not_train.items())),
        "llava_mix": {
            "files": {_name(path, root): digests[path] for path in mix["files"]},
            "pictures": mix["pictures"],
            "pictures_on_disk": mix["on disk"],
        },
        "pictures": {"hash": "pHash, 64 bits", "distance": DISTANCE, "pillow": PIL.__version__, **pictures},
        "sources": [
            _source(source, [part for part in parts if part.source is source], root, digests) for source in known if source.name in here
        ],
        "missing": [
            {"name": source.name, "category": source.category, "files": [path for files in source.files for path in files.paths]}
            | {"where": source.where}
            for source in known
            if source.name not in here
        ],
    }


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _source(source: Source, parts: Sequence[Part], root: Path, digests: Mapping[Path, str]) -> dict[str, Any]:
    skipped = sum((part.skipped for part in parts), Counter())
    examples: dict[str, list[str]] = {}
    for part in parts:
        for reason, named in part.examples.items():
            examples[reason] = (examples.get(reason, []) + named)[:EXAMPLES]
    return {
        "name": source.name,
        "category": source.category,
        "entries": sum(part.kept for part in parts),
        "files": {_name(path, root): digests[path] for part in parts for path in part.paths},
        "skipped": dict(sorted(skipped.items())),
        "examples": examples,
        "where": source.where,
        "licence": source.licence,
    }


def shortfall(manifest: Mapping[str, Any]) -> list[str]:
    """What keeps the set from the size of the article's, a line each; [] where nothing does."""
    lines = []
    for split, wanted in manifest["targets"].items():
        info = manifest["splits"][split]
        if info["items"] < wanted:
            lines.append(f"{split} is scaled down: {info['items']:,} of {wanted:,} entries")
    thin = [name for name in CATEGORIES if not manifest["splits"]["test"]["categories"][name]]
    if lines and thin:
        lines.append(f"no test entries in {', '.join(thin)}")
    return lines


def summary(manifest: Mapping[str, Any]) -> str:
    """The counts, and what is missing with where to get it, for the terminal."""
    lines = [f"{split}: {info['items']:,} entries, {info['images']:,} pictures" for split, info in manifest["splits"].items()]
    lines += shortfall(manifest)
    for source in manifest["sources"]:
        if source["skipped"]:
            reasons = ", ".join(f"{reason} {count:,} (e.g. {source['examples'][reason][0]})" for reason, count in source["skipped"].items())
            lines.append(f"{source['name']}: left out {reasons}")
    lines += [
        f"missing: {entry['name']} ({entry['category']}): {entry['files'][0]}, from {entry['where']}" for entry in manifest["missing"]
    ]
    if not manifest["llava_mix"]["files"]:
        lines.append("test was NOT checked against the LLaVA mix: name its JSON with --llava before testing a model that was trained on it")
    return "\n".join(lines)


def card(manifest: Mapping[str, Any]) -> str:
    """README.md of the built set."""
    train, test = manifest["splits"]["train"], manifest["splits"]["test"]
    lines = [
        "# CMT-public",
        "",
        "A stand-in of the size that HyperLLaVA (arXiv 2403.13447) gives for its unpublished CMT, assembled from public sets. Sources and",
        "split are this project's own: **no figure measured here may be compared with the article's.**",
        "",
        *(f"**{line}**" for line in shortfall(manifest)),
        "",
        "| category | train | test |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {train['categories'][name]:,} | {test['categories'][name]:,} |" for name in CATEGORIES),
        f"| all | {train['items']:,} | {test['items']:,} |",
        "",
        f"Seed {manifest['seed']}, version {manifest['version']}. Paths in the rows lead through the link `{IMAGES}` to the sources.",
        "",
        "## Rules",
        "",
        f"- Test: equal shares of the categories and, inside one, of the sources; at most 1 in {TEST_SHARE} entries of a category;",
        "  published validation and test data first; entries of one category have pictures of their own.",
        "- Train: published training data only, in proportion to what is there. A category without any source takes its seventh of the",
        "  target away.",
        f"- No picture, and no near duplicate of it (pHash within {DISTANCE} of 64 bits), is in both splits.",
        _mix_rule(manifest["llava_mix"]),
        "",
        "## Left out",
        "",
        *(f"- not in test, {reason}: {count:,}" for reason, count in manifest["not_in_test"].items()),
        *(f"- not in train, {reason}: {count:,}" for reason, count in manifest["not_in_train"].items()),
        *(f"- picture can't be read, {reason}: {count:,}" for reason, count in manifest["pictures"]["unreadable"].items()),
        *(f"- {s['name']}, {reason}: {count:,}" for s in manifest["sources"] for reason, count in s["skipped"].items()),
        "",
        "## Sources",
        "",
        "| source | entries | from | licence |",
        "| --- | ---: | --- | --- |",
        *(f"| {s['name']} | {s['entries']:,} | {s['where']} | {s['licence']} |" for s in manifest["sources"]),
        *(f"| {s['name']} | missing | {s['where']} | |" for s in manifest["missing"]),
    ]
    return "\n".join(lines) + "\n"


def _mix_rule(mix: Mapping[str, Any]) -> str:
    if not mix["files"]:
        return "- **Test was not checked against the LLaVA mix.**"
    return (
        f"- Test has no picture of the LLaVA mix ({', '.join(mix['files'])}): by id for its {mix['pictures']:,} pictures, by hash for the "
        f"{mix['pictures_on_disk']:,} on disk. Train may have them: training on them is no problem, testing is."
    )
