"""Figures of one run, and tables over several: everything computed from `records.jsonl` each time, nothing from a stored summary."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_collab.evaluation.captions import meteor
from llava_collab.evaluation.records import RecordError, Row, differing, read_rows, read_run
from llava_collab.evaluation.statistics import MACRO, Interval, bootstrap

CATEGORIES = (
    "Visual QA",
    "Visual Captioning",
    "Spatial Inference",
    "Detailed Description",
    "Visual Storytelling",
    "Knowledge OCR",
    "Text-Rich Images QA",
)


@dataclass(frozen=True)
class Run:
    """A record folder: its label in tables, its header's identity, its rows."""

    label: str
    identity: Mapping[str, Any]
    rows: list[Row]

    @property
    def ok(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "ok"]

    @property
    def asked(self) -> int:
        return sum(self.identity["items"].values())

    @property
    def errors(self) -> int:
        return sum(row["status"] == "error" for row in self.rows)

    @property
    def headline(self) -> str:
        """`n=4990/5000, 10 errors`, and how many are still to come for a run that was cut off."""
        missing = self.asked - len(self.rows)
        return f"n={len(self.ok)}/{self.asked}, {self.errors} errors" + (f", {missing} not answered yet" if missing else "")

    def intervals(self) -> dict[str, Interval]:
        """Per category and macro; {} where nothing was scored. Error rows are in no mean."""
        scores = by_category(self.ok)
        return bootstrap({category: np.transpose([_by_seed(row) for row in rows]) for category, rows in scores.items()}) if scores else {}

    def cost(self) -> dict[str, float]:
        """Means an answered item: generated tokens, GFLOPs (2 x parameters x tokens, as `Usage` says), seconds of wall time."""
        ok = self.ok
        if not ok:
            return {}
        tokens, flops = (float(np.mean([row["usage"][name] for row in ok])) for name in ("generated_tokens", "flops"))
        return {"tokens/item": tokens, "GFLOPs/item": flops / 1e9, "s/item": float(np.mean([row["seconds"] for row in ok]))}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs with distinct labels: the model's name, with the folder where two share it. Raises RecordError."""
    runs = [(folder, read_run(folder)["identity"], read_rows(folder)) for folder in folders]
    names = [str(identity.get("model", folder)) for folder, identity, _ in runs]
    labels = [name if names.count(name) == 1 else f"{name} ({folder})" for name, (folder, _, _) in zip(names, runs, strict=True)]
    if len(set(labels)) < len(labels):
        raise RecordError("the same folder is named twice")
    return [Run(label, identity, rows) for label, (_, identity, rows) in zip(labels, runs, strict=True)]


def pooled(label: str, runs: Mapping[int, Run]) -> Run:
    """Runs of one model by seed, as one: a sample's score and cost are the means over them; each score stays in `seed_scores`.

    A sample that failed in any seed is an error. Figures beside the score are left out. Raises RecordError for runs that differ in
    more than the model's weights.
    """
    first, *others = runs.values()
    for other in others:
        if changed := differing(first.identity, other.identity).keys() - {"model_sha256", "model"}:
            raise RecordError(f"seeds of {label} were measured differently, in {', '.join(sorted(changed))}; evaluate them alike")
    by_id = {seed: {row["sample_id"]: row for row in run.rows} for seed, run in runs.items()}
    rows = []
    for row in first.rows:
        seeds = {seed: rows_of[row["sample_id"]] for seed, rows_of in by_id.items() if row["sample_id"] in rows_of}
        if len(seeds) == len(runs):
            bad = next((other for other in seeds.values() if other["status"] != "ok"), None)
            rows.append(bad or _mean_row(seeds))
    return Run(label, first.identity, rows)


def _mean_row(seeds: Mapping[int, Row]) -> Row:
    rows = list(seeds.values())
    usage = {name: float(np.mean([row["usage"].get(name, 0.0) for row in rows])) for name in rows[0]["usage"]}
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("score", "seconds")}
    return rows[0] | means | {"usage": usage, "scores": {}, "seed_scores": {seed: row["score"] for seed, row in seeds.items()}}


