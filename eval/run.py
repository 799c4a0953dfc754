"""Evaluate one model on one suite: writes records.jsonl (every prompt, output and score) and run.json, prints the scores.

    python eval/run.py --model runs/hyper --suite eval/suites/cmt-open.yaml --items-per-category 50 --out runs/hyper/eval
    python eval/run.py --model majority --suite eval/suites/cmt-open.yaml --out runs/majority/eval
    torchrun --nproc-per-node 8 eval/run.py --model ...     a process a GPU, the same records

Killed? Run the same command again, on any number of processes: answered samples are kept, the rest is asked. Exit status: 0; 1 for an
error, or where more than --max-error-rate of the samples have no answer. Tables over several runs: eval/table.py.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from llava_collab.collab.single import Single
from llava_collab.evaluation import report
from llava_collab.evaluation.baselines import BASELINES
from llava_collab.evaluation.controls import blind, permute_images
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import Summary, choose, evaluate
from llava_collab.evaluation.metrics import Scorer
from llava_collab.evaluation.ranks import Ranks, joined
from llava_collab.evaluation.records import RecordError
from llava_collab.evaluation.suite import SuiteError, load_suite
from llava_collab.files import model_sha256
from llava_collab.types import Model

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


@dataclass(frozen=True)
class Args:
    """Evaluate a model on a suite, resumably, one record a sample."""

    model: str
    """A model folder (config.json + *.safetensors), or a baseline: `majority` (most frequent training answer of each family), `blind` (the
    best guesser that sees the question only), `ocr` or `detector` (rules on what OCR reads, or EfficientNet sees, else a guess), `oracle`
    (rules that know what was drawn)."""

    suite: Path
    """What is measured and how: eval/suites/cmt-open.yaml, cmt-public.yaml, real.yaml or cme-open.yaml, texts alone (llava_1_5.yaml is for
    eval/public.py)."""

    out: Path
    """Folder for records.jsonl and run.json. A folder of the same run is gone on with; one of another run is refused."""

    split: str = "test"
    """Split of the suite."""

    items_per_category: int | None = None
    """At most so many items of each category, chosen by --seed (default: all)."""

    categories: tuple[str, ...] = ()
    """Only these categories, e.g. --categories "Visual QA" "Spatial Inference" (default: all)."""

    data_root: Path | None = None
    """Folder of the data, in place of the suite's own."""

    name: str | None = None
    """Label in tables (default: the model as given, with +blind or +permuted for the controls)."""

    blind: bool = False
    """Control: ask without images and image marks."""

    permute_images: bool = False
    """Control: give every question the image of another sample that asks the same question."""

    feature_cache: bool = False
    """Keep vision tower outputs in the local cache (training's, computed in bf16), so that the next run with this tower skips it."""

    batch_size: int = 8
    """Questions answered at once, by each process; halved by itself for a batch that does not fit into memory."""

    device: str = "auto"
    """auto (a GPU if there is one, one for each process), cpu, cuda or cuda:N."""

    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type the weights are loaded in; by default that of the model's files."""

    seed: int = 0
    """Chooses items and permutes images."""

    temperature: float = 0.0
    """Draw answers at this temperature, as routers learn from (train/router.py); 0: greedy answers, as every table has them."""

    draw: int = 0
    """Which draw, with --temperature."""

    max_error_rate: float = 0.01
    """Exit with status 1 if more than this share of samples ended in an error."""


def main(args: Args, ranks: Ranks | None = None) -> Summary:
    """Evaluate and print. Raises RecordError, SuiteError, ValueError or FileNotFoundError with the cure."""
    ranks = ranks or Ranks()
    if args.temperature and args.model in BASELINES:
        raise ValueError(f"--temperature: {args.model} draws nothing; its answers are the same each time")
    if args.blind and args.permute_images:
        raise ValueError("--blind and --permute-images are two controls: run them one at a time, with a folder each")
    suite = load_suite(args.suite)
    everything = suite.read(args.split, args.data_root)
    train = suite.read("train", args.data_root)
    scorer = suite.scorer(train, everything)
    # Permuted before items are chosen: a donor may be any sample of the split, and rare questions find one.
    samples = permute_images(everything, args.seed) if args.permute_images else everything
    if unknown := set(args.categories) - {sample.category for sample in samples}:
        raise SuiteError(f"{args.suite}, split {args.split}: no such category {sorted(unknown)}")
    samples = [sample for sample in samples if not args.categories or sample.category in args.categories]
    samples = choose(samples, args.items_per_category, args.seed)
    samples = blind(samples) if args.blind else samples
    name = args.name or args.model + "+blind" * args.blind + "+permuted" * args.permute_images
    model, about_model = _model(args, name, train, samples, scorer, ranks)
    decoding = f"temperature {args.temperature:g}, draw {args.draw}" if args.temperature else "greedy"
    about_run = {"suite": suite.name, "seed": args.seed, "blind": args.blind, "permute_images": args.permute_images}
    summary = evaluate(
        model,
        samples,
        args.out,
        scorer=scorer,
        max_new_tokens=suite.max_new_tokens,
        batch_size=args.batch_size,
        split=args.split,
        identity=about_run | {"decoding": decoding} | about_model,
        environment=environment(arguments={key: str(value) for key, value in asdict(args).items()}, processes=ranks.count),
        ranks=ranks,
    )
    if ranks.first:
        runs = report.read_runs([args.out])
        print("\n\n".join([f"{name}: {runs[0].headline}", report.score_table(runs).markdown(), report.beside_table(runs).markdown()]))
    return summary


def _model(args: Args, name: str, train: list[Sample], samples: list[Sample], scorer: Scorer, ranks: Ranks) -> tuple[Model, dict[str, Any]]:
    """The model and what identifies it: hash of its folder, of its chat template, its number type."""
    if args.model in BASELINES:
        return BASELINES[args.model](train, samples, scorer, name), {"model_sha256": None, "prompt_template_sha256": None, "dtype": None}
    folder = Path(args.model)
    # Cached features are bf16, which can move an answer.
    identity = {"model_sha256": model_sha256(folder), "dtype": args.dtype, "cached_features": args.feature_cache}

    import torch

    from llava_collab.models.build import feature_cache, load, pick_device

    network: Any
    network, processor = load(str(folder), dtype=None if args.dtype == "stored" else getattr(torch, args.dtype))
    network.to(pick_device(args.device))
    if args.feature_cache:
        images = ranks.share([image for sample in samples for image in sample.images])
        processor.feature_cache = feature_cache(network, processor, images, args.batch_size)
        ranks.wait()  # a rank's questions are not about the pictures of its share
    identity["prompt_template_sha256"] = hashlib.sha256(str(processor.chat_template).encode()).hexdigest()
    return Single(network, processor, name, temperature=args.temperature, draw=args.draw), identity


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        with joined(cpu=arguments.device == "cpu") as those:
            result = main(arguments, those)
    except (RecordError, SuiteError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if those.first and result.error_rate > arguments.max_error_rate:
        sys.exit(f"error: {result}, more than {arguments.max_error_rate:.1%}; the reasons are in {arguments.out}/records.jsonl")
