"""Systems of models on one plane: quality, cost and latency of every composite and its parts, from records of the same requests.

    RUN/seed-S/systems/NAME/records.jsonl    one row a test request: answer, score, bill, who was asked, the gate's confidence, the parts
    RUN/seed-S/systems/NAME/system.json      what the system is, and the threshold that was chosen for it
    RUN/seed-S/systems/NAME/curve.json       of a shunt or route: confidence and both scores of every request, which its curve is made of
    RUN/seed-S/systems/NAME/latency.json     seconds of requests that came one by one, if that was measured

Every figure is computed from these files. Scores are in [0, 100], as in all record files.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llava_collab.collab.asking import ask
from llava_collab.collab.builder import Builder, both_ways
from llava_collab.collab.compose import Route, Shunt
from llava_collab.collab.recipe import CollabError, Task, file_name, gate_of
from llava_collab.data.chance import unit_interval
from llava_collab.data.samples import Sample
from llava_collab.evaluation import curves
from llava_collab.evaluation.evaluator import prompt_text, trace
from llava_collab.evaluation.records import RECORDS, Row, read_rows, write_rows
from llava_collab.evaluation.report import Table
from llava_collab.evaluation.statistics import MACRO, Interval, bootstrap, draws
from llava_collab.files import read_json, write_json
from llava_collab.types import Answer, Request

SYSTEM, CURVE, LATENCY = "system.json", "curve.json", "latency.json"
Floats = NDArray[np.float64]
_log = logging.getLogger(__name__)


def measure(builder: Builder, task: Task, names: Sequence[str], folder: Path, samples: Mapping[str, Sample]) -> None:
    """Ask the named models and systems every test request, and write their records."""
    for name in names:
        model = builder.model(name)
        answers = ask(model, task.test, task.verb)
        out = folder / "systems" / file_name(name)
        for stale in (CURVE, LATENCY):
            (out / stale).unlink(missing_ok=True)
        write_rows(out, [_row(task, request, answer, samples) for request, answer in zip(task.test, answers, strict=True)])
        threshold = builder.thresholds.get(name)
        spec = builder.recipe.systems.get(name) or builder.recipe.models[name]
        about = {"name": name, "spec": spec, "identity": builder.identity(name), "task": task.name, **_large(builder, name)}
        write_json(out / SYSTEM, about | {"threshold": asdict(threshold) if threshold else None})
        if isinstance(model, Shunt | Route):
            confidence_M, small_M, large_M = both_ways(model, task, task.test)
            finite = [float(value) if np.isfinite(value) else None for value in confidence_M]
            columns = {"sample_id": [request.id for request in task.test], "confidence": finite}
            write_json(out / CURVE, columns | {"small": small_M.tolist(), "large": large_M.tolist(), "threshold": model.threshold})


def _large(builder: Builder, name: str) -> dict[str, Any]:
    """Of a shunt or route: the model at the end of its chain of large ones, and whether there are several links (`nested`)."""
    systems, steps = builder.recipe.systems, 0
    while name in systems and (settings := next(iter(systems[name].values()))).get("large"):
        name, steps = settings["large"], steps + 1
    return {"large": name, "nested": steps > 1} if steps else {}


def measure_latency(builder: Builder, task: Task, names: Sequence[str], folder: Path, count: int) -> None:
    """Ask each system `count` test requests one by one, and write what each took. `builder` keeps no answers and has no task: what it needs
    was found before. Systems that can't be without the data (an oracle) are left out."""
    requests = sorted(task.test, key=lambda request: unit_interval(f"latency|{request.id}"))[: count + 1]
    for name in names:
        try:
            model = builder.model(name)
        except ValueError as error:
            _log.warning("%s: no latency (%s)", name, error)
            continue
        seconds = []
        for request in tqdm(requests, desc=f"{name}, one by one", unit="item"):
            start = time.perf_counter()
            answer = ask(model, [request], task.verb)[0]
            if answer.error is None:
                seconds.append(time.perf_counter() - start)
            else:
                _log.warning("%s: %s is left out of the latency (%s)", name, request.id, answer.error)
        write_json(folder / "systems" / file_name(name) / LATENCY, {"seconds": seconds[1:]})  # the first one warms caches


def _row(task: Task, request: Request, answer: Answer, samples: Mapping[str, Sample]) -> Row:
    sample = samples.get(request.id)
    about = {"category": sample.category, "family": sample.family} if sample else {"category": "all", "family": ""}
    right = list(sample.answers) if sample else [task.right[request.id]] if request.id in task.right else []
    return {
        "sample_id": request.id, **about, "prompt": prompt_text(request)[:400], "output": answer.text, "references": right,
        "score": None if answer.error is not None else round(100 * task.quality(request.id, answer), 4),
        "status": "ok" if answer.error is None else "error", "error": answer.error, "usage": asdict(answer.usage), "model": answer.model,
        **trace(answer),
    }  # fmt: skip


