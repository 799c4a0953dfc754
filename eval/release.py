"""The first release: the README's tables from its records, its checkpoints' answers once more, its model cards.

    python eval/release.py tables                    print the tables, computed from docs/results/release
    python eval/release.py check --data-root DIR     they stand in README.md, cell by cell; the released models answer as recorded
    python eval/release.py cards --runs DIR          write the model cards (after training: scripts/reproduce_release.sh)

`check` needs CMT-open with a `decision` split of any size: item i is the same whatever was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from llava_collab.evaluation import report
from llava_collab.evaluation.ablate import CONDITIONS, read_ablation
from llava_collab.evaluation.records import RecordError, read_run
from llava_collab.evaluation.statistics import MACRO, Interval
from llava_collab.evaluation.suite import load_suite
from llava_collab.files import read_json, write_text
from llava_collab.training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "results" / "release"
SUITE = ROOT / "eval" / "suites" / "cmt-open.yaml"
MODELS = {"hyperllava-smol": "hyperllava", "llava-smol": "llava", "llava-smol-matched-lora": "matched-lora"}
"""Released folder -> row of the table; all of seed 0."""
BASE = "llava-smol-align"
ROWS = {
    "majority": "most frequent training answer",
    "llava": "C1 static LLaVA",
    "static-experts": "C2 experts with learned weights",
    "constant-guidance": "C3 generator without guidance",
    "matched-lora": "C5 LoRA, as many parameters",
    "hyperllava": "HyperLLaVA",
}
OURS = "hyperllava"
SHORT = {"Visual Captioning": "Captioning", "Spatial Inference": "Spatial", "Detailed Description": "Description"}
SHORT |= {"Visual Storytelling": "Storytelling", "Text-Rich Images QA": "Text-Rich"}


@dataclass(frozen=True)
class Tables:
    """Print the README's tables, computed from the released records."""

    records: Path = RECORDS
    """Folder of the records."""

    def run(self) -> int:
        print(tables(self.records))
        return 0


@dataclass(frozen=True)
class Check:
    """Compare the README with the records, and the released models' answers with those recorded."""

    data_root: Path
    """A build of CMT-open with at least --items decision items a category."""
    items: int = 10
    """The first so many decision items of each category are asked again."""
    records: Path = RECORDS
    """Folder of the records."""
    checkpoints: Path = ROOT / "checkpoints"
    """Folder of the released models."""
    least: float = 0.98
    """Smallest share of equal tokens."""

    def run(self) -> int:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        lines = [line for line in tables(self.records).splitlines() if line.startswith("|")]
        if missing := [line for line in lines if line not in readme]:
            raise RecordError("README.md lacks what the records give:\n" + "\n".join(missing))
        print(f"README.md: all {len(lines)} lines of its tables are those of {self.records}")
        shares = {name: self._regenerate(name, row) for name, row in MODELS.items()}
        return 0 if min(shares.values()) >= self.least else 1

    def _regenerate(self, name: str, row: str) -> float:
        """Share of equal tokens between recorded answers and those of the released model, fp32 on the CPU."""
        import torch

        from llava_collab.models.build import cache_features, load
        from llava_collab.types import Single

        suite = load_suite(SUITE)
        recorded = {r["sample_id"]: r["output"] for r in report.read_runs([self.records / f"{row}-0"])[0].rows}
        samples = [sample for sample in suite.read("decision", self.data_root) if int(sample.id.rsplit("-", 1)[1]) <= self.items]
        network, processor = load(self.checkpoints / name, dtype=torch.float32)
        cache_features(network, processor, [image for sample in samples for image in sample.images], 16)  # as the records were made
        model = Single(network, processor, name)
        equal = total = same = 0
        for sample in samples:
            answer = model.generate([sample.request(suite.max_new_tokens[sample.category])])[0]
            ours, theirs = (processor.tokenizer(text)["input_ids"] for text in (answer.text, recorded[sample.id]))
            equal += sum(a == b for a, b in zip(ours, theirs, strict=False))
            total += max(len(ours), len(theirs))
            same += answer.text == recorded[sample.id]
        print(f"{name}: {equal} of {total} tokens equal ({equal / total:.2%}), {same} of {len(samples)} answers")
        return equal / total


@dataclass(frozen=True)
class Cards:
    """Write README.md into each released folder: data, command, hardware, time, seeds, scores, limits, licence."""

    runs: Path
    """Folder of the sweep that trained them."""
    records: Path = RECORDS
    """Folder of the records."""
    checkpoints: Path = ROOT / "checkpoints"
    """Folder of the released models."""

    def run(self) -> int:
        score_lines = [line for line in scores(_pools(self.records)).splitlines() if line.startswith("|")]
        for name, row in {BASE: "align", **MODELS}.items():
            facts = _facts(self.runs / row / "seed-0", self.records / f"{MODELS.get(name, OURS)}-0")
            write_text(self.checkpoints / name / "README.md", _card(name, facts, [] if name == BASE else score_lines))
            print(f"wrote {self.checkpoints / name / 'README.md'}")
        return 0


def tables(records: Path) -> str:
    """The README's three tables: scores, differences, codes."""
    pools = _pools(records)
    return "\n\n".join([scores(pools), differences(pools), codes(records)])


def _pools(records: Path) -> list[report.Run]:
    """The rows, seeds pooled. Raises RecordError where a row or one of its seeds is missing."""
    found = []
    for row in ROWS:
        folders = sorted(records.glob(f"{row}-[0-9]")) or [records / row]
        found.append(report.pooled(row, report.read_runs(folders)))
    return found


