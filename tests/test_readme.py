"""The README's commands exist and take the options that it shows; the architecture page names the floors that are there."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_collab.evaluation import report
from llava_collab.evaluation.statistics import MACRO

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?<!`)`((?:python|llava-collab|scripts/|bash) ?[^`\n]+)`", README)))


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_and_knows_its_options(command: str) -> None:
    words = command.split()
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    if words[0] == "llava-collab":
        verb = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word) and word != "cmt-open"]
        call = [sys.executable, "-m", "llava_collab.cli", *verb, "--help"]
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
        recipe = [word for word in words[2:] if word.endswith(".yaml") and "recipes" in word]
        call = [sys.executable, str(ROOT / words[1]), *recipe, "--help"]
    else:
        script = words[1] if words[0] == "bash" else words[0]
        assert (ROOT / script).is_file()
        if not re.search(r"launch/|scripts/train\.sh", (ROOT / script).read_text(encoding="utf-8")):
            return
        call = ["bash", str(ROOT / script), "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    missing = [option for option in options if option not in done.stdout]
    assert not missing, f"{command}: unknown {missing}"


def test_the_architecture_page_names_every_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = [p.name for p in (ROOT / "llava_collab").iterdir() if (p.is_dir() and (p / "__init__.py").exists()) or p.name == "types.py"]
    assert parts and all(f"`{name}" in page for name in parts)


def test_no_file_names_a_machine_path_or_a_registry() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    banned = re.compile(r"/root/|/work/|pypi\.org|registry\.npmjs|deb\.debian\.org")
    here = Path(__file__).name
    for name in tracked:
        path = ROOT / name
        if path.name != here and path.suffix in (".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".json", ".jsonl"):
            found = banned.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name} names {found.group()!r}"


def test_the_data_card_has_the_tables_that_the_programs_wrote() -> None:
    card = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for name in ("families.md", "legibility.md"):
        assert (ROOT / "docs/results/cmt-open" / name).read_text(encoding="utf-8").strip() in card, name


@pytest.mark.parametrize(("page", "records"), [("README.md", "quickstart"), ("docs/cmt.md", "cmt-open/test")])
def test_score_tables_are_those_of_the_kept_records(page: str, records: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    runs = report.read_runs(sorted(path.parent for path in (ROOT / "docs/results" / records).glob("*/run.json")))
    assert len(runs) >= 4
    for run in runs:
        found = run.intervals()
        cells = [f"{found[name].mean:.1f} ± {found[name].half_width:.1f}" for name in (*report.CATEGORIES, MACRO)]
        assert f"| {run.label} | {' | '.join(cells)} |" in lines


def test_the_adapters_table_is_that_of_the_kept_records() -> None:
    page, folder = (ROOT / "docs/adapters.md").read_text(encoding="utf-8"), ROOT / "docs/results/adapters"
    rows = sorted(path.name for path in folder.iterdir() if path.is_dir())
    pools = {}
    for row in rows:
        seeds = sorted((folder / row).glob("seed-*"))
        pools[row] = report.pooled(row, dict(enumerate(report.read_runs(seeds))))
    assert len(rows) == 8 and all(len(list((folder / row).glob("seed-*"))) == 3 for row in rows)
    for row, pool in pools.items():
        score, gap = pool.intervals()[MACRO], report.paired(pools["teamlora"], pool)[MACRO]
        told = "–" if row == "teamlora" else f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
        assert re.search(rf"`{row}` \| [\d,]+ \| {score.mean:.1f} ± {score.half_width:.1f} \| .* \| {re.escape(told)} \|", page), row


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs/results/systems").iterdir()))
def test_the_tables_of_systems_are_those_of_the_program(name: str) -> None:
    page, rows = (ROOT / "docs/collaboration.md").read_text(encoding="utf-8"), 0
    with (ROOT / "docs/results/systems" / name / "table.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["figure"] == "quality":
                rows += 1
                assert f"| {row['model']} | {float(row['value']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}] |" in page
            if row["figure"] == "own domain" and name == "two-stage":
                assert f"| {row['model']} | {float(row['value']):.2f} | " in page
    assert rows >= 4


def test_the_fault_table_is_that_of_the_campaign() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {row["name"]: row["value"] for row in json.loads((ROOT / "benchmarks/results/faults.json").read_text(encoding="utf-8"))}
    kinds = {name.removesuffix(": steps lost"): lost for name, lost in rows.items() if name.endswith(": steps lost")}
    assert len(kinds) >= 10
    for kind, lost in kinds.items():
        found = re.search(rf"^\| {re.escape(kind)} \| \d+ \| \d+ \| (\d+) \| 0 \|$", page, re.MULTILINE)
        assert found and int(found.group(1)) == lost, kind


def test_the_speed_tables_are_those_of_the_programs() -> None:
    page, found = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), 0
    for program in ("adapters", "hyperllava", "loop"):
        for row in json.loads((ROOT / f"benchmarks/results/{program}.json").read_text(encoding="utf-8")):
            line = re.search(rf"^\| {re.escape(row['name'])} \| ([\d.]+) \|", page, re.MULTILINE)
            if line:
                found += 1
                assert line.group(1) == f"{row['value']:g}", row["name"]
    assert found >= 30
    rows = {(row["axis"], row["phase"]): row["value"] for row in json.loads((ROOT / "benchmarks/results/growth.json").read_text("utf-8"))}
    for axis in {axis for axis, _ in rows}:
        phases = ("generation", "application", "generation, with backward", "application, with backward")
        assert f"| {axis} | " + " | ".join(f"{rows[axis, phase]:.2f}" for phase in phases) + " |" in page
