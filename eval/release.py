"""The first release: the README's tables from its records, its checkpoints' answers once more, its model cards.

    python eval/release.py tables                    print the tables, computed from docs/results/release
    python eval/release.py check --data-root DIR     they stand in README.md, cell by cell; the released models answer as recorded
    python eval/release.py pack --runs DIR           copy the records of a training (scripts/reproduce_release.sh) to docs/results/release
    python eval/release.py cards --runs DIR          write the model cards

`check` needs CMT-open with a `test` split of any size: item i is the same whatever was asked for. The tables were measured on the first
edition of CMT-open, the answers that `check` compares are those to the second.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm
from tyro.conf import subcommand

from llava_collab.evaluation import report
from llava_collab.evaluation.ablate import CONDITIONS, VARIANCES, read_ablation
from llava_collab.evaluation.records import RecordError, pack, read_run
from llava_collab.evaluation.statistics import MACRO, Interval
from llava_collab.evaluation.suite import load_suite
from llava_collab.files import read_json, write_text
from llava_collab.training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "results" / "release"
ANSWERS = ROOT / "docs" / "results" / "cmt-open" / "test"
SUITE = ROOT / "eval" / "suites" / "cmt-open.yaml"
MODELS = {"hyperllava-smol": "hyperllava", "llava-smol": "llava", "llava-smol-matched-lora": "matched-lora"}
"""Released folder -> row of the table; all of seed 0."""
STAGES = {"llava-smol-align": "align", "llava-smol-start": "start"}
"""What they stand on, in order: released folder -> run."""
ROWS = {
    "majority": "most frequent training answer",
    "llava": "C1 static LLaVA",
    "static-experts": "C2 experts with learned weights",
    "constant-guidance": "C3 generator without guidance",
    "matched-lora": "C5 LoRA, as many parameters",
    "hyperllava": "HyperLLaVA",
}
OURS = "hyperllava"
TRIED = {
    OURS: "as released",
    "expert-rate-4": "experts at four times the rate",
    "attached": "attached guidance",
    "last-prompt-token": "guidance of the last prompt token",
    "longer": "twice as many steps",
}
"""Rows of the table `codes` whose codes were exchanged."""
SECTION = "## Does the hypernetwork help?"
"""Heading of the README's part that holds the three tables and no other."""
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
    """A build of CMT-open with at least --items test items a category."""
    items: int = 10
    """The first so many test items of each category are asked again."""
    records: Path = RECORDS
    """Folder of the records that the README's tables are made of."""
    answers: Path = ANSWERS
    """Folder of the released models' answers to the test items."""
    checkpoints: Path = ROOT / "checkpoints"
    """Folder of the released models."""
    least: float = 0.98
    """Smallest share of equal tokens."""

    def run(self) -> int:
        lines = check_readme(self.records)
        print(f"README.md: all {lines} lines of its tables are those of {self.records}")
        shares = {name: self._regenerate(name) for name in MODELS}
        return 0 if min(shares.values()) >= self.least else 1

    def _regenerate(self, name: str) -> float:
        """Share of equal tokens between recorded answers and those of the released model, fp32 on the CPU."""
        import torch

        from llava_collab.collab.single import Single
        from llava_collab.models.build import feature_cache, load

        suite = load_suite(SUITE)
        recorded = {row["sample_id"]: row["output"] for row in report.read_runs([self.answers / name])[0].rows}
        samples = [sample for sample in suite.read("test", self.data_root) if int(sample.id.rsplit("-", 1)[1]) < self.items]
        if not samples:
            raise RecordError(f"{self.data_root} has no test items; build them: llava-collab data build cmt-open --test 70 ...")
        images = [image for sample in samples for image in sample.images]
        network, processor = load(self.checkpoints / name, dtype=torch.float32)
        processor.feature_cache = feature_cache(network, processor, images)
        model = Single(network, processor, name)
        equal = total = same = 0
        for sample in tqdm(samples, desc=name, unit="item"):
            answer = model.generate([sample.request(suite.max_new_tokens[sample.category])])[0]
            if answer.error is not None or sample.id not in recorded:
                raise RecordError(f"{sample.id}: {answer.error or f'not in the records of {self.answers / name}'}")
            ours, theirs = (processor.tokenizer(text)["input_ids"] for text in (answer.text, recorded[sample.id]))
            equal += sum(a == b for a, b in zip(ours, theirs, strict=False))
            total += max(len(ours), len(theirs))
            same += answer.text == recorded[sample.id]
        print(f"{name}: {equal} of {total} tokens equal ({equal / total:.2%}), {same} of {len(samples)} answers")
        return equal / total