@dataclass(frozen=True)
class System:
    """A system's records over several seeds of one task."""

    name: str
    seeds: Sequence[Sequence[Row]]
    about: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, Any]]
    one_by_one: Sequence[float] = ()
    """Seconds of requests that came one by one, all seeds; empty: not measured."""

    @cached_property
    def scores(self) -> dict[str, Floats]:
        """By category, [seeds, items]; a failed answer's score is 0."""
        groups: dict[str, list[list[float]]] = defaultdict(list)
        for rows in self.seeds:
            own: dict[str, list[float]] = defaultdict(list)
            for row in rows:
                own[row["category"]].append(row["score"] or 0.0)
            for category, values in own.items():
                groups[category].append(values)
        return {category: np.array(values) for category, values in groups.items()}

    @property
    def flat(self) -> Floats:
        """[seeds, items]"""
        return np.concatenate(list(self.scores.values()), axis=1)

    def quality(self) -> Interval:
        """Macro over categories, with its interval over items and seeds."""
        return bootstrap(self.scores)[MACRO]

    def minus(self, other: System) -> Interval:
        """The paired difference."""
        return bootstrap({category: values - other.scores[category] for category, values in self.scores.items()})[MACRO]

    def mean(self, field: str) -> float:
        """Mean of a field of the bill, a request."""
        return float(np.mean([row["usage"][field] for rows in self.seeds for row in rows]))

    def latency(self, percentile: float) -> float:
        """Seconds a request, this percentile of all: of those that came one by one, or else of what batches took, divided."""
        seconds = self.one_by_one or [row["usage"]["seconds"] for rows in self.seeds for row in rows]
        return float(np.percentile(seconds, percentile))

    def asked(self) -> dict[str, float]:
        """Share of the requests on which each model was called."""
        counts = Counter(name for rows in self.seeds for row in rows for name in dict.fromkeys(row.get("by") or [row["model"]]))
        total = sum(len(rows) for rows in self.seeds)
        return {name: count / total for name, count in counts.most_common()}

    def share_large(self) -> float | None:
        """Share of the requests on which a shunt's or route's large model was called (of a chain, the last one); None of other systems."""
        return self.asked().get(self.about[0]["large"], 0.0) if self.about[0].get("large") else None

    def curve(self) -> curves.Curve | None:
        """The curve over all thresholds, all seeds' requests together; None of other systems, and of chains, which have several."""
        if not self.curves or self.about[0].get("nested"):
            return None
        columns = {
            key: np.array([[-np.inf if value is None else value for value in stored[key]] for stored in self.curves])
            for key in ("confidence", "small", "large")
        }
        return curves.curve(columns["confidence"].ravel(), 100 * columns["small"].ravel(), 100 * columns["large"].ravel())

    def gate(self) -> tuple[float | None, float | None]:
        """AUROC of "the small model's answer is no worse than the large one's", which every gate is to tell; and, of a gate that is the
        small model's largest probability, its calibration error against "the small model is right" (a score of one half or more)."""
        confidence = np.concatenate([[-np.inf if c is None else c for c in stored["confidence"]] for stored in self.curves])
        small, large = (np.concatenate([stored[key] for stored in self.curves]) for key in ("small", "large"))
        area = curves.auroc(confidence, (small >= large).astype(float))
        if gate_of(self.name, next(iter(self.about[0]["spec"].values())))["kind"] != "max":
            return area, None
        return area, curves.calibration_error(np.clip(confidence, 0, 1), (small >= 0.5).astype(float))


