"""The sweep: the queue goes on where it was, a failure costs its own rows only, and the table puts our rows beside the paper's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import running
import yaml
from running import RECIPES, ROOT
from synthetic import draw_shape

from llava_collab.evaluation.records import RecordError, open_run, write_rows
from llava_collab.files import write_json
from llava_collab.models.build import ModelSpec, build
from llava_collab.training.recipe import RecipeError
from llava_collab.training.recipe_file import parse_command, save_recipe
from llava_collab.training.tables import TableRow, load_tables, trainings

TABLES = """
toy:
  title: A toy table
  note: of two rows
  columns: [GQA]
  baseline: plain
  rows:
    plain: {paper: LLaVA, numbers: [62.0], set: {model.visual_expert: null, model.language_expert: null}}
    ours: {numbers: [62.7], set: {optim.lr: 2e-3}}
    lost: {numbers: [60.2], note: nobody knows}
"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return running.program("eval/sweep.py")


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a sweep over a toy table: two stages of the tiny model, three steps each, on a tiny CMT-like folder."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = []
        for number in range(count):
            draw_shape(data / f"{split}-{number}.png", "red" if number % 2 else "blue", "circle", (number, number))
            turns = [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": "red" if number % 2 else "blue"},
            ]
            image = f"{split}-{number}.png"
            rows.append({"id": image, "image": image, "conversations": turns, "category": "Visual QA", "family": "colour"})
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("tiny-align", "tiny-instruct"):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        recipe["data"]["files"] = [{"path": str(data / "train.jsonl")}]
        recipe["run"] |= {"steps": 3, "batch_size": 4, "save_every": 3, "save_first": False, "out": str(tmp_path / name)}
        recipe["model"].pop("visual_expert")
        if name == "tiny-instruct":
            recipe["model"]["init_from"] = str(tmp_path / "tiny-align" / "model")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "tables.yaml").write_text(TABLES, encoding="utf-8")
    return {
        "table": "toy",
        "base": tmp_path / "tiny-instruct.yaml",
        "out": tmp_path / "out",
        "tables": tmp_path / "tables.yaml",
        "data_root": data,
    }


# --- tables -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("numbers: [62.0]", "numbers: [62.0, 1]", "toy: plain: 2 numbers for 1 columns"),
        ("baseline: plain", "baseline: stock", "no row 'stock'; there are plain, ours, lost"),
        ("note: nobody knows", "paper: x", "lost: without `set` it can't be run"),
        ("set: {optim.lr", "sets: {optim.lr", "unknown key"),
        ("  rows:", "  row:", "unknown key"),
    ],
)
def test_a_wrong_table_is_told(place: dict[str, Any], old: str, new: str, told: str) -> None:
    assert old in TABLES
    place["tables"].write_text(TABLES.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=told):
        load_tables(place["tables"])


def test_a_row_is_a_command_line(place: dict[str, Any]) -> None:
    row = TableRow(
        "x", "x", None, {"model.visual_expert": {"layers": "both"}, "tune.visual_expert": False}, {"other": {"optim.lr": 1.0}}, ""
    )
    flags = ["--model.visual-expert", '{"layers": "both"}', "--tune.no-visual-expert"]
    assert row.flags(place["base"]) == flags and row.flags(Path("other.yaml")) == [*flags, "--optim.lr", "1.0"]
    last = trainings(row, place["base"], place["out"])[-1].recipe
    assert last.model.visual_expert == {"layers": "both"} and not last.tune.visual_expert


def test_a_given_start_takes_the_place_of_stage_1(place: dict[str, Any]) -> None:
    row = load_tables(place["tables"])["toy"].row("ours")
    assert len(trainings(row, place["base"], place["out"])) == 2
    for part in build(ModelSpec()):
        part.save_pretrained(place["out"] / "start")
    (only,) = trainings(row, place["base"], place["out"], seed=3, start=place["out"] / "start")
    assert (only.recipe.model.init_from, only.recipe.run.seed) == (str(place["out"] / "start"), 3)


def test_stage_1_is_shared_by_rows_that_agree_on_it() -> None:
    tables, base = load_tables(ROOT / "train" / "tables.yaml"), RECIPES / "vicuna-7b-instruct.yaml"
    first = {row.name: trainings(row, base, Path("runs/x"))[0] for row in tables["main"].rows}
    assert first["hyperllava"] == first["without-language-expert"] != first["llava"] == first["without-visual-expert"]
    assert first["llava"].recipe.model.visual_expert is None and first["hyperllava"].recipe.model.visual_expert is not None
    smol = RECIPES / "smol-instruct.yaml"  # its experts start in stage 2
    assert len({trainings(row, smol, Path("runs/x"))[0].command for row in tables["main"].rows}) == 1