@dataclass(frozen=True)
class Pack:
    """Copy the records of a finished sweep and of its ablations into the tree, compressed."""

    runs: Path
    """Folder of the sweep."""
    records: Path = RECORDS
    """Folder to write."""

    def run(self) -> int:
        pack(self.runs / "majority" / "eval", self.records / "majority")
        for row in [row for row in ROWS if row != "majority"]:
            for folder in sorted((self.runs / row).glob("seed-*")):
                pack(folder / "eval", self.records / f"{row}-{folder.name.removeprefix('seed-')}")
        for row in TRIED:
            codes = self.runs / row / "seed-0" / "codes"
            for condition in [name for name in CONDITIONS if (codes / name).is_dir()]:
                pack(codes / condition, self.records / "codes" / row / condition)
            shutil.copy(codes / VARIANCES, self.records / "codes" / row / VARIANCES)
        print(f"{self.records}: {sum(file.stat().st_size for file in self.records.rglob('*') if file.is_file()) / 1e6:.1f} MB")
        return 0


@dataclass(frozen=True)
class PackAnswers:
    """Copy the released models' answers to the test items into the tree, compressed: what `check` compares with."""

    runs: Path
    """Folder of the sweep; the answers are in its folder `test`."""
    answers: Path = ANSWERS
    """Folder to write."""

    def run(self) -> int:
        for name in MODELS:
            pack(self.runs / "test" / name, self.answers / name)
        return 0


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
        table = scores(_pools(self.records))
        for name, run in (STAGES | {name: f"{row}/seed-0" for name, row in MODELS.items()}).items():
            card = _card(name, self.runs / run, self.records / f"{MODELS.get(name, OURS)}-0", table)
            write_text(self.checkpoints / name / "README.md", card)
            print(f"wrote {self.checkpoints / name / 'README.md'}")
        return 0


def tables(records: Path) -> str:
    """The README's three tables: scores, differences, codes."""
    pools = _pools(records)
    return "\n\n".join([scores(pools), differences(pools), codes(records)])


def check_readme(records: Path) -> int:
    """Compare the tables of the README's section with those of the records; returns the number of lines. Raises RecordError."""
    lines = [line for line in tables(records).splitlines() if line.startswith("|")]
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    if shown != lines:
        other = [line for line in shown if line not in lines] + [line for line in lines if line not in shown]
        raise RecordError(f"README.md, {SECTION}: its tables are not those of {records}; copy them anew:\n" + "\n".join(other))
    return len(lines)


def _pools(records: Path) -> list[report.Run]:
    """The rows, seeds pooled. Raises RecordError where a row is missing, or has other seeds than HyperLLaVA."""
    seeds = sorted(int(folder.name.removeprefix(f"{OURS}-")) for folder in records.glob(f"{OURS}-[0-9]"))
    found = []
    for row in ROWS:
        folders = [records / row] if row == "majority" else [records / f"{row}-{seed}" for seed in seeds]
        found.append(report.pooled(row, dict(zip(seeds, report.read_runs(folders), strict=False))))
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
    """C4: what other codes than each sample's own cost the released model, and models trained otherwise so that codes might matter."""
    lines = [["C4: model", "codes", "loss above own codes", "score above own codes", "macro with own codes"]]
    for row, title in TRIED.items():
        figures, _ = read_ablation(records / "codes" / row)
        for name in [name for name in figures if name != "own"]:
            loss, score = figures[name]["loss_difference"][MACRO], figures[name]["score_difference"][MACRO]
            lines.append([title, CONDITIONS[name], _signed(loss, 4), _signed(score), f"{figures['own']['score'][MACRO].mean:.1f}"])
    return _markdown(lines)


def _clear(value: Interval) -> bool:
    return value.low > 0 or value.high < 0


def _signed(value: Interval, digits: int = 1) -> str:
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


