"""`evaluate`: put samples to a `Model` in batches and write one record a sample, so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llava_collab.collab.asking import ask
from llava_collab.evaluation.identity import run_identity
from llava_collab.evaluation.metrics import Scorer, references
from llava_collab.evaluation.ranks import Ranks, writing
from llava_collab.evaluation.records import PART, RECORDS, Row, dump, open_run, read_rows, settle
from llava_collab.types import Answer, Model, Request

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


FREQUENCIES = "caption_frequencies.json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a record file holds of what was asked. Means are not here: they are computed from the rows (`report`)."""

    asked: int
    ok: int
    errors: int

    @property
    def error_rate(self) -> float:
        return self.errors / self.asked if self.asked else 0.0

    def __str__(self) -> str:
        return f"n={self.ok}/{self.asked}, {self.errors} errors"


def evaluate(
    model: Model,
    samples: Sequence[Sample],
    out_dir: Path,
    *,
    scorer: Scorer,
    max_new_tokens: Mapping[str, int],
    batch_size: int = 8,
    split: str = "test",
    identity: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Summary:
    """Ask `model` every sample and write `out_dir/records.jsonl` and `run.json` (and the caption frequencies that scores rest on).

    `max_new_tokens` is by category. `identity` is what else decides the numbers (model hash, prompt template, seed, ...); the data hashes,
    the metrics and the limits are added here. Batches are laid out before anything is skipped and dealt whole to the ranks, so that
    answers are padded alike in a resumed run, on any number of processes, and in an unbroken run of one.

    Rows that are there already are kept; error rows are tried again. A request that fails becomes a row of status "error" without a
    score; what else the model raises stops the run (see `ask`), with everything before it on disk.

    Raises ValueError (repeated ids, a sample that can't be scored, a model that returns another number of answers) and RecordError
    (`out_dir` is of another run, or another process writes to it).
    """
    _check(samples, scorer, max_new_tokens)
    ranks = ranks or Ranks()
    by_id = {sample.id: sample for sample in samples}
    requests = [sample.request(max_new_tokens[sample.category]) for sample in samples]
    layout = [[by_id[request.id] for request in batch] for batch in batches(requests, batch_size)]
    ids = [[sample.id for sample in batch] for batch in layout]
    # Before the folder is held, since it reads every picture.
    about = run_identity(model, samples, scorer, max_new_tokens, split, identity or {}) if ranks.first else {}
    with writing(out_dir, ranks):
        if ranks.first:
            open_run(out_dir, about, environment or {})
            if scorer.context.frequencies is not None:
                scorer.context.frequencies.save(out_dir / FREQUENCIES)
            settle(out_dir, ids, final=False)
        ranks.wait()
        done = {row["sample_id"] for row in read_rows(out_dir)}
        left = [rest for batch in layout if (rest := [sample for sample in batch if sample.id not in done])]
        own = ranks.share(left)
        path = out_dir / (RECORDS if ranks.count == 1 else PART.format(ranks.index))
        with (
            path.open("a", encoding="utf-8") as file,
            tqdm(total=len(done) + sum(map(len, own)), initial=len(done), unit="item", desc="eval", disable=not ranks.first) as bar,
        ):
            for batch in own:
                start = time.perf_counter()
                answers = ask(model, [sample.request(max_new_tokens[sample.category]) for sample in batch])
                seconds = (time.perf_counter() - start) / len(batch)
                for sample, answer in zip(batch, answers, strict=True):
                    file.write(dump(_row(sample, answer, scorer, max_new_tokens, split, seconds)))
                file.flush()
                bar.update(len(batch))
        ranks.wait()
        if ranks.first:
            settle(out_dir, ids, final=True)
        ranks.wait()
        statuses = Counter(row["status"] for row in read_rows(out_dir))
    return Summary(len(samples), statuses["ok"], statuses["error"])


def choose(samples: Sequence[Sample], items_per_category: int | None, seed: int) -> list[Sample]:
    """At most so many items of each category, by the hash of seed and id: neither the file's order nor other items matter."""
    if items_per_category is None:
        return list(samples)
    taken: Counter[str] = Counter()
    chosen: set[str] = set()
    for sample in sorted(samples, key=lambda sample: hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()):
        if taken[sample.category] < items_per_category:
            taken[sample.category] += 1
            chosen.add(sample.id)
    return [sample for sample in samples if sample.id in chosen]


def prompt_text(request: Request) -> str:
    """The prompt as it stands in a record: the user's text, or every turn with its role where there are several."""
    if len(request.turns) == 1:
        return request.turns[0].text
    return "\n".join(f"{turn.role}: {turn.text}" for turn in request.turns)


def _check(samples: Sequence[Sample], scorer: Scorer, max_new_tokens: Mapping[str, int]) -> None:
    repeated = [sample_id for sample_id, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} sample ids are there twice, the first is {repeated[0]!r}; records are kept by id")
    missing = {sample.category for sample in samples} - max_new_tokens.keys()
    if missing:
        raise ValueError(f"no max_new_tokens for {sorted(missing)}; add these categories to the suite")
    scorer.check(samples)


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Questions of equal token limit and image count and similar length, the same whatever the order of the requests."""

    def key(request: Request) -> tuple[int, int, int, str]:
        return request.max_new_tokens, len(request.images), sum(len(turn.text) for turn in request.turns), request.id

    batch: list[Request] = []
    for request in sorted(requests, key=key):
        if batch and (len(batch) == batch_size or key(request)[:2] != key(batch[0])[:2]):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _row(sample: Sample, answer: Answer, scorer: Scorer, max_new_tokens: Mapping[str, int], split: str, seconds: float) -> Row:
    scored = None if answer.error is not None else scorer.score(answer.text, sample)
    row: Row = {
        "sample_id": sample.id,
        "category": sample.category,
        "family": sample.family,
        "split": split,
        "prompt": prompt_text(sample.request(max_new_tokens[sample.category])),
        "output": answer.text,
        "references": list(references(sample)),
        "score": round(scored.score, 4) if scored else None,
        "metric": scored.metric if scored else scorer.metric(sample),
        "scores": {name: round(value, 4) for name, value in scored.scores.items()} if scored else {},
        "status": "ok" if scored else "error",
        "error": answer.error,
        "usage": dataclasses.asdict(answer.usage),
        "model": answer.model,
        "seconds": round(seconds, 6),
    }
    if "images_from" in sample.meta:
        row["images_from"] = sample.meta["images_from"]
    return row | trace(answer)


def trace(answer: Answer) -> dict[str, Any]:
    """How an answer came about, as far as there is something to tell: probabilities, and of a composite its gate and its parts."""
    told: dict[str, Any] = {}
    if answer.likelihood is not None:
        told["likelihood"] = round(answer.likelihood, 6)
    if answer.scores is not None:
        told["choice_scores"] = [float(f"{p:.6g}") for p in answer.scores]
    if answer.note:
        told["note"] = answer.note
    if answer.parts:
        told["by"] = list(answer.by)
        told["confidence"] = None if answer.confidence is None or not math.isfinite(answer.confidence) else answer.confidence
        told["parts"] = [
            {"model": p.model, "output": p.text, "error": p.error, "usage": dataclasses.asdict(p.usage)} | trace(p) for p in answer.parts
        ]
    return told
