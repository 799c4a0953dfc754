"""The public benchmarks of LLaVA-1.5 and HyperLLaVA, run by lmms-eval, beside the numbers that the paper prints.

    python eval/public.py run --model runs/x/model --out runs/x/public --dry-run     the commands, one a benchmark
    python eval/public.py run --model runs/x/model --out runs/x/public --gpus 8      run those that have no results yet
    python eval/public.py table runs/x/public                                        what they gave, beside the paper

scripts/eval_all.sh does both, and CMT-open before. lmms-eval fetches the data sets from the hub at their first use; benchmarks with a judge
want its key (see lmms-eval). lmms-eval: an environment as scripts/lmms_eval_check.sh makes, or pip install lmms-eval==0.7.3.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from tyro.conf import subcommand

from llava_collab.evaluation.report import Table
from llava_collab.evaluation.suite import SuiteError
from llava_collab.files import keyed, read_json, write_text

SUITE = Path(__file__).resolve().parent / "suites" / "llava_1_5.yaml"
_KEYS = {"task", "metric", "scale", "prompt", "settings", "paper", "differs"}


@dataclass(frozen=True)
class Benchmark:
    """One row of the suite; its words are explained at the top of the suite's file."""

    name: str
    task: str
    metric: str
    paper: tuple[float | None, ...]
    prompt: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scale: float = 100.0
    differs: str = ""

    @property
    def own_task(self) -> str:
        """Name of the variant of lmms-eval's task that asks as LLaVA does."""
        return "llava_1_5_" + self.name.replace("+", "_")

    def task_file(self, original: str) -> dict[str, Any]:
        """That variant as YAML; `original` is the path of lmms-eval's file."""
        made: dict[str, Any] = {"include": original, "task": self.own_task}
        if self.prompt is not None:
            made["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": self.prompt, **self.settings}}
        return made


def load_benchmarks(path: Path = SUITE) -> tuple[list[str], list[Benchmark]]:
    """Columns of the paper's table, and the benchmarks. Raises SuiteError."""
    raw = keyed(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), {"name", "columns", "benchmarks"}, SuiteError)
    benchmarks = []
    for name, spec in raw["benchmarks"].items():
        spec = keyed(spec, f"{path}, {name}", _KEYS, SuiteError)
        fields: dict[str, Any] = {**spec, "paper": tuple(spec["paper"])}
        benchmarks.append(Benchmark(name, **fields))
        if len(benchmarks[-1].paper) != len(raw["columns"]):
            raise SuiteError(f"{path}, {name}: `paper` has {len(spec['paper'])} numbers for {len(raw['columns'])} columns")
    return list(raw["columns"]), benchmarks


@dataclass(frozen=True)
class Run:
    """Ask the benchmarks that have no results of this model under --out yet, one lmms-eval process (group) each."""

    model: str
    """Model folder."""
    out: Path
    """Folder of the results, one below it for each benchmark."""
    gpus: int = 1
    """Processes, a GPU each."""
    batch_size: int = 16
    """Questions at once on each GPU."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights; `stored`: that of the model's files."""
    benchmarks: tuple[str, ...] = ()
    """Only these (default: all of the suite)."""
    limit: int | None = None
    """Only so many items of each; such results are marked as not comparable, and a run without it asks anew."""
    dry_run: bool = False
    """Print the commands and run nothing."""

    def run(self) -> int:
        known = load_benchmarks()[1]
        if unknown := set(self.benchmarks) - {b.name for b in known}:
            raise SuiteError(f"no benchmark {sorted(unknown)}; there are {', '.join(b.name for b in known)}")
        failed = []
        for benchmark in [b for b in known if not self.benchmarks or b.name in self.benchmarks]:
            if self._measured(benchmark):
                print(f"# {benchmark.name}: has results in {self.out / benchmark.name}", flush=True)
                continue
            command = self._command(benchmark)
            print(shlex.join(command), flush=True)
            if not self.dry_run:
                self._write_task(benchmark)
                if subprocess.run(command, check=False).returncode:
                    failed.append(benchmark.name)
        if failed:
            print(
                f"error: {', '.join(failed)} failed; their output is above. Run again: only what has no results is asked", file=sys.stderr
            )
        return 1 if failed else 0

    @property
    def _model_args(self) -> str:
        return f"pretrained={self.model},dtype={self.dtype}"

    def _measured(self, benchmark: Benchmark) -> bool:
        """Whether there are results of this model on all items, or on so many as --limit says. Raises SuiteError for another model's."""
        found = results_of(self.out, benchmark)
        if found is None:
            return False
        path, results = found
        config = results.get("config", {})
        if (there := config.get("model_args")) != self._model_args:
            raise SuiteError(f"{path}: is of {there}, this run is of {self._model_args}; choose another --out, or remove this file")
        return config.get("limit") in (None, self.limit)

    def _command(self, benchmark: Benchmark) -> list[str]:
        # By this Python: the programs of the PATH may be another environment's.
        several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus), "-m"] if self.gpus > 1 else []
        command = [sys.executable, "-m", *several, "lmms_eval", "--model", "llava_collab", "--model_args", self._model_args]
        command += ["--tasks", benchmark.own_task, "--include_path", str(self.out / "tasks"), "--batch_size", str(self.batch_size)]
        command += ["--log_samples", "--output_path", str(self.out / benchmark.name)]
        return [*command, *(["--limit", str(self.limit)] if self.limit is not None else [])]

    def _write_task(self, benchmark: Benchmark) -> None:
        """The variant under `out/tasks`. Raises SuiteError where lmms-eval, or its task, is not there."""
        package = importlib.util.find_spec("lmms_eval")
        if package is None or package.origin is None:
            raise SuiteError(
                "lmms-eval is not installed here: pip install lmms-eval==0.7.3 (or use scripts/lmms_eval_check.sh's environment)"
            )
        tasks = Path(package.origin).parent / "tasks"
        originals = [p for p in tasks.rglob("*.yaml") if f"\ntask: {benchmark.task}\n" in "\n" + p.read_text("utf-8").replace('"', "")]
        if len(originals) != 1:
            raise SuiteError(
                f"{benchmark.name}: {tasks} has {len(originals)} tasks named {benchmark.task!r}; the suite is for lmms-eval 0.7.3"
            )
        text = yaml.safe_dump(benchmark.task_file(str(originals[0])), allow_unicode=True)
        write_text(self.out / "tasks" / f"{benchmark.own_task}.yaml", text)


