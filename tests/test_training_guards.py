"""The guards: nothing that is not finite reaches the weights, and parameters that do not learn are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from llava_collab.training.components import gradient_norms
from llava_collab.training.engines import DataParallel
from llava_collab.training.guards import Coverage, CoverageError, NonFiniteError, check_finite
from llava_collab.training.log import ExpertHealth

PROJECTOR, HEAD, UNUSED = "model.multi_modal_projector.linear_1.weight", "lm_head.weight", "lm_head.unused"


def _toy() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(3)) for name in (PROJECTOR, HEAD)}


def test_non_finite_loss_names_step_rank_and_samples(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, toy = Accelerator(cpu=True), _toy()
    toy[HEAD].grad = torch.tensor([1.0, float("inf"), 0.0])
    losses = [torch.tensor(0.5), torch.tensor(float("nan"))]
    with pytest.raises(NonFiniteError, match=r"step 7: .*rank 0: samples c, d\)") as caught:
        check_finite(7, float("nan"), losses, [["a", "b"], ["c", "d"]], gradient_norms(toy), accelerator, tmp_path)
    assert "llm inf" in str(caught.value)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert report["step"] == 7 and report["grad_norms"] == {"llm": "inf"}
    assert [b["sample_ids"] for b in report["micro_batches_by_rank"][0] if not b["finite"]] == [["c", "d"]]


def test_non_finite_gradient_alone_names_all_samples(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, toy = Accelerator(cpu=True), _toy()
    toy[HEAD].grad = torch.full((3,), float("nan"))
    with pytest.raises(NonFiniteError, match="samples a, b"):
        check_finite(1, 0.5, [torch.tensor(0.5)], [["a", "b"]], gradient_norms(toy), accelerator, tmp_path)
    toy[HEAD].grad = torch.ones(3)
    check_finite(1, 0.5, [torch.tensor(0.5)], [["a", "b"]], gradient_norms(toy), accelerator, tmp_path)


def _engine(toy: dict[str, nn.Parameter]) -> DataParallel:
    engine = DataParallel(None, Accelerator(cpu=True))
    engine.trainable = toy
    return engine


def _run(coverage: Coverage, toy: dict[str, nn.Parameter], move: set[str], steps: int, images: bool = True, rate: float = 0.1) -> None:
    for step in range(1, steps + 1):
        coverage.after_backward(step, set(), images)
        with torch.no_grad():
            for name in move:
                toy[name].sub_(rate)
        coverage.after_step(step, {"projector": rate, "llm": rate}, images)


def test_a_parameter_without_gradient_is_named() -> None:
    toy = _toy() | {UNUSED: nn.Parameter(torch.ones(2))}
    with pytest.raises(CoverageError, match=f"1 trainable parameters got no gradient: {UNUSED}"):
        Coverage(_engine(toy)).after_backward(1, {UNUSED}, has_images=True)


def test_image_parts_count_from_the_first_images() -> None:
    toy, coverage = _toy(), None
    coverage = Coverage(_engine(toy))
    coverage.after_backward(1, {PROJECTOR}, has_images=False)
    with pytest.raises(CoverageError, match=PROJECTOR):
        coverage.after_backward(2, {PROJECTOR}, has_images=True)
    _run(Coverage(_engine(toy)), toy, {HEAD}, 6, images=False)  # the projector may stand still as long as no image comes
    assert PROJECTOR in coverage.unchecked()[0]


def test_a_parameter_that_stands_still_is_named_after_three_steps() -> None:
    toy = _toy()
    _run(Coverage(_engine(toy)), toy, {HEAD}, 2)
    with pytest.raises(CoverageError, match=f"step 3: 1 trainable parameters have not moved after 3 steps: {PROJECTOR}"):
        _run(Coverage(_engine(toy)), toy, {HEAD}, 3)


def test_steps_without_a_rate_and_exempt_parts_do_not_count() -> None:
    toy = _toy()
    _run(Coverage(_engine(toy)), toy, set(), 5, rate=0.0)
    coverage = Coverage(_engine(toy), exempt=frozenset({"projector"}))
    _run(coverage, toy, {HEAD}, 4)
    assert coverage.unchecked() == []


def test_a_rate_too_small_to_see_is_waited_for() -> None:
    toy = _toy()
    _run(Coverage(_engine(toy)), toy, {HEAD}, 5, rate=1e-7)  # 1 - 1e-7 may round to 1 in fp32: no alarm yet


def test_an_expert_that_drowns_the_model_is_told_once_until_it_falls() -> None:
    health = ExpertHealth(nn.Module())
    loud, quiet = {"language_expert": {"output_ratio": 1.5}}, {"language_expert": {"output_ratio": 0.5}}
    assert [len(health.alarms(figures)) for figures in (quiet, loud, loud, quiet, loud)] == [0, 1, 0, 0, 1]
    assert "1.5 times" in ExpertHealth(nn.Module()).alarms(loud)[0]


def test_an_expert_that_died_is_told_but_not_one_that_has_not_begun() -> None:
    health = ExpertHealth(nn.Module())
    ratios = (0.0, 0.0005, 0.114, 0.03, 0.001, 0.0009)
    told = [health.alarms({"visual_expert": {"output_ratio": ratio}}) for ratio in ratios]
    assert [len(lines) for lines in told] == [0, 0, 0, 0, 1, 0]
    assert "once it was 0.11 times; it is dying. Lower optim.visual_expert_lr" in told[4][0]
    assert health.alarms({"visual_expert": {}}) == []  # a step without images has no figures
