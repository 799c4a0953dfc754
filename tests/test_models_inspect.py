"""What `inspect` says of each kind of folder: its parts are counted exactly, and the command it names is the one that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from original_llava import Toy
from safetensors.torch import save_file

from llava_collab.models.build import ModelSpec, build
from llava_collab.models.inspect import inspect

SIZES = {"visual_expert": {"bottleneck": 2, "code_width": 4}, "language_expert": {"bottleneck": 2, "code_width": 4}}


def test_parts_are_counted_and_run_folders_seen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step-7").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    model, processor = build(ModelSpec(**SIZES), dtype=torch.bfloat16)
    unfinished = inspect(run)
    assert "not finished" in unfinished.kind and "train/train.py" in unfinished.command and "step-7" in unfinished.text()
    model.save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    (run / "finished.json").write_text('{"step": 7}')
    assert "training run, finished" in inspect(run).kind and str(run / "model") in inspect(run).command
    parts = {part.name: part for part in inspect(run / "model").parts}
    expected = {
        "vision tower": sum(p.numel() for p in model.model.vision_tower.parameters()),
        "projector": sum(p.numel() for n, p in model.model.multi_modal_projector.named_parameters() if "expert" not in n),
        "visual expert": sum(p.numel() for n, p in model.model.multi_modal_projector.named_parameters() if "expert" in n),
        "language model": sum(p.numel() for p in model.model.language_model.parameters()),  # its head is tied
        "language expert": sum(p.numel() for p in model.model.language_expert.parameters()),
    }
    assert {name: part.parameters for name, part in parts.items()} == expected
    assert parts["language expert"].dtypes.keys() == {"float32"} and parts["language model"].dtypes.keys() == {"bfloat16"}
    (facts,) = (fact for fact in inspect(run / "model").facts if fact.startswith("language_expert: "))
    assert "bottleneck 2" in facts and "layers posterior" in facts
    step = run / "checkpoints/step-7"
    (step / "manifest.json").write_text("{}")
    (step / "state.json").write_text('{"step": 7}')
    save_file({"model.language_model.layers.0.x.lora_A.default.weight": torch.zeros(2, 3)}, step / "trainable.safetensors")
    found = inspect(step)
    assert "checkpoint of a training run" in found.kind and found.parts[0].parameters == 6 and "adapters over a base" in found.text()


def test_bases_adapters_and_what_is_unknown(tmp_path: Path) -> None:
    toy = Toy.make()
    language_model = inspect(toy.save_language_model(tmp_path / "lm"))
    assert language_model.kind == "a language model" and "model.language_model" in language_model.command
    assert language_model.parts[0].parameters == sum(p.numel() for p in toy.llama.parameters())
    tower = inspect(toy.save_clip(tmp_path / "clip"))
    assert tower.kind == "a vision tower" and tower.parts[0].parameters == sum(p.numel() for p in toy.clip.parameters())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    assert inspect(tmp_path / "adapter").kind == "a peft adapter" and "org/base" in inspect(tmp_path / "adapter").text()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "whale"}')
    assert "'whale' model, which nothing here loads" in inspect(tmp_path / "odd").kind
    unknown = inspect(tmp_path)
    assert unknown.kind == "nothing known" and "clip, lm, odd" in unknown.text()
    with pytest.raises(ValueError, match="nothing is at"):
        inspect(tmp_path / "nowhere")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = Toy.make().save_language_model(tmp_path / "lm")
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        inspect(folder)
