"""The mechanism itself: a dynamic expert solves what no static one can."""

import runpy
from pathlib import Path

import pytest

run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "eval" / "planted.py"))["run"]


@pytest.mark.slow
def test_only_a_dynamic_expert_solves_the_planted_task() -> None:
    assert run("dynamic", seed=0, steps=150) >= 0.95
    for mode in ("static", "constant"):
        assert run(mode, seed=0, steps=100) < 0.35
