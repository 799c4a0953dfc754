"""What a checkpoint's generated weights are worth: the same model, samples and images, with other codes than each sample's own.

If answers are no worse with the codes of another sample of the same question family, the hypernetwork writes a static expert; if they
are no worse with those of another category, it tells tasks apart at best. `variances` says the same about the weights themselves.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from tqdm import tqdm

from llava_collab.collab.single import Single
from llava_collab.data.samples import load_image
from llava_collab.evaluation import report
from llava_collab.evaluation.codes import Codes, Recoded, mean_codes, read_codes, replaced, shuffled, variances
from llava_collab.evaluation.environment import environment
from llava_collab.evaluation.evaluator import evaluate
from llava_collab.evaluation.records import LOSSES, RecordError
from llava_collab.evaluation.statistics import MACRO, Interval, bootstrap
from llava_collab.files import model_sha256, read_json, write_json, write_text

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample
    from llava_collab.evaluation.suite import Suite

CONDITIONS = {
    "own": "each sample's own codes",
    "shuffled-family": "codes of another sample of the same question family",
    "shuffled-category": "codes of another sample of the same category",
    "shuffled-all": "codes of any other sample",
    "mean": "the mean code of all samples",
    "zero": "zero codes: what the generators put out without any",
    "image-part": "language guidance from the image tokens alone",
    "question-part": "language guidance from the question's tokens alone",
}
VIEWS, VIEWED = 4, 48
VARIANCES = "variances.json"


def ablate(
    folder: Path,
    model: Single,
    suite: Suite,
    samples: Sequence[Sample],
    train: Sequence[Sample],
    out: Path,
    batch_size: int,
    chosen: Sequence[str] = (),
) -> str:
    """Run the conditions (resumably, a record folder each below `out`) and return the table; writes ablate.json, ablate.md, ablate.png.

    `samples` are scored as `suite` says. `chosen`: only these conditions, and `own`.
    Raises ValueError for a model without a dynamic expert, and for a condition that means nothing for it.
    """
    experts = [e for e in (*model.network.model.multi_modal_projector.experts, model.network.model.language_expert) if e is not None]
    if not experts or any(expert.config.mode == "static" for expert in experts):
        raise ValueError(f"{folder} has no hypernetwork to ablate: its experts are off or static")
    scorer = suite.scorer(list(train), list(samples))
    requests = [sample.request(suite.max_new_tokens[sample.category]) for sample in samples]
    own = read_codes(model, requests, batch_size)
    about = {"suite": suite.name, "model_sha256": model_sha256(folder)}
    if unknown := set(chosen) - set(conditions(model)):
        raise ValueError(f"no condition {sorted(unknown)} for {folder}; there are {', '.join(conditions(model))}")
    kept: dict[str, int] = {}
    for name in [name for name in conditions(model) if not chosen or name in ("own", *chosen)]:
        recoded, kept[name] = _recoded(model, name, own, samples)
        place = out / name
        evaluate(
            recoded,
            samples,
            place,
            scorer=scorer,
            max_new_tokens=suite.max_new_tokens,
            batch_size=batch_size,
            identity=about | {"codes": name},
            environment=environment(),
        )
        _losses(recoded, samples, place / LOSSES, batch_size)
    _variances(model, samples, suite, out / VARIANCES)
    figures, spread = read_ablation(out)
    figures = {name: figures[name] for name in kept}  # an earlier call may have left more
    write_json(out / "ablate.json", {"conditions": _plain(figures), "kept_their_own": kept, "variances": spread, **environment()})
    text = _text(folder, figures, kept, spread, len(samples))
    write_text(out / "ablate.md", text)
    _plot(figures, spread, out / "ablate.png")
    return text


def read_ablation(out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The figures of an ablation, computed from its records: per condition mean score and loss and their paired differences from `own`.

    And the variances of the generated weights, by expert and layer.
    """
    present = [name for name in CONDITIONS if (out / name / LOSSES).is_file()]
    runs = {name: report.read_runs([out / name])[0] for name in present}
    losses = {name: read_json(out / name / LOSSES) for name in present}
    return _figures(runs, losses), read_json(out / VARIANCES)


def conditions(model: Single) -> list[str]:
    """Those that mean something for this model: guidance has parts only where the language expert pools over the prompt."""
    expert = model.network.model.language_expert
    parts = expert is not None and expert.config.guidance == "prompt_mean"
    return [name for name in CONDITIONS if parts or not name.endswith("-part")]


def _recoded(model: Single, name: str, own: Mapping[str, Codes], samples: Sequence[Sample]) -> tuple[Recoded, int]:
    if name == "own":
        return Recoded(model, name, own), 0
    if name.endswith("-part"):
        return Recoded(model, name, part=name.removesuffix("-part")), 0
    if name.startswith("shuffled"):
        keys = {
            "all": lambda sample: "",
            "category": lambda sample: sample.category,
            "family": lambda sample: (sample.category, sample.family),
        }
        codes, kept = shuffled(own, samples, keys[name.removeprefix("shuffled-")], seed=0)
        return Recoded(model, name, codes), kept
    mean = mean_codes(own)
    if name == "zero":
        mean = Codes(*(None if part is None else torch.zeros_like(part) for part in (mean.language, mean.visual)))
    return Recoded(model, name, replaced(own, mean)), 0


