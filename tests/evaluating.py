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
from typing import Any

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


def talkative() -> tuple[Any, Any]:
    """The tiny model with weights so large that its answers differ from question to question, and its processor."""
    import torch

    from llava_collab.models.build import ModelSpec, build

    model: Any
    model, processor = build(ModelSpec(visual_expert={}, language_expert={}))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name and parameter.dim() > 1:
                parameter *= 10
    return model, processor


def main(out: Path, seconds: float) -> None:
    scorer = Scorer({"Visual QA": "vqa", "Spatial Inference": "accuracy"})
    with joined(cpu=True) as ranks:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"pid-{ranks.index}").write_text(str(os.getpid()), encoding="utf-8")
        limits = {"Visual QA": 8, "Spatial Inference": 4}
        print(evaluate(Slow(seconds), questions(), out, scorer=scorer, max_new_tokens=limits, batch_size=4, ranks=ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
