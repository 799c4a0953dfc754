"""Let a chat model judge the answers of runs against those of a baseline: 1 to 10 for each of the two, and the ratio.

    python eval/judge.py --runs runs/static/eval runs/hyper/eval --endpoint http://localhost:8000/v1 --judge-model NAME --out runs/judged
    JUDGE_API_KEY=... python eval/judge.py --runs A B --endpoint https://host/v1 --judge-model NAME --out runs/judged \\
        --items-per-category 60 --price-in 2.5 --price-out 10 --cost-limit 5

Any OpenAI-compatible endpoint will do. It is sent questions, references and answers, with --with-images the pictures too. Every pair is
asked in both orders: two requests a sample and run. The key, where one is needed, is read from the environment variable JUDGE_API_KEY
and written nowhere. Killed, or stopped at the cost limit? Run the same command again (with a higher limit): verdicts are kept.

Verdicts are in OUT/judgements.jsonl, what judged and how in OUT/judge.json. They never enter the tables of eval/table.py.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from llava_collab.collab.endpoint import Client, EndpointError
from llava_collab.data.conversation import SampleError
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import choose
from llava_collab.evaluation.judge import JUDGEMENTS, OPEN_ENDED, Budget, JudgeError, Summary, judge, judge_identity, questions
from llava_collab.evaluation.judge_report import judge_table
from llava_collab.evaluation.lookup import read_measured
from llava_collab.evaluation.records import RecordError, read_lines
from llava_collab.evaluation.report import read_runs
from llava_collab.evaluation.suite import SuiteError


@dataclass(frozen=True)
class Args:
    """Judge evaluation folders (what eval/run.py wrote under --out) against the first of them."""

    runs: tuple[Path, ...]
    """Evaluation folders of one suite and split: the baseline, then one or more runs that are judged against it."""

    endpoint: str
    """Base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1."""

    judge_model: str
    """Name of the judging model, as the server knows it."""

    out: Path
    """Folder for judgements.jsonl and judge.json. A folder of the same judge, prompt, parameters and answers is gone on with."""

    suite: Path | None = None
    """Suite file that names the data (default: that of the runs' headers, from eval/suites)."""

    data_root: Path | None = None
    """Folder of the data, in place of the suite's own; the judge reads references and checklists from it."""

    categories: tuple[str, ...] = OPEN_ENDED
    """Only these categories; by default the open-ended ones, where rules measure least."""

    items_per_category: int | None = None
    """At most so many samples of each category, chosen by --seed (default: all)."""

    seed: int = 0
    """Chooses samples."""

    with_images: bool = False
    """Send the pictures too (as JPEG of at most 768 pixels a side), for a judge that can see."""

    price_in: float = 0.0
    """US dollars for a million prompt tokens."""

    price_out: float = 0.0
    """US dollars for a million generated tokens."""

    cost_limit: float | None = None
    """US dollars to spend on this folder in all; the program stops before it could go over, and says how many questions are left."""

    temperature: float = 0.0
    """Sampling temperature of the judge."""

    max_tokens: int = 512
    """Most tokens of a verdict with its explanation."""

    parallel: int = 4
    """Requests at once."""

    timeout: float = 120.0
    """Seconds without a byte from the server until a request is given up and tried again."""

    attempts: int = 5
    """Attempts a question, with growing waits between them, where the server is busy, broken or silent."""


def main(args: Args) -> Summary:
    """Judge and print. Raises RecordError, SuiteError, SampleError, JudgeError or FileNotFoundError with the cure."""
    if len(args.runs) < 2:
        raise RecordError("--runs takes a baseline and at least one other run")
    if min(args.parallel, args.attempts, args.max_tokens) < 1 or args.timeout <= 0:
        raise JudgeError("--parallel, --attempts and --max-tokens have to be 1 or more, --timeout above 0")
    client = Client(args.endpoint, args.judge_model, args.temperature, args.max_tokens, args.timeout, args.attempts)
    budget = Budget(args.price_in, args.price_out, args.cost_limit)
    baseline, *others = read_runs(args.runs)
    samples = read_measured([baseline, *others], Path(__file__).parent / "suites", args.suite, args.data_root)
    samples = choose([sample for sample in samples if sample.category in args.categories], args.items_per_category, args.seed)
    asked = questions(baseline, others, samples)
    summary = judge(
        asked,
        client,
        args.out,
        identity=judge_identity(client, baseline, others, asked, args.with_images),
        environment=environment(arguments={key: str(value) for key, value in asdict(args).items()}),
        budget=budget,
        with_images=args.with_images,
        parallel=args.parallel,
    )
    rows = read_lines(args.out / JUDGEMENTS)
    print(f"{args.out / JUDGEMENTS}: {summary}\n\n{judge_table(rows, baseline.label, [run.label for run in others]).markdown()}")
    answered = sorted({row["judge"] for row in rows if row["judge"]})
    if len(answered) > 1:
        print(f"\nwarning: the server answered under several model names, so this is not one judge: {', '.join(answered)}")
    return summary


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        result = main(arguments)
    except (RecordError, SuiteError, SampleError, JudgeError, EndpointError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if result.left:
        sys.exit(f"stopped before the cost limit with {result.left} questions left; raise --cost-limit and run the same command again")
    if result.errors:
        sys.exit(
            f"{result.errors} questions ended in an error (reasons in {arguments.out / JUDGEMENTS}); run the same command to ask them again"
        )
