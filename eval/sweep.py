"""Run one of the paper's tables (train/tables.yaml): train every row, evaluate it on CMT-open, print our rows beside the paper's.

    python eval/sweep.py main --base train/recipes/smol-instruct.yaml --seeds 0 1 2
    python eval/sweep.py peft --dry-run            the commands, one a line, and which of them are done

Killed? Run the same command again: what is finished is kept, what was cut off goes on, the rest follows. Rows that several tables share
are trained once. A job that fails is named, its log too; the others go on.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llava_collab.evaluation import report
from llava_collab.evaluation.records import RUN, RecordError, read_run
from llava_collab.evaluation.statistics import MACRO
from llava_collab.files import locked, write_text
from llava_collab.models.blueprint import BlueprintError
from llava_collab.training.estimate import count, student
from llava_collab.training.recipe import RecipeError
from llava_collab.training.recipe_file import load_recipe, refuse_other_recipe
from llava_collab.training.tables import PaperTable, TableRow, load_tables, trainings

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Args:
    """Train and evaluate the rows of one table, resumably."""

    table: tyro.conf.Positional[str]
    """main, projector, blocks, structure, peft, code-width, bottleneck; or ours: controls, codes."""

    base: Path = Path("train/recipes/smol-instruct.yaml")
    """Recipe that the rows are changes of. Its stage 1 is the recipe beside it that writes its model.init_from."""

    start: Path | None = None
    """Model folder that every row and seed starts from, in place of a stage 1 of its own."""

    rows: tuple[str, ...] = ()
    """Only these rows (default: all that can be run); the baseline is always among them."""

    seeds: tuple[int, ...] = (0,)
    """One training a row and seed, of both stages unless --start is given."""

    out: Path | None = None
    """Folder of the runs (default: runs/sweeps/NAME OF THE BASE, so that tables share rows)."""

    tables: Path = ROOT / "train" / "tables.yaml"
    """File of the tables."""

    suite: Path = Path("eval/suites/cmt-open.yaml")
    """What the models are measured on."""

    split: str = "test"
    """Split of the suite."""

    items_per_category: int | None = None
    """At most so many items of each category (default: all)."""

    data_root: Path | None = None
    """Folder of the suite's data, in place of its own."""

    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type the weights are loaded in for evaluation; by default that of the model's files."""

    batch_size: int = 8
    """Questions answered at once."""

    evaluate: bool = True
    """Evaluate, and print the table. Without, rows are only trained."""

    lanes: int = 1
    """Programs at once. Share the cores among them: OMP_NUM_THREADS=1 for two lanes on two cores."""

    dry_run: bool = False
    """Print the commands and stop."""


@dataclass(frozen=True)
class Job:
    """One program of the queue. `needs`: the job it starts from."""

    name: str
    command: tuple[str, ...]
    finished: Callable[[], bool]
    needs: str | None


@dataclass(frozen=True)
class Sweep:
    """A table on a base: its rows, its folder, its jobs in order."""

    table: PaperTable
    rows: tuple[TableRow, ...]
    out: Path
    jobs: dict[str, Job]

    def evaluation(self, row: TableRow, seed: int) -> Path:
        """Where a row's records are."""
        return self.out / row.name / f"seed-{seed}" / "eval"


def plan(args: Args) -> Sweep:
    """The queue of a table. Raises RecipeError or RecordError for unknown names, rows that can't be run, folders of other runs."""
    tables = load_tables(args.tables)
    if args.table not in tables:
        raise RecipeError(f"no table {args.table!r} in {args.tables}; there are {', '.join(tables)}")
    table = tables[args.table]
    if args.lanes < 1:
        raise RecipeError(f"--lanes must be at least 1, not {args.lanes}")
    names = [row.name for row in table.rows if row.runs_on(args.base)]
    if args.rows:
        asked = {table.row(name).name for name in args.rows} | {table.baseline}
        names = [row.name for row in table.rows if row.name in asked]
    sweep = Sweep(table, tuple(map(table.row, names)), args.out or Path("runs/sweeps") / args.base.stem, {})
    for seed in args.seeds:
        for row in sweep.rows:
            _add(sweep, args, row, seed)
    for job in sweep.jobs.values():
        job.finished()  # raises where a folder holds something else: before hours of work, not after
    return sweep