def test_an_expert_that_the_start_would_keep_is_refused(place: dict[str, Any]) -> None:
    folder = place["out"] / "start"
    for part in build(ModelSpec(visual_expert={"bottleneck": 4, "code_width": 8})):
        part.save_pretrained(folder)
    base = yaml.safe_load(place["base"].read_text(encoding="utf-8"))
    base["model"]["init_from"] = str(folder)
    place["base"].write_text(yaml.safe_dump(base), encoding="utf-8")
    with pytest.raises(RecipeError, match="has a visual_expert, which the row leaves out"):
        trainings(load_tables(place["tables"])["toy"].row("plain"), place["base"], place["out"])


# --- the queue, with stand-ins for the programs -----------------------------------------------------------------------------------


class Programs:
    """Stands in for train.py and run.py: writes what they would leave behind, and fails where told to."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran, self.failing = out, [], ""

    def __call__(self, command: tuple[str, ...], log: Path, lock: int) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("why\n", encoding="utf-8")
        words = [*command[2:]]
        options = dict(zip(words, words[1:], strict=False))
        folder = Path(options.get("--run.out") or options["--out"])
        name = str(folder.relative_to(self.out))
        self.ran.append(name)
        if name == self.failing:
            return 1
        if "--run.out" in options:
            save_recipe(parse_command(words, ""), folder / "recipe.yaml")
            write_json(folder / "finished.json", {"step": 3})
        else:
            score = 50.0 + 10 * ("ours" in name) + 2 * ("seed-1" in name)
            keys = ("model", "name", "suite", "split", "out", "data_root", "items_per_category", "dtype")
            arguments = {key: options.get(f"--{key.replace('_', '-')}", "None") for key in keys}
            open_run(folder, {"model": options["--name"], "items": {"all": 2}}, {"arguments": arguments})
            usage = {"generated_tokens": 1, "flops": 1.0}
            common = {"category": "Visual QA", "metric": "vqa", "references": ["x"], "scores": {}, "output": "", "usage": usage}
            status = {"status": "ok", "error": None, "seconds": 0.1}
            write_rows(folder, [{"sample_id": str(i), "score": score} | common | status for i in range(2)])
        return 0


@pytest.fixture
def programs(program: ModuleType, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Programs:
    stand_in = Programs(place["out"])

    def start(*job: Any) -> SimpleNamespace:
        code = stand_in(*job)
        return SimpleNamespace(poll=lambda: code)

    monkeypatch.setattr(program, "_start", start)
    return stand_in


def test_a_table_runs_once_and_prints_both_sides(
    program: ModuleType, place: dict[str, Any], programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    args = program.Args(**place, seeds=(0, 1))
    assert program.main(args) == 0
    rows = [f"{row}/seed-{seed}{part}" for seed in (0, 1) for row in ("plain", "ours") for part in ("", "/eval")]
    assert sorted(programs.ran) == sorted([*rows, "align/seed-0", "align/seed-1"]) and programs.ran[0] == "align/seed-0"
    told = capsys.readouterr().out
    assert "| plain | – | 51.0 ± 1.4 | 2: 50.0 to 52.0 | – | LLaVA | 62.0 |" in told
    assert "| ours | – | 61.0 ± 1.4 | 2: 60.0 to 62.0 | +10.0 [+10.0, +10.0] | ours | 62.7 |" in told
    assert "| lost | – | – | – | – | lost | 60.2 |" in told and "- lost: nobody knows" in told and "not comparable" in told
    assert (place["out"] / "tables" / "toy.md").read_text(encoding="utf-8") in told
    assert "difference from plain" in (place["out"] / "tables" / "toy.csv").read_text(encoding="utf-8")
    programs.ran.clear()
    assert program.main(args) == 0 and programs.ran == []
    assert program.main(program.Args(**place, seeds=(0, 1), dry_run=True)) == 0
    assert capsys.readouterr().out.count("# finished") == 10


def test_lanes_run_at_once_what_waits_for_nothing(
    program: ModuleType, place: dict[str, Any], programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    running: set[str] = set()

    def start(*job: Any) -> SimpleNamespace:
        code, polls = programs(*job), iter([None, None])
        name = programs.ran[-1]
        seed = next(part for part in name.split("/") if part.startswith("seed-"))
        needed = {"eval": name.removesuffix("/eval")}.get(name.rsplit("/", 1)[1], f"align/{seed}")
        assert needed == name or needed not in running, f"{name} started beside {needed}, which it starts from"
        running.add(name)
        at_once.append(len(running))

        def poll() -> int | None:
            if next(polls, code) is None:
                return None
            running.discard(name)
            return code

        return SimpleNamespace(poll=poll)

    monkeypatch.setattr(program, "_start", start)
    assert program.main(program.Args(**place, seeds=(0, 1), lanes=2)) == 0
    assert max(at_once) == 2 and at_once[0] == 1 and len(programs.ran) == 10
    for seed in (0, 1):
        order = [programs.ran.index(f"{name}/seed-{seed}{part}") for name, part in (("align", ""), ("ours", ""), ("ours", "/eval"))]
        assert order == sorted(order)


def test_rows_can_be_trained_alone(program: ModuleType, place: dict[str, Any], programs: Programs) -> None:
    assert program.main(program.Args(**place, evaluate=False)) == 0
    assert programs.ran == ["align/seed-0", "plain/seed-0", "ours/seed-0"] and not (place["out"] / "tables").exists()
    assert program.main(program.Args(**place)) == 0 and programs.ran[3:] == ["plain/seed-0/eval", "ours/seed-0/eval"]


def test_a_failure_costs_what_starts_from_it(
    program: ModuleType, place: dict[str, Any], programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.failing = "plain/seed-0"
    assert program.main(program.Args(**place)) == 1
    assert programs.ran == ["align/seed-0", "plain/seed-0", "ours/seed-0", "ours/seed-0/eval"]
    told = capsys.readouterr()
    assert "plain/seed-0: failed (exit code 1)" in told.err and "why" in told.err and "plain/seed-0/eval: left out" in told.out
    programs.failing = ""
    programs.ran.clear()
    assert program.main(program.Args(**place)) == 0 and programs.ran == ["plain/seed-0", "plain/seed-0/eval"]


def test_other_settings_in_one_folder_are_refused(program: ModuleType, place: dict[str, Any], programs: Programs) -> None:
    assert program.main(program.Args(**place, rows=("ours",))) == 0
    ran = list(programs.ran)
    with pytest.raises(RecordError, match="items_per_category: None there, 1 now"):
        program.main(program.Args(**place, items_per_category=1, seeds=(1, 0)))
    assert programs.ran == ran  # told before any work
    base = place["base"].read_text(encoding="utf-8")
    place["base"].write_text(base.replace("steps: 3", "steps: 4"), encoding="utf-8")
    with pytest.raises(RecipeError, match="run.steps: 3 -> 4"):
        program.main(program.Args(**place))
    place["base"].write_text(base, encoding="utf-8")
    with pytest.raises(RecipeError, match="no table 'toys'"):
        program.main(program.Args(**place | {"table": "toys"}))
    with pytest.raises(RecipeError, match="nobody knows"):
        program.main(program.Args(**place | {"rows": ("lost",)}))


def test_one_sweep_at_a_time(program: ModuleType, place: dict[str, Any], programs: Programs) -> None:
    with program._alone(place["out"]), pytest.raises(RecipeError, match="is running in"):
        program.main(program.Args(**place))
    assert programs.ran == []


# --- the real programs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_sweep_goes_on(place: dict[str, Any]) -> None:
    words = [word for key in ("base", "out", "tables", "data_root") for word in (f"--{key.replace('_', '-')}", str(place[key]))]
    command = [sys.executable, str(ROOT / "eval" / "sweep.py"), "toy", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True, "env": environment, "cwd": ROOT}
    first = place["out"] / "plain" / "seed-0" / "finished.json"
    with subprocess.Popen(command, **quiet) as killed:
        while not first.is_file() and killed.poll() is None:
            time.sleep(0.2)
        os.killpg(killed.pid, signal.SIGKILL)
    assert first.is_file() and not (place["out"] / "tables").exists()
    written = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "align/seed-0: finished before" in done.stdout and "plain/seed-0: finished before" in done.stdout
    assert first.stat().st_mtime_ns == written and "| ours |" in done.stdout