def pools(runs: Sequence[Run]) -> list[Run]:
    """Runs of one model name pooled, in the order in which names first come; the n-th of a name counts as its n-th seed."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[str(run.identity["model"])].append(run)
    return [pooled(name, dict(enumerate(seeds))) for name, seeds in groups.items()]


def _by_seed(row: Row, like: Row | None = None) -> list[float]:
    """A row's scores by seed; only those that a row `like` has too, or its one score for each of those where it is no pool."""
    own = row.get("seed_scores")
    wanted = (like or row).get("seed_scores")
    if own is None:
        return [row["score"]] * len(wanted or [0])
    return [own[seed] for seed in sorted(own) if wanted is None or seed in wanted]


def by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each category, the seven of CMT first and in their order."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    order = [*CATEGORIES, *sorted(set(groups) - set(CATEGORIES))]
    return {category: groups[category] for category in order if category in groups}


def beside(rows: Sequence[Row]) -> dict[str, float]:
    """Further figures of one category's scored rows: means of `scores`; balanced accuracy and yes-rate; corpus BLEU-4; METEOR."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row["scores"].items():
            if name not in ("said_yes", "is_yes"):
                values[name].append(value)
    figures = {name: float(np.mean(column)) for name, column in values.items()}
    figures |= yes_no([row for row in rows if "is_yes" in row["scores"]])
    captions = [row for row in rows if row["metric"] == "cider_d"]
    if captions:
        figures["bleu4"] = corpus_bleu(captions)
    told = [row for row in rows if row["metric"] in ("cider_d", "beats")]
    scored = meteor([row["output"] for row in told], [row["references"] for row in told])
    return figures | ({"meteor": scored[0]} if scored else {})


def yes_no(rows: Sequence[Row]) -> dict[str, float]:
    """Over the yes/no items: accuracy, balanced accuracy (mean of the recalls of yes and of no), yes-rate; {} without any."""
    if not rows:
        return {}
    recalls = [[row["score"] for row in rows if bool(row["scores"]["is_yes"]) is truth] for truth in (True, False)]
    figures = {"yes_no_accuracy": float(np.mean([row["score"] for row in rows]))}
    if all(recalls):
        figures["balanced_accuracy"] = float(np.mean([np.mean(recall) for recall in recalls]))
    return figures | {"yes_rate": float(np.mean([row["scores"]["said_yes"] for row in rows]))}


def corpus_bleu(rows: Sequence[Row]) -> float:
    """Corpus BLEU-4 by sacrebleu (13a tokens, lower case); items may have different numbers of references."""
    import sacrebleu

    most = max(len(row["references"]) for row in rows)
    streams: list[Any] = [[row["references"][i] if i < len(row["references"]) else None for row in rows] for i in range(most)]
    return sacrebleu.corpus_bleu([row["output"] for row in rows], streams, lowercase=True).score


def matched(first: Run, second: Run) -> list[tuple[Row, Row]]:
    """Rows (first's, second's) of the samples that both answered. Raises RecordError for no common sample or seed, or other metrics."""
    theirs = {row["sample_id"]: row for row in first.ok}
    common = [(theirs[row["sample_id"]], row) for row in second.ok if row["sample_id"] in theirs]
    if not common:
        raise RecordError(f"{first.label} and {second.label} have no answered sample in common")
    if not _by_seed(common[0][0], common[0][1]):
        raise RecordError(f"{first.label} and {second.label} have no seed in common")
    for a, b in common:
        if (a["metric"], a["references"]) != (b["metric"], b["references"]):
            raise RecordError(f"{first.label} and {second.label} score sample {a['sample_id']!r} differently; evaluate both again")
    return common


def differences(pairs: Sequence[tuple[Row, Row]]) -> NDArray[np.float64]:
    """Second minus first, [seeds, n]."""
    return np.transpose([np.subtract(_by_seed(b, a), _by_seed(a, b)) for a, b in pairs])


def paired(first: Run, second: Run) -> dict[str, Interval]:
    """Paired bootstrap of `second - first` over the samples that both answered, and over the seeds that both pools have.

    Raises RecordError for no common sample or seed, or other metrics.
    """
    groups: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for a, b in matched(first, second):
        groups[b["category"]].append((a, b))
    return bootstrap({category: differences(pairs) for category, pairs in groups.items()})


@dataclass(frozen=True)
class Table:
    """A titled table of text cells; the first column is names. `plain` are the same figures for CSV, in long form."""

    title: str
    header: list[str]
    lines: list[list[str]]
    plain: list[dict[str, Any]]

    def markdown(self) -> str:
        rows = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.lines]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)

    def latex(self) -> str:
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in (self.header, *self.lines)]
        columns = "l" + "r" * (len(self.header) - 1)
        body = "\n".join([rows[0], r"\midrule", *rows[1:]])
        return f"% {self.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def score_table(runs: Sequence[Run]) -> Table:
    """Scores with 95 % intervals (half widths in text, both ends in CSV), counts and cost, one line a run.

    The macro-average is given only where a run has every category of the table: means over different categories don't compare.
    """
    results = {run.label: run.intervals() for run in runs}
    present = by_category([row for run in runs for row in run.ok])
    names = [*present, MACRO]
    costs = ["tokens/item", "GFLOPs/item", "s/item"]
    lines, plain = [], []
    for run in runs:
        figures = results[run.label]
        shown = {name: figures[name] for name in names if name in figures and (name != MACRO or set(figures) == set(names))}
        cost = run.cost()
        cells = [f"{shown[name].mean:.1f} ± {shown[name].half_width:.1f}" if name in shown else "–" for name in names]
        lines.append([run.label, *cells, f"{len(run.ok)}/{run.asked}", str(run.errors), *(_short(cost.get(name)) for name in costs)])
        plain += [_csv(run.label, name, "score", value) for name, value in shown.items()]
        plain += [{"model": run.label, "category": MACRO, "figure": name, "value": value} for name, value in cost.items()]
        plain.append({"model": run.label, "category": MACRO, "figure": "errors", "value": run.errors, "n": run.asked})
    return Table("Scores (0 to 100, ± half of the 95 % bootstrap interval)", ["model", *names, "n", "errors", *costs], lines, plain)


def beside_table(runs: Sequence[Run]) -> Table:
    """The further figures of every category, one line a figure, one column a run."""
    figures = {run.label: {category: beside(rows) for category, rows in by_category(run.ok).items()} for run in runs}
    order = by_category([row for run in runs for row in run.ok])
    keys = [(category, name) for category in order for name in sorted({name for f in figures.values() for name in f.get(category, {})})]
    lines = [[f"{category}: {name}", *(_short(figures[run.label].get(category, {}).get(name)) for run in runs)] for category, name in keys]
    plain = [
        {"model": run.label, "category": category, "figure": name, "value": figures[run.label][category][name]}
        for run in runs
        for category, name in keys
        if name in figures[run.label].get(category, {})
    ]
    return Table("Beside the scores", ["figure", *(run.label for run in runs)], lines, plain)


def difference_table(baseline: Run, others: Sequence[Run]) -> Table:
    """Paired differences of each run from the baseline; an interval without 0 is marked `*`."""
    results = {run.label: paired(baseline, run) for run in others}
    names = [*by_category([row for run in others for row in run.ok if row["category"] in results[run.label]]), MACRO]
    lines, plain = [], []
    for label, figures in results.items():
        cells = [_difference(figures.get(name)) for name in names]
        lines.append([label, *cells, str(figures[MACRO].n), f"{figures[MACRO].detectable:.1f}"])
        for name, value in figures.items():
            plain.append(_csv(label, name, f"difference from {baseline.label}", value))
            plain.append({"model": label, "category": name, "figure": "detectable difference", "value": value.detectable})
    title = f"Paired differences from {baseline.label} [95 % interval] over common samples; * where the interval excludes 0"
    return Table(title, ["model", *names, "n", "detectable (Macro)"], lines, plain)


def settings_that_differ(baseline: Run, other: Run) -> list[str]:
    """Fields of the two headers that differ, as readable lines: what else, beside the model, could explain a difference."""
    return [f"{name}: {a!r} / {b!r}" for name, (a, b) in differing(baseline.identity, other.identity).items()]


def csv_text(tables: Sequence[Table]) -> str:
    """All figures of the tables in long form, at full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "category", "figure", "value", "low", "high", "n"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for table in tables for row in table.plain)
    return text.getvalue()


def _csv(label: str, category: str, figure: str, value: Interval) -> dict[str, Any]:
    return {"model": label, "category": category, "figure": figure, "value": value.mean, "low": value.low, "high": value.high, "n": value.n}


def _difference(value: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]" + ("*" if value.low > 0 or value.high < 0 else "")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _tex(cell: str) -> str:
    for plain, tex in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("±", r"$\pm$"), ("–", "--")):
        cell = cell.replace(plain, tex)
    return cell