def _add(sweep: Sweep, args: Args, row: TableRow, seed: int) -> None:
    needs = None
    for training in trainings(row, args.base, sweep.out, seed, args.start):
        name = str(training.folder.relative_to(sweep.out))
        command = (sys.executable, str(ROOT / "train" / "train.py"), *training.command)
        refuse_other_recipe(training.folder, training.recipe)  # now, not when its turn comes
        sweep.jobs.setdefault(name, Job(name, command, (training.folder / "finished.json").is_file, needs))
        needs = name
    if not args.evaluate:
        return
    folder = sweep.evaluation(row, seed)
    wanted = {"model": str(folder.parent / "model"), "name": row.name, "suite": str(args.suite), "split": args.split, "out": str(folder)}
    wanted["dtype"] = args.dtype
    optional = {"items_per_category": args.items_per_category, "data_root": args.data_root}
    wanted |= {key: str(value) for key, value in optional.items() if value is not None}
    command = [sys.executable, str(ROOT / "eval" / "run.py")]
    command += [word for key, value in wanted.items() for word in (f"--{key.replace('_', '-')}", value)]
    command += ["--batch-size", str(args.batch_size)]
    if load_recipe(args.base).data.feature_cache:
        command.append("--feature-cache")
    wanted |= {key: "None" for key, value in optional.items() if value is None}
    name = str(folder.relative_to(sweep.out))
    sweep.jobs[name] = Job(name, tuple(command), lambda: _answered(folder, wanted), needs)


def _answered(folder: Path, wanted: dict[str, str]) -> bool:
    """Whether an evaluation is complete. Raises RecordError for one with other settings."""
    if not (folder / RUN).is_file():
        return False
    asked = read_run(folder)["environment"]["arguments"]
    changed = [f"{key}: {asked.get(key)} there, {value} now" for key, value in wanted.items() if asked.get(key) != value]
    if changed:
        raise RecordError(f"{folder} was evaluated with other settings ({'; '.join(changed)}); delete it, or give another --out")
    run = report.read_runs([folder])[0]
    return len(run.rows) == run.asked


