"""Whether a model answers a question in a batch as it answers it alone, and how much faster batches are.

    python benchmarks/batched_evaluation.py            writes benchmarks/results/batched_evaluation.json

Questions of CMT-open, with no, one and several pictures, in fp32: once as the evaluator batches them (equal token limit and picture count,
similar length), once dealt at random, so that every kind shares a batch with every other. Where an answer differs, the two tokens at
which it parts are compared: a gap of less than 1e-4 in log-probability is a tie, which rounding may break either way; a wider one is an
error of padding or masking. Times are of the evaluator's batches, taking turns with one by one in one process; the faster round of each
counts. On a CPU that others use as well, the ratio of CPU seconds, given beside, is the one to believe.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from llava_collab.collab.single import Single
from llava_collab.data.samples import Sample
from llava_collab.evaluation.controls import blind
from llava_collab.evaluation.environment import write_results
from llava_collab.evaluation.evaluator import batches, choose
from llava_collab.evaluation.suite import load_suite
from llava_collab.types import Request

ROOT = Path(__file__).resolve().parent.parent
TIE = 1e-4


@dataclass(frozen=True)
class Args:
    """Compare batched answers with those given one by one."""

    model: Path = ROOT / "checkpoints" / "hyperllava-smol"
    """Model folder."""
    suite: Path = ROOT / "eval" / "suites" / "cmt-open.yaml"
    """Suite that the questions are of."""
    data_root: Path | None = None
    """Folder of its data (default: the suite's own)."""
    items: int = 200
    """Questions."""
    batch_size: int = 16
    """Questions a batch."""
    rounds: int = 2
    """How often each way is timed."""
    out: Path = ROOT / "benchmarks" / "results" / "batched_evaluation.json"
    """Result file."""


@dataclass(frozen=True)
class Agreement:
    """Of so many answers `equal` were the same; of the others `gaps` are the log-probability gaps where they part."""

    equal: int
    gaps: tuple[float, ...]

    @property
    def share(self) -> float:
        """Equal or tied."""
        return (self.equal + sum(gap < TIE for gap in self.gaps)) / (self.equal + len(self.gaps))


def mixed(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` questions of all categories alike, every sixth without its pictures."""
    chosen = choose(samples, -(-count // len({sample.category for sample in samples})), seed=0)[:count]
    return [blind([sample])[0] if number % 6 == 0 else sample for number, sample in enumerate(chosen)]


def agreement(model: Single, groups: Sequence[Sequence[Request]], alone: Mapping[str, str]) -> Agreement:
    """Answers of `groups`, each asked as one batch, beside those given alone (by id). Raises RuntimeError for a question that fails."""
    equal, gaps = 0, []
    for group in tqdm(groups, desc="batches", unit="batch"):
        for number, (request, text) in enumerate(zip(group, ask(model, group), strict=True)):
            if text == alone[request.id]:
                equal += 1
            else:
                gaps.append(gap(model, request, tokens(model, group)[number]))
    return Agreement(equal, tuple(gaps))


def ask(model: Single, requests: Sequence[Request]) -> list[str]:
    """The texts. Raises RuntimeError where there is none."""
    answers = model.generate(requests)
    if failed := [f"{r.id}: {a.error}" for r, a in zip(requests, answers, strict=True) if a.error is not None]:
        raise RuntimeError("\n".join(failed))
    return [answer.text for answer in answers]


@torch.inference_mode()
def tokens(model: Single, requests: Sequence[Request], **options: Any) -> Any:
    """Generated ids [B, T] (or generate's whole output, where `options` ask for it)."""
    batch = model.processor.encode_requests(requests).to(model.network.device)
    options = {"max_new_tokens": max(r.max_new_tokens for r in requests)} | options
    out = model.network.generate(**batch, do_sample=False, **options)
    return out if options.get("return_dict_in_generate") else out[:, batch["input_ids"].shape[1] :]


def gap(model: Single, request: Request, in_batch: torch.Tensor) -> float:
    """How much likelier, in log-probability, the token is that the model alone gives where its answer parts from `in_batch` [T]."""
    out = tokens(model, [request], output_logits=True, return_dict_in_generate=True)
    steps = len(out.logits)
    own = out.sequences[0, -steps:]
    at = next(k for k in range(min(steps, len(in_batch))) if own[k] != in_batch[k])
    log_probabilities = out.logits[at][0].float().log_softmax(-1)
    return float(log_probabilities[own[at]] - log_probabilities[in_batch[at]])


def measure(args: Args) -> tuple[dict[str, Agreement], float, float]:
    """Agreement by the way of batching; items a second in batches over items a second one by one, of wall time and of CPU time."""
    from llava_collab.models.build import load

    suite = load_suite(args.suite)
    model = Single(*load(args.model, dtype=torch.float32), args.model.name)
    samples = mixed(suite.read("test", args.data_root), args.items)
    requests = {sample.id: sample.request(suite.max_new_tokens[sample.category]) for sample in samples}
    ways = {n: list(batches(list(requests.values()), n)) for n in (args.batch_size, 1)}
    ask(model, ways[args.batch_size][0])  # the first batch of a process is slow
    wall: dict[int, float] = dict.fromkeys(ways, math.inf)
    cpu: dict[int, float] = dict.fromkeys(ways, math.inf)
    alone: dict[str, str] = {}
    for _ in range(args.rounds):
        for size, groups in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            for group in tqdm(groups, desc=f"{size} at once", unit="batch"):
                texts = ask(model, group)
                if size == 1:
                    alone[group[0].id] = texts[0]
            wall[size] = min(wall[size], time.perf_counter() - start)
            cpu[size] = min(cpu[size], time.process_time() - cpu_start)
    shuffled = random.Random(0).sample(list(requests.values()), len(requests))  # noqa: S311 - an order, not a secret
    dealt = [shuffled[at : at + args.batch_size] for at in range(0, len(shuffled), args.batch_size)]
    agreed = {
        "the evaluator's batches": agreement(model, ways[args.batch_size], alone),
        "batches of every kind mixed": agreement(model, dealt, alone),
    }
    return agreed, wall[1] / wall[args.batch_size], cpu[1] / cpu[args.batch_size]


def main(args: Args) -> None:
    """Measure, print, write."""
    agreed, ratio, cpu_ratio = measure(args)
    rows: list[dict[str, Any]] = []
    for way, result in agreed.items():
        widest = max(result.gaps, default=0.0)
        print(f"{way}: {result.equal} of {args.items} equal, {len(result.gaps)} others, widest gap {widest:.1e}")
        row = {
            "name": f"answers equal to those given alone or tied with them (log-probability within {TIE:g}), {way}",
            "value": result.share,
        }
        rows.append(row | {"unit": "share", "better": "higher", "target": 1.0, "equal": result.equal, "gaps": list(result.gaps)})
    print(f"throughput, {args.batch_size} at once / one by one: {ratio:.2f} (CPU time: {cpu_ratio:.2f})")
    name = f"throughput of {args.batch_size} questions at once over one by one"
    rows.append({"name": name, "value": round(ratio, 3), "unit": "ratio", "better": "higher", "target": 1.0})
    rows[-1]["cpu_time_ratio"] = round(cpu_ratio, 3)
    write_results(args.out, rows, items=args.items, model=args.model.name)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