def _losses(recoded: Recoded, samples: Sequence[Sample], path: Path, batch_size: int) -> dict[str, float]:
    if path.is_file():
        found = read_json(path)
        if found.keys() == {sample.id for sample in samples}:
            return found
        raise RecordError(f"{path} is of other samples; delete the folder or give another --out")
    found = {}
    order = sorted(samples, key=lambda sample: (len(sample.images), sum(len(turn.text) for turn in sample.turns)))
    for start in tqdm(range(0, len(order), batch_size), desc=f"loss, {recoded.name}", unit="batch"):
        chosen = order[start : start + batch_size]
        found |= dict(zip((sample.id for sample in chosen), recoded.losses(chosen), strict=True))
    write_json(path, found)
    return found


def _variances(model: Single, samples: Sequence[Sample], suite: Suite, path: Path) -> dict[str, list[dict[str, float]]]:
    """Over up to `VIEWED` samples of one image, each seen in `VIEWS` slightly different ways."""
    if path.is_file():
        return read_json(path)
    rng = np.random.default_rng(0)
    single = [sample for sample in samples if len(sample.images) == 1]
    chosen = [single[i] for i in sorted(rng.permutation(len(single))[:VIEWED])]
    views = [[_view(load_image(sample.images[0]), rng) for _ in range(VIEWS)] for sample in chosen]
    cache, model.processor.feature_cache = model.processor.feature_cache, None
    try:
        spread = variances(model, views, [sample.request(suite.max_new_tokens[sample.category]) for sample in chosen]) if chosen else {}
    finally:
        model.processor.feature_cache = cache
    write_json(path, spread)
    return spread


def _view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shifted by up to 5 % and brighter or darker by up to 20 %: the same picture to anybody who looks."""
    width, height = image.size
    dx, dy = (float(rng.uniform(-0.05, 0.05)) * side for side in (width, height))
    moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), Image.Resampling.BILINEAR)
    return ImageEnhance.Brightness(moved).enhance(float(rng.uniform(0.8, 1.2)))


def _figures(runs: Mapping[str, report.Run], losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    category = {row["sample_id"]: row["category"] for row in runs["own"].rows}
    figures: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        groups: dict[str, list[float]] = defaultdict(list)
        for sample_id, loss in losses[name].items():
            groups[category[sample_id]].append(loss - losses["own"][sample_id])
        figures[name] = {
            "score": run.intervals(),
            "score_difference": report.paired(runs["own"], run),
            "loss": float(np.mean(list(losses[name].values()))),
            "loss_difference": bootstrap({key: np.array(values) for key, values in groups.items()}),
        }
    return figures


def _plain(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
        return {key: plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value

    return json.loads(json.dumps(plain(figures)))


def _text(folder: Path, figures: Mapping[str, Mapping[str, Any]], kept: Mapping[str, int], spread: Mapping[str, Any], n: int) -> str:
    lines = [f"**Codes of {folder}, {n} samples; paired differences from own codes [95 % interval], macro over categories**\n"]
    lines += ["| codes | what they are | loss | score | loss difference | score difference |", "|---|---|---:|---:|---:|---:|"]
    for name, found in figures.items():
        loss, score = found["loss_difference"][MACRO], found["score_difference"][MACRO]
        differences = ("–", "–") if name == "own" else (_shown(loss, 4), _shown(score, 1))
        note = f" ({kept[name]} without another of their kind keep their own)" if kept[name] else ""
        lines.append(
            f"| {name} | {CONDITIONS[name]}{note} | {found['loss']:.4f} | {found['score'][MACRO].mean:.1f} | {' | '.join(differences)} |"
        )
    if spread:
        lines += [
            "\n**Variance of the generated weights over their squared norm**\n",
            "| expert | layer | between samples | within a sample |",
        ]
        lines.append("|---|---:|---:|---:|")
        lines += [
            f"| {name} | {layer} | {values['between']:.2e} | {values['within']:.2e} |"
            for name, layers in spread.items()
            for layer, values in enumerate(layers)
        ]
    return "\n".join(lines) + "\n"


def _shown(value: Interval, digits: int) -> str:
    mark = "*" if value.low > 0 or value.high < 0 else ""
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]{mark}"


def _plot(figures: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in figures if name != "own"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    values = [figures[name]["loss_difference"][MACRO] for name in names]
    errors = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
    left.errorbar([v.mean for v in values], range(len(names)), xerr=errors, fmt="o", color="#0072B2", capsize=2)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.axvline(0, color="0.6", linewidth=0.8)
    left.set_xlabel("loss above own codes (nats a token, 95 % interval)")
    ticks = [(name, layer, layers[layer]) for name, layers in spread.items() for layer in range(len(layers))]
    for offset, (kind, colour) in enumerate((("between", "#0072B2"), ("within", "#D55E00"))):
        heights = [max(entry[kind], 1e-12) for _, _, entry in ticks]
        right.bar([at + 0.4 * offset for at in range(len(ticks))], heights, width=0.38, color=colour, label=kind)
    right.set_yscale("log")
    right.set_xticks([at + 0.2 for at in range(len(ticks))], [f"{name} {layer}" for name, layer, _ in ticks], rotation=30, ha="right")
    right.set_ylabel("variance of weights / squared norm")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