def scores(pools: Sequence[report.Run]) -> str:
    """One line a model: mean over its seeds, half of the 95 % interval over items and seeds."""
    lines = [["model", *(SHORT.get(name, name) for name in report.CATEGORIES), MACRO]]
    for run in pools:
        found = run.intervals()
        lines.append([ROWS[run.label], *(f"{found[name].mean:.1f} ± {found[name].half_width:.1f}" for name in (*report.CATEGORIES, MACRO))])
    return _markdown(lines)


def differences(pools: Sequence[report.Run]) -> str:
    """HyperLLaVA minus each control, paired over items and seeds, and the smallest difference that would have been found."""
    by_name = {run.label: run for run in pools}
    lines = [["HyperLLaVA minus", f"{MACRO} [95 %]", "smallest detectable", "categories whose interval excludes 0"]]
    for row in [row for row in ROWS if row not in (OURS, "majority")]:
        found = report.paired(by_name[row], by_name[OURS])
        clear = [f"{SHORT.get(name, name)} {_signed(found[name])}" for name in report.CATEGORIES if _clear(found[name])]
        lines.append([ROWS[row], _signed(found[MACRO]), f"{found[MACRO].detectable:.1f}", "; ".join(clear) or "none"])
    return _markdown(lines)


def codes(records: Path) -> str:
    """C4: what other codes than each sample's own cost the released model."""
    figures, _ = read_ablation(records / "codes-0")
    items = figures["own"]["score"][MACRO].n
    lines = [[f"C4: codes ({items:,} items)", "loss above own codes", "score above own codes"]]
    for name in [name for name in figures if name != "own"]:
        loss, score = figures[name]["loss_difference"][MACRO], figures[name]["score_difference"][MACRO]
        lines.append([CONDITIONS[name], _signed(loss, 4), _signed(score)])
    return _markdown(lines)


def _clear(value: Interval) -> bool:
    return value.low > 0 or value.high < 0


def _signed(value: Interval, digits: int = 1) -> str:
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _facts(run: Path, records: Path) -> dict[str, Any]:
    """What a card tells of a training."""
    recipe = load_recipe(run / "recipe.yaml")
    log = [row for row in map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines()) if "seconds" in row]
    environment = read_run(records)["environment"]
    return {
        "recipe": recipe,
        "steps": read_json(run / "finished.json")["step"],
        "minutes": sum(row["seconds"] for row in log) / 60,
        "samples": sum(row["samples"] for row in log),
        "loss": sum(row["loss"] for row in log[-50:]) / len(log[-50:]),
        "hardware": environment["hardware"],
        "versions": environment["versions"],
    }


def _card(name: str, facts: dict[str, Any], table: list[str]) -> str:
    recipe, hardware, versions = facts["recipe"], facts["hardware"], facts["versions"]
    first = name == BASE
    what = {
        BASE: "Stage 1 of the released models: the projector, and adapters on the language model, trained to caption pictures. The other folders are "
        "stored as differences from it; by itself it captions, and answers nothing.",
        "hyperllava-smol": "HyperLLaVA (arXiv 2403.13447) at a size that trains on a CPU: both hypernetworks, and adapters on language model and projector.",
        "llava-smol": "The static twin of hyperllava-smol (control C1): the same start, data, order and steps, without experts.",
        "llava-smol-matched-lora": "The twin of hyperllava-smol with as many trained parameters in plain LoRA instead of experts (control C5).",
    }[name]
    stage = "smol-align-lora" if first else "smol-instruct-lora"
    family = ", ".join(f"`{f}`" for file in recipe.data.files for f in file.families) or "all"
    lines = [
        "---", "license: apache-2.0", "library_name: llava_collab", "pipeline_tag: image-text-to-text", "language: en", "---", "",
        f"# {name}", "", what, "",
        "```python", "from llava_collab.models.build import load", "", f'model, processor = load("checkpoints/{name}")', "```", "",
        f"- **Base**: {'the parts named in `base.json` (SmolLM2-135M-Instruct cut to 4 blocks and 8k tokens; EfficientNet-lite0 and DINOv2-S)' if first else f'`../{BASE}`'},"
        " verified by sha256 when it is loaded. Run `llava-collab assets --bases smollm2-135m-l4-v8k efficientnet-lite0 dinov2-s` first.",
        f"- **Data**: CMT-open, {facts['samples']:,} samples drawn from its training split (families: {family}); nothing else.",
        f"- **Training**: `train/recipes/{stage}.yaml`, seed {recipe.run.seed}, {facts['steps']} steps of {recipe.run.batch_size}; loss over the last 50 steps "
        f"{facts['loss']:.2f}; by `bash scripts/reproduce_release.sh`.",
        f"- **Hardware and time**: {hardware['cpus']} CPU cores ({hardware['machine']}), one of them for this training, {facts['minutes']:.0f} minutes; "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}.",
    ]  # fmt: skip
    if table:
        lines += [
            "",
            "Scores on the 7,000 decision items of CMT-open, mean of three seeds (this folder is seed 0), ± half of the 95 % interval:",
            "",
        ]
        lines += table
    lines += [
        "",
        "**Limits.** English, short questions in the wording of CMT-open, pictures of single things, charts and signs at 224 pixels. It can't be relied on: see the "
        "scores. It has not been tested for bias or safety, and is meant for research on how such models work.",
        "",
        "**Licence.** These weights: Apache-2.0, as the code. The base models and the pictures behind CMT-open have licences of their own, listed in "
        "`llava_collab/assets/packages.yaml`; none of them is contained here.",
        "",
    ]
    return "\n".join(lines)


Job = Annotated[Tables, subcommand("tables")] | Annotated[Check, subcommand("check")] | Annotated[Cards, subcommand("cards")]

if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Job, description=__doc__).run())
    except (RecordError, OSError) as error:
        sys.exit(f"error: {error}")
