"""Suites: YAML files that say what is measured on which files, how, and how long answers may be. Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from llava_collab.data.real import REAL_SETS, read_real
from llava_collab.data.samples import Sample, read_samples
from llava_collab.evaluation.metrics import Context, Scorer
from llava_collab.files import keyed


class SuiteError(ValueError):
    """A suite file that says something else than suites can say; the message names file, key and what is allowed."""


_keyed = partial(keyed, error=SuiteError)


@dataclass(frozen=True)
class CategorySpec:
    """How one category is measured; `families` are exceptions to `metric`."""

    metric: str
    max_new_tokens: int
    families: Mapping[str, str]


@dataclass(frozen=True)
class Suite:
    """A named measurement. Its data are either `files` (split -> JSONL below the data root) or `sets` (names of real sets)."""

    name: str
    root: Path | None
    files: Mapping[str, str]
    sets: tuple[str, ...]
    categories: Mapping[str, CategorySpec]

    @property
    def splits(self) -> list[str]:
        """Splits that can be read; a real set may lack some of them."""
        return list(self.files) if self.files else sorted({split for name in self.sets for split in REAL_SETS[name].items})

    @property
    def max_new_tokens(self) -> dict[str, int]:
        return {category: spec.max_new_tokens for category, spec in self.categories.items()}

    def read(self, split: str, root: Path | None = None) -> list[Sample]:
        """All samples of a split; `root` overrides the suite's data root. Real sets without this split are left out.

        Raises SuiteError for an unknown split, FileNotFoundError for a file that is not there.
        """
        if split not in self.splits:
            raise SuiteError(f"suite {self.name} has no split {split!r}; there are {', '.join(self.splits)}")
        if self.files:
            path = (root or self.root or Path()) / self.files[split]
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; build the data set first, or name its folder with --data-root")
            return read_samples(path)
        names = [name for name in self.sets if split in REAL_SETS[name].items]
        return [sample for name in names for sample in read_real(name, split, root)]

    def scorer(self, train: list[Sample], samples: list[Sample]) -> Scorer:
        """The scorer of this suite, with caption frequencies and object names of the training samples."""
        families = {(category, family): metric for category, spec in self.categories.items() for family, metric in spec.families.items()}
        metrics = {category: spec.metric for category, spec in self.categories.items()}
        return Scorer(metrics, families, Context.of(train, samples, metrics))


def load_suite(path: Path) -> Suite:
    """Read and check a suite file. Raises SuiteError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SuiteError(f"{path}: can't be read ({error})") from error
    raw = _keyed(raw, f"{path}", {"name", "root", "files", "sets", "categories"})
    if bool(raw.get("files")) == bool(raw.get("sets")):
        raise SuiteError(f"{path}: has to name either `files` (split -> JSONL) or `sets` (names of real sets)")
    for split in ("train", "test"):
        if raw.get("files") and split not in raw["files"]:
            raise SuiteError(f"{path}: `files` lacks {split!r} (the training file gives caption frequencies and the majority baseline)")
    categories = {}
    for category, spec in _keyed(raw.get("categories"), f"{path}, categories").items():
        spec = _keyed(spec, f"{path}, {category}", {"metric", "max_new_tokens", "families"})
        try:
            categories[category] = CategorySpec(str(spec["metric"]), int(spec["max_new_tokens"]), dict(spec.get("families") or {}))
        except KeyError as error:
            raise SuiteError(f"{path}, {category}: lacks {error}") from error
    sets = tuple(raw.get("sets") or ())
    if set(sets) - set(REAL_SETS):
        raise SuiteError(f"{path}: no real set {sorted(set(sets) - set(REAL_SETS))}; there are {', '.join(REAL_SETS)}")
    suite = Suite(str(raw["name"]), Path(raw["root"]) if raw.get("root") else None, dict(raw.get("files") or {}), sets, categories)
    suite.scorer([], [])  # checks the metric names
    return suite
