"""`llava-collab data ...`: the verbs that check, shard and build data sets."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, subcommand


@dataclass
class DataCheck:
    """Check a LLaVA JSON or JSONL file, or shards, before training: pictures decode, marks match images, roles and answers are right."""

    file: Positional[Path]
    """the data file (LLaVA's 558K and 665K files are recognised by their layout), or the index.json of local shards"""
    image_root: Path | None = None
    """folder that image paths are relative to (default: the file's own)"""
    limit: int | None = None
    """look at the first so many samples only"""

    def run(self) -> int:
        from .data.check import check_file

        report = check_file(self.file, self.image_root, self.limit)
        print(report.text())
        return 0 if report.ok else 1


@dataclass
class DataShard:
    """Write a LLaVA JSON or JSONL file and its pictures as WebDataset shards with an index, which recipes take in place of the file.

    The same bytes every time. A job that was stopped goes on where it was. A sample whose picture is missing or broken is left out and
    named in OUT/skipped.jsonl; too many of them stop the job. Recipe: data.files[].path: OUT/index.json, or its URL once it is copied away.
    """

    file: Positional[Path]
    """the data file"""
    out: Path
    """folder for shard-000000.tar ..., their lines, and index.json (written last)"""
    image_root: Annotated[Path | None, tyro.conf.arg(aliases=("--images",))] = None
    """folder that image paths are relative to (default: the file's own)"""
    per_shard: int = 2000
    """records a shard; some hundred MB a shard travel best"""
    max_bad_fraction: float = 0.01
    """stop when more than this fraction of the samples can't be used"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes"""

    def run(self) -> int:
        from .data.shard_writer import write_shards
        from .files import read_json

        options = {"per_shard": self.per_shard, "workers": self.workers, "max_bad_fraction": self.max_bad_fraction}
        path = write_shards(self.file, self.out, image_root=self.image_root, **options)
        index = read_json(path)
        left_out = sum(index["left_out"].values())
        print(f"wrote {path}: {index['samples']} samples with {index['pictures']} pictures in {len(index['shards'])} shards")
        if left_out:
            print(f"left out {left_out} bad samples ({index['left_out']}), named in {self.out / 'skipped.jsonl'}", file=sys.stderr)
        return 0


@dataclass
class DataSheet:
    """Draw items of a data file, with question and answer, as one picture to look at: the first few of every family."""

    file: Positional[Path]
    """a JSONL file of CMT-open or CMT-public, e.g. data/cmt-open/test.jsonl"""
    out: Path = Path("sheet.png")
    """the picture"""
    families: tuple[str, ...] = ()
    """only these families (default: all)"""
    each: int = 2
    """items of each family"""

    def run(self) -> int:
        from .cmt import contact_sheet
        from .data.samples import iter_records

        shown: dict[str, list[dict[str, Any]]] = {}
        for row in iter_records(self.file):
            if not self.families or row.get("family") in self.families:
                shown.setdefault(row.get("family", ""), []).append(row)
        chosen = [row for family in sorted(shown) for row in shown[family][: self.each]]
        if not chosen:
            raise ValueError(f"{self.file} has no item of {', '.join(self.families) or 'any family'}")
        print(contact_sheet(chosen, self.out, self.file.parent))
        return 0


@dataclass
class BuildOpen:
    """Build CMT-open: seven categories of image-text tasks, rendered from real photographs, maps and tables with exact truth.

    Item i of a split is the same whatever sizes are asked for. Interrupted builds go on; several processes share the work.
    """

    out: Path = Path("data/cmt-open")
    """folder for the JSONL files, the images and the manifest"""
    train: int = 24000
    """training items"""
    val: int = 700
    """validation items"""
    test: int = 1149
    """test items: the paper's size"""
    decision: int = 7000
    """more test items of the same kind, for decisions (1,000 a category)"""
    test_object: int = 700
    """test items about unseen objects"""
    test_template: int = 700
    """test items in unseen phrasing"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes"""
    shard_items: int = 0
    """also write WebDataset shards of so many items (0: none)"""

    def run(self) -> int:
        from .cmt import build_cmt, write_shards

        folder = build_cmt(
            self.out,
            train=self.train,
            val=self.val,
            test=self.test,
            decision=self.decision,
            test_object=self.test_object,
            test_template=self.test_template,
            workers=self.workers,
        )
        print(f"built {folder}")
        if self.shard_items:
            for index in write_shards(folder, self.shard_items, self.workers):
                print(f"wrote {index}")
        return 0


@dataclass
class BuildPublic:
    """Assemble CMT-public, of the size that the paper gives for CMT, from public sets on your own disk. Copies no picture.

    Nothing is fetched: docs/cmt.md says where each set comes from and where its files belong below --sources. What is missing is listed,
    and the sizes are scaled to what is there. A build that was stopped keeps the picture hashes that it has.
    """

    sources: Path
    """folder of the public sets (their annotation files and pictures), and of sources.yaml if there are more"""
    out: Path = Path("data/cmt-public")
    """folder for train.jsonl, test.jsonl, manifest.json, the card, and a link to the pictures"""
    train: int = 505_405
    """training entries: the paper's number"""
    test: int = 1_149
    """test entries: the paper's number"""
    llava: tuple[Path, ...] = ()
    """LLaVA mixes whose pictures must not be in test (default: llava/llava_v1_5_mix665k.json of the sources, if it is there)"""
    seed: int = 0
    """another seed, another choice of entries"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes that hash pictures"""

    def run(self) -> int:
        from .cmt.public import build_public
        from .cmt.public.card import summary

        options = {"train": self.train, "test": self.test, "llava": self.llava, "seed": self.seed, "workers": self.workers}
        print(summary(build_public(self.sources, self.out, **options)))
        print(f"built {self.out}")
        return 0


@dataclass
class BuildText:
    """Build CME-open: ten text-only tasks (topics, spam, sentiment, pairs, words, facts) from labelled texts that ship in packages.

    The packages (about 75 MB) are fetched at the first build. The same sizes and seed give the same bytes everywhere.
    """

    out: Path = Path("data/cme-open")
    """folder for train.jsonl, decision.jsonl, test.jsonl, manifest.json and the card"""
    train: int = 2000
    """at most so many training items a task"""
    decision: int = 200
    """at most so many items a task for decisions, set apart from the packages' training texts"""
    test: int = 500
    """at most so many test items a task"""
    seed: int = 0
    """another seed, other items and wordings; no text changes its split"""

    def run(self) -> int:
        from .cme import build_cme, table_of

        manifest = build_cme(self.out, train=self.train, decision=self.decision, test=self.test, seed=self.seed)
        print("\n".join(table_of(manifest)))
        print(f"built {self.out}: content_sha256 {manifest['content_sha256']}")
        return 0


Build = (
    Annotated[BuildOpen, subcommand("cmt-open")]
    | Annotated[BuildPublic, subcommand("cmt-public")]
    | Annotated[BuildText, subcommand("cme-open")]
)


@dataclass
class DataBuild:
    """Build a benchmark: cmt-open (made here, nothing needed), cmt-public (from public sets that you have) or cme-open (texts alone)."""

    benchmark: Annotated[Build, tyro.conf.arg(name="")]

    def run(self) -> int:
        return self.benchmark.run()


Data = (
    Annotated[DataCheck, subcommand("check")]
    | Annotated[DataShard, subcommand("shard")]
    | Annotated[DataBuild, subcommand("build")]
    | Annotated[DataSheet, subcommand("sheet")]
)


@dataclass
class DataVerb:
    """Check data files, write them as shards, build the benchmark."""

    job: Annotated[Data, tyro.conf.arg(name="")]

    def run(self) -> int:
        return self.job.run()