def work(sweep: Sweep, lanes: int = 1) -> list[str]:
    """Run what is not finished, in order, at most `lanes` at once; returns the jobs that failed or whose starting point did."""
    failed: list[str] = []
    waiting = dict(enumerate(sweep.jobs.values(), start=1))
    running: dict[int, subprocess.Popen[bytes]] = {}
    with _alone(sweep.out) as lock:
        try:
            while waiting:
                for number, job in list(waiting.items()):
                    place = f"[{number}/{len(sweep.jobs)}] {job.name}"
                    log = sweep.out / "logs" / f"{job.name.replace('/', '.')}.log"
                    if number in running:
                        if (code := running[number].poll()) is None:
                            continue
                        del running[number]
                        if code or not job.finished():
                            tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                            print(f"{place}: failed (exit code {code})\n    {tail}", file=sys.stderr)
                            failed.append(job.name)
                    elif len(running) >= lanes or any(other.name == job.needs for other in waiting.values()):
                        continue
                    elif job.finished():
                        print(f"{place}: finished before", flush=True)
                    elif job.needs in failed:
                        print(f"{place}: left out, because {job.needs} failed", flush=True)
                        failed.append(job.name)
                    else:
                        print(f"{place}: running, see {log}", flush=True)
                        running[number] = _start(job.command, log, lock)
                        continue
                    del waiting[number]
                time.sleep(0.2 if running else 0)
        except BaseException as stop:
            for child in running.values():  # training saves when it is stopped; a Ctrl-C has reached it already, and twice means at once
                if not isinstance(stop, KeyboardInterrupt):
                    child.terminate()
            for child in running.values():
                child.wait()
            raise
    return failed


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """One sweep at a time in a folder. Programs that it starts inherit the lock, so one that outlives a killed sweep is not run twice."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(out / ".lock"))
        except BlockingIOError:
            raise RecipeError(f"a sweep, or a program that one left behind, is running in {out}: wait for it or stop it") from None
        yield lock


def _start(command: Sequence[str], log: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start a program whose output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, pass_fds=(lock,))


def tables_of(sweep: Sweep, seeds: Sequence[int]) -> tuple[str, list[report.Table]]:
    """Markdown of our rows beside the paper's, and our tables for CSV. Rows without a finished evaluation are dashes."""
    runs: dict[str, dict[int, report.Run]] = {}
    for row in sweep.rows:
        done = [seed for seed in seeds if sweep.jobs[str(sweep.evaluation(row, seed).relative_to(sweep.out))].finished()]
        runs[row.name] = dict(zip(done, report.read_runs([sweep.evaluation(row, seed) for seed in done]), strict=True))
    pools = {name: report.pooled(name, seeded) for name, seeded in runs.items() if seeded}
    first = pools.get(sweep.table.baseline)
    lines = []
    for row in sweep.table.rows:
        cells = _ours([*runs.get(row.name, {}).values()], pools.get(row.name), first)
        numbers = row.numbers or ("–",) * len(sweep.table.columns)
        lines.append([row.name, _trained(sweep, row, seeds), *cells, row.paper, *map(str, numbers)])
    header = ["row", "trained", "CMT-open", "seeds: range", f"difference from {sweep.table.baseline}", "in the paper", *sweep.table.columns]
    title = (
        f"{sweep.table.title}. Ours (macro-average, 95 % interval over items and seeds); the paper's: other data and bases, not comparable"
    )
    ours = [report.score_table(list(pools.values()))] if pools else []
    if first is not None and len(pools) > 1:
        ours.append(report.difference_table(first, [pool for name, pool in pools.items() if name != first.label]))
    parts = [report.Table(title, header, lines, []).markdown(), *(table.markdown() for table in ours), f"Of the table: {sweep.table.note}"]
    notes = [f"- {row.name}: {row.note}" for row in sweep.table.rows if row.note]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip() + "\n", ours


def _trained(sweep: Sweep, row: TableRow, seeds: Sequence[int]) -> str:
    """How many parameters learn, counted on the row's own recipe without weights."""
    recipes = [sweep.evaluation(row, seed).parent / "recipe.yaml" for seed in seeds]
    found = next((path for path in recipes if path.is_file()), None)
    if found is None:
        return "–"
    recipe = load_recipe(found)
    try:
        parts = count(student(recipe), recipe)
    except BlueprintError:  # what it starts from is no longer there
        return "–"
    return f"{sum(part.trainable for part in parts.values()):,}"


def _ours(seeded: Sequence[report.Run], pool: report.Run | None, first: report.Run | None) -> list[str]:
    """Score, spread over seeds, paired difference from the baseline."""
    if pool is None or not pool.ok:
        return ["–", "–", "–"]
    score = pool.intervals()[MACRO]
    means = [run.intervals()[MACRO].mean for run in seeded if run.ok]
    spread = f"{len(means)}: {min(means):.1f} to {max(means):.1f}"
    if first is None or pool is first:
        return [f"{score.mean:.1f} ± {score.half_width:.1f}", spread, "–"]
    gap = report.paired(first, pool)[MACRO]
    return [f"{score.mean:.1f} ± {score.half_width:.1f}", spread, f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"]


def main(args: Args) -> int:
    """Plan, run, print and write the table; 1 if a job failed."""
    sweep = plan(args)
    if args.dry_run:
        for job in sweep.jobs.values():
            print(shlex.join(job.command) + ("  # finished" if job.finished() else ""))
        return 0
    failed = work(sweep, args.lanes)
    if args.evaluate:
        text, ours = tables_of(sweep, args.seeds)
        print(f"\n{text}")
        write_text(sweep.out / "tables" / f"{sweep.table.name}.md", text)
        write_text(sweep.out / "tables" / f"{sweep.table.name}.csv", report.csv_text(ours))
    if failed:
        print(f"{len(failed)} of {len(sweep.jobs)} jobs did not finish; the same command tries again: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except (RecipeError, RecordError, BlueprintError) as error:
        sys.exit(f"error: {error}")
