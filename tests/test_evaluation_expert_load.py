"""The load of routed experts by category, on a model whose routers are set by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import program

from llava_collab.adapters import LowRankExperts
from llava_collab.models.build import ModelSpec, build


def made(folder: Path, adapter: dict[str, Any], router: float) -> Path:
    """A tiny model; its first expert reads `router` off every token that carries something."""
    model, processor = build(ModelSpec(adapter=adapter), seed=0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankExperts) and not module.config.mergeable:
                module.down[module.config.down_rank :] = 0
                module.down[module.config.down_rank] = router * torch.randn(module.down.shape[1]).sign()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def arguments(tmp_path: Path, adapter: dict[str, Any], router: float) -> Any:
    words = {"colours": "red green blue", "numbers": "one two three four five six seven"}
    rows = [
        {
            "id": f"{name}-{n}",
            "category": name,
            "family": "f",
            "conversations": [{"from": "human", "value": f"{text} {n}"}, {"from": "gpt", "value": "x"}],
        }
        for name, text in words.items()
        for n in range(6)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    categories = "".join(f"  {name}: {{metric: accuracy, max_new_tokens: 4}}\n" for name in words)
    (tmp_path / "suite.yaml").write_text(
        f"name: toy\nroot: {tmp_path}\nfiles: {{train: train.jsonl, test: test.jsonl}}\ncategories:\n{categories}"
    )
    model = made(tmp_path, adapter, router)
    return program("eval/expert_load.py"), {"model": model, "out": tmp_path / "load", "suite": tmp_path / "suite.yaml", "batch_size": 4}


def test_indifferent_routers_share_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load, settings = arguments(tmp_path, {"method": "moelora", "experts": 3, "rank": 2}, 0.0)
    torch.testing.assert_close(load.main(load.Args(**settings)), torch.ones(2, 3))
    assert "| colours | 1.000 | 1.000 | 1.000 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "load/load.json").read_text())
    assert found["between"] == pytest.approx(0, abs=1e-6) and (tmp_path / "load/load.png").stat().st_size > 1000


def test_routers_that_prefer_show_and_weights_add_up(tmp_path: Path) -> None:
    load, settings = arguments(tmp_path, {"method": "teamlora", "experts": 3, "rank": 2}, 3.0)
    loads = load.main(load.Args(**settings))
    torch.testing.assert_close(loads.sum(1), torch.full((2,), 3.0))
    assert (loads[:, 0] - loads[:, 1:].mean(1)).abs().min() > 0.02 and not torch.allclose(loads[0], loads[1], atol=1e-3)
    found = json.loads((tmp_path / "load/load.json").read_text())
    assert found["between"] > found["chance"]  # the two categories have other words


def test_chance_is_what_equal_categories_show() -> None:
    load = program("eval/expert_load.py")
    torch.manual_seed(0)
    loads_CHLK = 1 + 0.1 * torch.randn(40, 2, 25, 4)
    between, chance = load.spreads(loads_CHLK)
    assert between == pytest.approx(0.1 / 2**0.5, rel=0.05) == pytest.approx(chance, rel=0.1)


def test_one_category_is_not_compared(tmp_path: Path) -> None:
    load, settings = arguments(tmp_path, {"method": "moelora", "experts": 3, "rank": 2}, 0.0)
    with pytest.raises(ValueError, match="two questions of each"):
        load.main(load.Args(**settings, items_per_category=1))


def test_a_model_without_routed_experts_is_refused(tmp_path: Path) -> None:
    load, settings = arguments(tmp_path, {"method": "lora", "rank": 2}, 0.0)
    with pytest.raises(ValueError, match="plain LoRA"):
        load.main(load.Args(**settings))
