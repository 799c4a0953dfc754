"""Compare what lmms-eval scored on CMT-open with our evaluator's scores of the same model on the same questions.

    python eval/lmms_check.py --model checkpoints/hyperllava-smol --lmms runs/lmms-check --out runs/lmms-check/ours

`--lmms` is the --output_path of an lmms-eval run with --log_samples; scripts/lmms_eval_check.sh makes one and calls this. Exit status 0
where every category's score agrees to 0.001.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from llava_collab.collab.single import Single
from llava_collab.data.samples import Sample, iter_records
from llava_collab.evaluation.evaluator import evaluate
from llava_collab.evaluation.records import RecordError, Row, read_rows
from llava_collab.evaluation.suite import SuiteError, load_suite
from llava_collab.files import model_sha256

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "cmt_open_"


@dataclass(frozen=True)
class Args:
    """Compare lmms-eval's scores on CMT-open with ours."""

    model: Path
    """The model folder that lmms-eval was given, as `pretrained=`; both compute in fp32 (`dtype=float32` there)."""
    lmms: Path
    """The --output_path of lmms-eval."""
    out: Path
    """Folder for our records."""
    batch_size: int = 4
    """Questions at once."""


def read_logs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Task -> its logged documents. Raises RecordError where there are none, or logs of two runs."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob(f"*_samples_{PREFIX}*.jsonl")):
        task = path.stem.partition("_samples_")[2]
        if task in logs:
            raise RecordError(f"{folder}: holds logs of several runs of {task}; name the folder of one")
        logs[task] = list(iter_records(path))
    if not logs:
        raise RecordError(f"{folder}: no logged samples of CMT-open below it; run lmms-eval with --log_samples --output_path {folder}")
    return logs


def answered(rows: list[Row]) -> dict[str, Row]:
    """Our rows by sample id. Raises RecordError where some have no answer: lmms-eval has none such, so nothing can be compared."""
    if failed := [row for row in rows if row["status"] != "ok"]:
        ids = ", ".join(row["sample_id"] for row in failed)
        raise RecordError(f"{len(failed)} of {len(rows)} samples have no answer of ours: {ids}; the first: {failed[0]['error']}")
    return {row["sample_id"]: row for row in rows}


def main(args: Args) -> float:
    """Largest difference of a category's score. Raises RecordError, SuiteError, ValueError or FileNotFoundError with the cure."""
    import torch

    from llava_collab.models.build import load

    suite, data = load_suite(ROOT / "eval" / "suites" / "cmt-open.yaml"), ROOT / "data" / "cmt-open"
    everything = suite.read("test", data)
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in everything:
        by_task[PREFIX + sample.category.lower().replace(" ", "_").replace("-", "_")].append(sample)
    logs = read_logs(args.lmms)
    theirs = {by_task[task][row["doc_id"]].id: row for task, rows in logs.items() for row in rows}
    evaluate(
        Single(*load(args.model, dtype=torch.float32), args.model.name),
        [sample for sample in everything if sample.id in theirs],
        args.out,
        scorer=suite.scorer(suite.read("train", data), everything),
        max_new_tokens=suite.max_new_tokens,
        batch_size=args.batch_size,
        identity={"model_sha256": model_sha256(args.model), "dtype": "float32"},
    )
    ours = answered(read_rows(args.out))
    differences = []
    for task, rows in logs.items():
        ids = [by_task[task][row["doc_id"]].id for row in rows]
        means = [float(np.mean([source[sample_id]["score"] for sample_id in ids])) for source in (theirs, ours)]
        same = sum(theirs[sample_id]["filtered_resps"] == ours[sample_id]["output"] for sample_id in ids)
        prompts = sum(theirs[sample_id]["input"] == ours[sample_id]["prompt"] for sample_id in ids)
        print(f"{task:<32} lmms-eval {means[0]:8.4f}  ours {means[1]:8.4f}  equal: {prompts} prompts, {same} answers of {len(ids)}")
        differences.append(abs(means[0] - means[1]))
    return max(differences)


if __name__ == "__main__":
    try:
        difference = main(tyro.cli(Args, description=__doc__))
    except (RecordError, SuiteError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if difference > 1e-3:
        sys.exit(f"error: scores differ by {difference:.4f}")
