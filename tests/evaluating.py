"""A program for tests to kill: evaluates a slow stand-in for a model on made-up questions, alone or under torchrun.

    python tests/evaluating.py OUT SECONDS_A_BATCH

An answer names every question of its batch, so records are equal only where the batches were.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llava_collab.data.samples import Sample
from llava_collab.evaluation.evaluator import evaluate
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.ranks import joined
from llava_collab.types import Answer, Request, Turn, Usage


class Slow:
    """Takes its time."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        time.sleep(self.seconds)
        return [Answer(" ".join(r.id for r in requests), Usage(1, 0, len(r.id), 1), self.name) for r in requests]


def questions(count: int = 90) -> list[Sample]:
    """Of ragged length, in two categories."""
    categories = ("Visual QA", "Spatial Inference")
    return [Sample(f"s{i}", (), (Turn("user", "why " * (i % 7)), Turn("assistant", "yes")), categories[i % 2]) for i in range(count)]


def main(out: Path, seconds: float) -> None:
    scorer = Scorer({"Visual QA": "vqa", "Spatial Inference": "accuracy"})
    with joined(cpu=True) as ranks:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"pid-{ranks.index}").write_text(str(os.getpid()), encoding="utf-8")
        limits = {"Visual QA": 8, "Spatial Inference": 4}
        print(evaluate(Slow(seconds), questions(), out, scorer=scorer, max_new_tokens=limits, batch_size=4, ranks=ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