WHAT = {
    "llava-smol-align": "Stage 1 of the released models: the projector, and adapters on the language model, trained to caption pictures."
    " The next is stored as its difference from it; by itself it captions, and answers nothing.",
    "llava-smol-start": "The first part of instruction tuning, without experts: what the released models start from, and are stored as"
    " differences from.",
    "hyperllava-smol": "HyperLLaVA (arXiv 2403.13447) at a size that trains on a CPU: both hypernetworks, and adapters on language model"
    " and projector.",
    "llava-smol": "The static twin of hyperllava-smol (control C1): the same start, data, order and steps, without experts.",
    "llava-smol-matched-lora": "The twin of hyperllava-smol with as many trained parameters in plain LoRA instead of experts (control C5):"
    " the same start, data, order and steps.",
}
CARD = """\
---
license: apache-2.0
library_name: llava_collab
pipeline_tag: image-text-to-text
language: en
---

# {name}

{what}

```python
from llava_collab.models.build import load

model, processor = load("checkpoints/{name}")
```

- **Base**: {base}, verified by sha256 when it is loaded. It needs `llava-collab assets --bases smollm2-135m-l4-v8k efficientnet-lite0
  dinov2-s` once.
- **Data**: CMT-open, first edition (generator 1.0), {samples:,} samples drawn from its training split (question families:
  {families}), and nothing else.
- **Training**: {recipe}; seed {seed}, {steps} steps of {batch}, loss over the last 50 steps {loss:.2f};
  by `bash scripts/reproduce_release.sh`.
- **Hardware and time**: {cpus} CPU cores ({machine}) or one of them, {minutes:.0f} minutes.
  Python {python}, torch {torch}, transformers {transformers}.
{scores}
**Limits.** English, short questions in the wording of CMT-open, pictures of single things, charts and signs, seen at 224 pixels.
It can't be relied on: see the scores. It has not been tested for bias or safety. It is there for research on how such models work.

**Licence.** These weights: Apache-2.0, as the code. The base models, and the pictures that CMT-open is made of, have licences of
their own, listed in `llava_collab/assets/packages.yaml`; of them only the tokenizer (SmolLM2, Apache-2.0) is contained here.
"""


def _card(name: str, run: Path, records: Path, table: str) -> str:
    """What is told of a training: read from its folder and from the header of its records."""
    recipe = load_recipe(run / "recipe.yaml")
    log = [row for row in map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines()) if "seconds" in row]
    environment = read_run(records)["environment"]
    stage = list(STAGES).index(name) if name in STAGES else 2
    parts = "the parts named in `base.json` (SmolLM2-135M-Instruct cut to 4 blocks and 8k tokens, EfficientNet-lite0, DINOv2-S)"
    families = [f"`{family}`" for file in recipe.data.files for family in file.families]
    seeds = len(list(records.parent.glob(f"{OURS}-[0-9]")))
    heading = "Scores on the 7,000 decision items of CMT-open's first edition,"
    heading += f" mean of {seeds} seeds (this folder is seed 0), ± half of the 95 % interval:"
    return CARD.format(
        name=name,
        what=WHAT[name],
        base=parts if stage == 0 else f"`../{list(STAGES)[min(stage, 2) - 1]}`",
        samples=sum(row["samples"] for row in log),
        families=", ".join(families) or "all",
        recipe=f"train/recipes/smol-{('align', 'instruct', 'experts')[stage]}-lora.yaml"
        + (f", row `{MODELS[name]}` of the table `controls`" if stage == 2 else ""),
        seed=recipe.run.seed,
        steps=read_json(run / "finished.json")["step"],
        batch=recipe.run.batch_size,
        loss=sum(row["loss"] for row in log[-50:]) / len(log[-50:]),
        minutes=sum(row["seconds"] for row in log) / 60,
        **environment["hardware"],
        **environment["versions"],
        scores=f"\n{heading}\n\n{table}\n" if stage == 2 else "",
    )


Job = (
    Annotated[Tables, subcommand("tables")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Pack, subcommand("pack")]
    | Annotated[PackAnswers, subcommand("pack-answers")]
    | Annotated[Cards, subcommand("cards")]
)

if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Job, description=__doc__).run())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
