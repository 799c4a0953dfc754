"""Recipes: all of ours parse, mistakes are named with their cure, and what is saved reads back equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import RECIPES

from llava_collab.training.recipe import RecipeError
from llava_collab.training.recipe_file import differences, load_recipe, parse_command, save_recipe

SMALL = "model: {}\ndata: {files: [{path: a.jsonl}]}\ntune: {}\noptim: {}\nrun: {out: r, steps: 5}\n"


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert "eviation" in path.read_text(encoding="utf-8"), "a recipe says how it deviates from the paper"


@pytest.mark.parametrize("name", ["vicuna-7b-align", "vicuna-7b-instruct", "vicuna-13b-align", "vicuna-13b-instruct"])
def test_the_papers_hyperparameters(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    stage1 = name.endswith("align")
    assert (recipe.optim.lr, recipe.run.batch_size) == ((1e-3, 256) if stage1 else (2e-5, 128))
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay, recipe.optim.warmup_ratio) == ((0.9, 0.999), 1e-8, 0.0, 0.03)
    assert (recipe.run.epochs, recipe.data.max_length, recipe.run.precision) == (1, 2048, "bf16")
    assert recipe.tune.llm == ("frozen" if stage1 else "full") and not recipe.tune.unfreeze_vision_tower
    assert (recipe.model.language_expert is None) == stage1 and recipe.model.visual_expert == {"bottleneck": 16, "code_width": 64}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("optim: {}", "optim: {learning_rate: 1e-3}", r"unknown key 'learning_rate' in optim\. .*Valid keys: lr, "),
        ("optim: {}", "optim: {weight_dcay: 0}", r"Did you mean 'weight_decay'\?"),
        ("tune: {}", "tune: {llm: lorra}", r"tune\.llm must be one of .*Did you mean 'lora'\?"),
        ("tune: {}", "tune: {visual_expert: 1}", r"tune\.visual_expert must be bool, not 1 \(int\)"),
        ("optim: {}", "optim: {lr: fast}", r"optim\.lr must be float, not 'fast'"),
        ("optim: {}", "optim: {lr: 1e-3, lr: 1e-4}", r"line 4: key 'lr' is given twice"),
        ("optim: {}", "optim: {betas: [0.9]}", r"optim\.betas must be a list of 2"),
        ("steps: 5", "epochs: 1, steps: 5", r"exactly one of steps and epochs"),
        ("[{path: a.jsonl}]", "[{file: a.jsonl}]", r"unknown key 'file' in data\.files\[0\]"),
        ("[{path: a.jsonl}]", "[{}]", r"data\.files\[0\] lacks the key 'path'"),
        ("run: {out: r, steps: 5}", "", r"the recipe lacks the key 'run'"),
        ("tune: {}", "tune: [", r"not valid YAML"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_cure(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = _write(tmp_path, SMALL.replace(old, new))
    with pytest.raises(RecipeError, match=told) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_numbers_in_any_usual_form(tmp_path: Path) -> None:
    for text in ("1e-3", "1.0e-3", "0.001", "1E-3"):
        assert load_recipe(_write(tmp_path, SMALL.replace("optim: {}", f"optim: {{lr: {text}}}"))).optim.lr == 1e-3
    assert load_recipe(_write(tmp_path, SMALL.replace("optim: {}", "optim: {lr: 1}"))).optim.lr == 1.0


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = str(_write(tmp_path, SMALL))
    recipe = parse_command([path, "--optim.lr", "1e-3", "--data.blind", "--model.visual-expert", '{"bottleneck": 4}'], "")
    assert (recipe.optim.lr, recipe.data.blind, recipe.model.visual_expert) == (1e-3, True, {"bottleneck": 4})
    assert set(differences(load_recipe(path), recipe)) >= {"data.blind: False -> True", "optim.lr: 2e-05 -> 0.001"}


def test_help_teaches_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command([str(RECIPES / "tiny-instruct.yaml"), "--help"], "")
    told = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "--optim.expert-clip-norm" in told and "Peak learning rate" in told


def test_where_and_how_often_to_save_may_change_between_starts(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, SMALL))
    other = load_recipe(_write(tmp_path, SMALL.replace("out: r", "out: s, save_every: 7, micro_batch_size: 1, threads: 2")))
    assert differences(recipe, other) == []
    expert = load_recipe(_write(tmp_path, SMALL.replace("model: {}", "model: {visual_expert: {}}")))
    assert differences(recipe, expert) == ["model.visual_expert: None -> {}"]
    assert differences(recipe, load_recipe(_write(tmp_path, SMALL.replace("steps: 5", "steps: 6")))) == ["run.steps: 5 -> 6"]


def test_a_file_can_be_narrowed_to_categories_and_families_that_it_has(tmp_path: Path) -> None:
    from llava_collab.training.batches import read_all
    from llava_collab.training.recipe import DataFile, DataRecipe

    talk = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]
    rows = [
        {"id": str(i), "conversations": talk, "category": "Visual QA" if i % 2 else "Captions", "family": "name" if i < 2 else "count"}
        for i in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = str(tmp_path / "d.jsonl")
    chosen = read_all(DataRecipe(files=(DataFile(path, categories=("Visual QA",), repeat=2),)))
    assert [sample.id for sample in chosen] == ["1", "3", "5"] * 2
    with pytest.raises(RecipeError, match=r"no sample of category \['Visual AQ'\]"):
        read_all(DataRecipe(files=(DataFile(path, categories=("Visual AQ",)),)))
    assert [sample.id for sample in read_all(DataRecipe(files=(DataFile(path, families=("name",)),)))] == ["0", "1"]
    both = DataFile(path, categories=("Visual QA",), families=("count",))
    assert [sample.id for sample in read_all(DataRecipe(files=(both,)))] == ["3", "5"]
    with pytest.raises(RecipeError, match=r"no sample of family \['side'\]"):
        read_all(DataRecipe(files=(DataFile(path, families=("side",)),)))