def results_of(out: Path, benchmark: Benchmark) -> tuple[Path, dict[str, Any]] | None:
    """lmms-eval's newest results file of a benchmark and what it holds, or None. Raises SuiteError for a file without the score."""
    files = sorted((out / benchmark.name).rglob("*_results.json"), key=lambda path: path.name)
    if not files:
        return None
    results = read_json(files[-1])
    task = results.get("results", {}).get(benchmark.own_task, {})
    if f"{benchmark.metric},none" not in task:
        raise SuiteError(f"{files[-1]}: has no {benchmark.metric!r} of task {benchmark.own_task!r}; remove this file and run again")
    score = task[f"{benchmark.metric},none"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise SuiteError(
            f"{files[-1]}: {benchmark.metric!r} is {score!r}, no number; where a judge scores, lmms-eval wants its key in OPENAI_API_KEY "
            f"(AZURE_API_KEY with API_TYPE=azure). Set it, remove this file and run again"
        )
    return files[-1], results


def reasons(benchmark: Benchmark, results: dict[str, Any]) -> list[str]:
    """Why this score can't stand beside the paper's: the suite's `differs`, items left out, another prompt."""
    found = [benchmark.differs] if benchmark.differs else []
    samples = results["n-samples"][benchmark.own_task]
    if samples["effective"] != samples["original"]:
        found.append(f"only {samples['effective']} of {samples['original']} items")
    used = (results["configs"][benchmark.own_task].get("lmms_eval_specific_kwargs") or {}).get("default", {})
    wanted = benchmark.task_file("").get("lmms_eval_specific_kwargs", {}).get("default", {})
    if used != wanted:
        found.append(f"asked with {used}, the suite says {wanted}")
    return found


@dataclass(frozen=True)
class Show:
    """Print one or more models' scores beside the paper's numbers."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """What `run` was given as --out."""

    def run(self) -> int:
        print(table(list(self.runs)))
        return 0


def table(runs: list[Path]) -> str:
    """Markdown: a line a benchmark, a column a run and a column of the paper each; `*` marks what is not comparable, with reasons below."""
    columns, benchmarks = load_benchmarks()
    lines, notes = [], []
    for benchmark in benchmarks:
        cells, why = [], []
        for out in runs:
            found = results_of(out, benchmark)
            if found is None:
                cells.append("–")
                continue
            results = found[1]
            why += [reason for reason in reasons(benchmark, results) if reason not in why]
            score = results["results"][benchmark.own_task][f"{benchmark.metric},none"] * benchmark.scale
            cells.append(f"{score:.1f}" + "*" * bool(reasons(benchmark, results)))
        lines.append([benchmark.name, *cells, *("–" if value is None else f"{value:.1f}" for value in benchmark.paper)])
        notes += [f"- {benchmark.name}: {'; '.join(why)}"] * bool(why)
    header = ["benchmark", *map(str, runs), *(f"{column} (paper)" for column in columns)]
    body = Table("Public benchmarks by lmms-eval, and as printed in HyperLLaVA's Table 1", header, lines, []).markdown()
    return "\n\n".join([body, *(["\\* not comparable with the paper's number:\n\n" + "\n".join(notes)] if notes else [])])


Command = Annotated[Run, subcommand("run")] | Annotated[Show, subcommand("table")]

if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Command, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)).run())
    except SuiteError as error:
        sys.exit(f"error: {error}")
