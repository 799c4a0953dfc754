"""Finds the samples and pictures that records were made of again: a record carries its sample's id, question and references only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_collab.data.samples import Sample
from llava_collab.evaluation.controls import blind
from llava_collab.evaluation.evaluator import prompt_text
from llava_collab.evaluation.metrics import references
from llava_collab.evaluation.records import RecordError, Row
from llava_collab.evaluation.report import Run
from llava_collab.evaluation.suite import load_suite


def read_measured(runs: Sequence[Run], suites: Path, suite: Path | None = None, data_root: Path | None = None) -> list[Sample]:
    """All samples of the one split and suite that the runs were measured on; `suite` in place of `suites/NAME.yaml` by their header.

    Raises RecordError for runs of different suites or splits, SuiteError, and FileNotFoundError where the data set is not there.
    """
    measured = sorted({(str(run.identity.get("suite")), str(run.identity.get("split"))) for run in runs})
    if len(measured) > 1:
        raise RecordError(f"the runs were measured on different suites or splits: {measured}; take runs of one")
    (name, split), *_ = measured
    return load_suite(suite or suites / f"{name}.yaml").read(split, data_root)


def is_of(row: Row, sample: Sample) -> bool:
    """Whether the record was made of this sample, asked plainly or blind: a data set built anew may ask something else under an old id."""
    if row["references"] != list(references(sample)):
        return False
    return row["prompt"] in {prompt_text(one.request()) for one in (sample, *blind([sample]))}