def read_systems(run: Path, names: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[System]:
    """The systems in a run's folders, of these seeds (default: all), in the order of `names`.

    Raises CollabError for none, and for systems that were measured on unequal requests or by unequal recipes.
    """
    folders = sorted(run.glob("seed-*")) if seeds is None else [run / f"seed-{seed}" for seed in seeds]
    found: dict[str, list[tuple[list[Row], Mapping[str, Any], Mapping[str, Any] | None]]] = defaultdict(list)
    one_by_one: dict[str, list[float]] = defaultdict(list)
    for seed in folders:
        for path in sorted((seed / "systems").glob(f"*/{RECORDS}*"), key=lambda path: path.parent.name):
            folder = path.parent
            about = read_json(folder / SYSTEM)
            curve = read_json(folder / CURVE) if (folder / CURVE).is_file() else None
            found[about["name"]].append((read_rows(folder), about, curve))
            if (folder / LATENCY).is_file():
                one_by_one[about["name"]] += read_json(folder / LATENCY)["seconds"]
    wanted = [name for name in (names or found) if name in found]
    if not wanted:
        raise CollabError(f"{run}: no measured systems in seed-*/systems; run eval/system.py first")
    systems = [
        System(n, [f[0] for f in found[n]], [f[1] for f in found[n]], [f[2] for f in found[n] if f[2]], one_by_one[n]) for n in wanted
    ]
    ids = {tuple(row["sample_id"] for row in rows) for system in systems for rows in system.seeds}
    if len(ids) > 1 or len({len(system.seeds) for system in systems}) > 1:
        raise CollabError(f"{run}: systems were measured on different requests or seeds; run eval/system.py again")
    for system in systems:
        if len({json.dumps(about["spec"], sort_keys=True) for about in system.about}) > 1:
            raise CollabError(f"{run}: {system.name!r} was measured by different recipes; run eval/system.py again for all seeds")
    return systems


def system_table(systems: Sequence[System], pair: tuple[str, str] | None) -> Table:
    """One row a system. `pair`: the small and the large model that PGR and the difference are measured against."""
    by_name = {system.name: system for system in systems}
    small, large = (by_name.get(name) for name in pair) if pair else (None, None)
    plain: list[dict[str, Any]] = []
    for system in systems:
        figures: dict[str, float | Interval | None] = {"quality": system.quality(), "large calls": system.share_large()}
        if large is not None and system is not large:
            figures["minus large"] = system.minus(large)
        if small is not None and large is not None and system not in (small, large):
            figures["PGR"] = curves.pgr(system.flat, small.flat, large.flat)
        figures |= {"GFLOPs": system.mean("flops") / 1e9, "price": system.mean("price")}
        if system.one_by_one or not any(other.one_by_one for other in systems):
            figures |= {"ms p50": 1e3 * system.latency(50), "ms p95": 1e3 * system.latency(95)}
        if (curve := system.curve()) is not None:
            ends = [float(other.flat.mean()) if other else None for other in (small, large)]
            figures |= {"APGR": curve.apgr(*ends), "CPT 50": curve.cpt(0.5, *ends), "CPT 80": curve.cpt(0.8, *ends)}
            figures["AUROC"], figures["ECE"] = system.gate()
        plain += [_figure(system.name, name, value) for name, value in figures.items() if value is not None]
    cells = {(row["model"], row["figure"]): row for row in plain}
    header = [name for name in _COLUMNS if any((system.name, name) in cells for system in systems)]
    lines = [[system.name, *(_cell(name, cells.get((system.name, name))) for name in header)] for system in systems]
    return Table("Systems (quality 0 to 100; 95 % bootstrap intervals over requests and seeds)", ["System", *header], lines, plain)


_COLUMNS: Mapping[str, str] = {
    "quality": "{:.2f}", "minus large": "{:+.2f}", "large calls": "{:.1%}", "GFLOPs": "{:.3g}", "price": "{:.3g}",
    "ms p50": "{:.3g}", "ms p95": "{:.3g}", "PGR": "{:.2f}", "APGR": "{:.3f}", "CPT 50": "{:.1%}", "CPT 80": "{:.1%}",
    "AUROC": "{:.3f}", "ECE": "{:.3f}",
}  # fmt: skip


def _figure(system: str, name: str, value: float | Interval) -> dict[str, Any]:
    about = {"model": system, "category": MACRO, "figure": name}
    if not isinstance(value, Interval):
        return about | {"value": value}
    return about | {"value": value.mean, "low": value.low, "high": value.high, "n": value.n}


def _cell(name: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    ends = f" [{_COLUMNS[name].format(row['low'])}, {_COLUMNS[name].format(row['high'])}]" if "low" in row else ""
    return _COLUMNS[name].format(row["value"]) + ends


def asked_table(systems: Sequence[System]) -> Table:
    """Who was called, in shares of the requests."""
    asked = {system.name: system.asked() for system in systems}
    lines = [[name, ", ".join(f"{model} {share:.1%}" for model, share in shares.items())] for name, shares in asked.items()]
    plain = [
        {"model": name, "category": MACRO, "figure": f"asked {model}", "value": share}
        for name, shares in asked.items()
        for model, share in shares.items()
    ]
    return Table("Who was asked (share of the requests)", ["System", "asked"], lines, plain)


def domain_table(systems: Sequence[System], small: str, sure: float = 0.9) -> Table | None:
    """Quality on the small model's own domain, the requests where its largest probability is `sure` or more, and on the others: what
    teaching it costs there is what it forgot. None where the small model gave no probabilities."""
    own = next((system for system in systems if system.name == small), None)
    if own is None or not all("choice_scores" in row for rows in own.seeds for row in rows):
        return None
    domains = [{row["sample_id"] for row in rows if max(row["choice_scores"]) >= sure} for rows in own.seeds]
    lines, plain = [], []
    for system in systems:
        figures: dict[str, float | Interval | None] = {}
        for name, inside in (("own domain", True), ("elsewhere", False)):
            mask_SN = np.array(
                [[(row["sample_id"] in ids) == inside for row in rows] for rows, ids in zip(system.seeds, domains, strict=True)]
            )
            score_SN, before_SN = (np.array([[row["score"] or 0.0 for row in rows] for rows in of.seeds]) for of in (system, own))
            figures[name] = float(score_SN[mask_SN].mean()) if mask_SN.any() else None
            figures[f"{name}, minus before"] = masked(score_SN - before_SN, mask_SN) if mask_SN.any() else None
        plain += [_figure(system.name, name, value) for name, value in figures.items() if value is not None]
        cells = [
            "" if v is None else f"{v.mean:+.2f} [{v.low:+.2f}, {v.high:+.2f}]" if isinstance(v, Interval) else f"{v:.2f}"
            for v in figures.values()
        ]
        lines.append([system.name, *cells])
    share = sum(map(len, domains)) / sum(map(len, own.seeds))
    title = f"Quality on {small}'s own domain (it is sure, at {sure:g} or above: {share:.1%} of the requests) and elsewhere"
    header = ["System", "own domain", f"minus {small}", "elsewhere", f"minus {small}"]
    return Table(title, header, lines, plain)


def masked(values_SN: Floats, mask_SN: NDArray[np.bool_]) -> Interval:
    """Mean over the marked places, with its interval over items and seeds: items are drawn whole, with all the seeds they are marked in."""
    total, count = draws([np.where(mask_SN, values_SN, 0.0), mask_SN.astype(float)])
    ratios = total / np.maximum(count, 1e-9)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(values_SN[mask_SN].mean()), float(low), float(high), values_SN.shape[1], float(ratios.std()))


def advantage_table(systems: Sequence[System], pair: tuple[str, str] | None) -> Table:
    """Hybrid LLM's tables 1 and 3 for every shunt and route: the drop against the pair's large model (or its own, without a pair), in % of
    that one's quality, at fixed cost advantages, and cost advantage and drop on the test requests at the threshold that was chosen."""
    large = next((float(system.flat.mean()) for system in systems if pair and system.name == pair[1]), None)
    lines, plain = [], []
    for system in systems:
        curve = system.curve()
        bound = large or (curve.large if curve else 0.0)
        if curve is None or bound <= 0:
            continue
        figures = {f"drop % at {a:.0%} advantage": 100 * (bound - curve.at_share(1 - a)) / bound for a in (0.1, 0.2, 0.4)}
        figures["cost advantage %"] = 100 * (1 - (system.share_large() or 0.0))
        figures["its drop %"] = 100 * (bound - float(system.flat.mean())) / bound
        chosen = system.about[0]["threshold"]
        lines.append([system.name, *(f"{value:.1f}" for value in figures.values()), chosen["rule"] if chosen else "fixed"])
        plain += [{"model": system.name, "category": MACRO, "figure": name, "value": value} for name, value in figures.items()]
    names = [f"drop % at {a:.0%} advantage" for a in (0.1, 0.2, 0.4)]
    header = ["System", *names, "cost advantage %", "its drop %", "threshold"]
    return Table("Drop against the large model (share of its quality) for calls saved", header, lines, plain)


def plot_systems(systems: Sequence[System], path: Path, *, title: str = "") -> None:
    """Quality against cost (mean GFLOPs a request, log scale): a dot and interval a system; a line for every shunt and route, over all of
    its thresholds, in the plot beside it, against the share of large calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from llava_collab.evaluation.plot import COLOURS, MARKERS

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
    for number, system in enumerate(systems):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        quality = system.quality()
        bars = [[max(0.0, quality.mean - quality.low)], [max(0.0, quality.high - quality.mean)]]
        cost = max(system.mean("flops") / 1e9, 1e-7)
        left.errorbar([cost], [quality.mean], yerr=bars, fmt=marker, color=colour, capsize=2, label=system.name)
        curve, share = system.curve(), system.share_large()
        if curve is not None and share is not None:
            right.plot(100 * curve.shares, curve.qualities, color=colour, linewidth=1)
            right.plot([100 * share], [quality.mean], marker, color=colour)
    left.set_xscale("log")
    left.set_xlabel("GFLOPs a request (2 x parameters x tokens), mean")
    left.set_ylabel("quality, 0 to 100 (bars: 95 % bootstrap interval)")
    right.set_xlabel("large calls, % of the requests (lines: all thresholds)")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
