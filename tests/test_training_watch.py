"""What a run tells of itself: which rank stalls, jumps of the loss, arithmetic and MFU, curves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from running import RECIPES, log_rows, run_here
from synthetic import write_shapes

from llava_collab.cli import main as cli
from llava_collab.files import write_json
from llava_collab.training import meter as meter_module
from llava_collab.training.estimate import estimate, student
from llava_collab.training.guards import LossSpikes
from llava_collab.training.meter import Meter, costs
from llava_collab.training.recipe_file import load_recipe, parse_command
from llava_collab.training.step import Counts
from llava_collab.training.tables import earlier_stages
from llava_collab.training.watchdog import WAITING, Watchdog, lost_contact


def test_the_rank_at_work_is_named_not_those_that_wait(tmp_path: Path) -> None:
    said: list[str] = []
    for rank, phase in ((1, "reading data"), (2, WAITING)):
        state = {"rank": rank, "host": f"node{rank}", "step": 7, "phase": phase, "seconds": 61.0, "time": time.time() + 60, "stack": []}
        write_json(tmp_path / f"stalls/rank-{rank}.json", state)
    dog = Watchdog(tmp_path, 0, 0.2, said.append)
    dog.step = 7
    with dog.phase(WAITING):
        time.sleep(0.8)
    dog.close()
    assert len(said) == 1 and "STALLED at step 7: rank 1 on node1 has been reading data for 61 s; 2 others wait for it" in said[0]
    own = json.loads((tmp_path / "stalls/rank-0.json").read_text())
    assert own["phase"] == WAITING and "time.sleep(0.8)" in "".join(own["stack"])


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(tmp_path, 0, 0.4, said.append)
    for _ in range(8):
        with dog.phase("reading data"):
            time.sleep(0.1)
    dog.close()
    assert said == [] and not (tmp_path / "stalls").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1", True), ("NCCL error: unhandled", True), ("shape", False)],
)
def test_lost_ranks_get_a_hint(text: str, told: bool) -> None:
    hint = lost_contact(RuntimeError(text))
    assert (hint is not None) == told
    assert not told or "GLOO_SOCKET_IFNAME" in str(hint)


def test_a_jump_of_the_loss_is_told_and_noise_is_not(tmp_path: Path) -> None:
    spikes = LossSpikes()
    losses = [1.0 + 0.05 * (k % 5) for k in range(30)]
    assert [spikes.look(loss) for loss in losses] == [None] * 30
    assert spikes.look(3.0) == pytest.approx(1.1)
    assert spikes.look(1.2) is None
    assert [LossSpikes().look(value) for value in (1.0, 50.0)] == [None, None], "too few losses to know what is usual"


def test_a_spike_names_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(LossSpikes, "look", lambda self, loss: 0.5 if loss < 5.6 else None)
    assert run_here("tiny-instruct", write_shapes(tmp_path / "data"), tmp_path / "run", "--run.steps", "12", "--run.save-every", "12") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()]
    assert rows and sum(len(batch["sample_ids"]) for batch in rows[0]["micro_batches_by_rank"][0]) == 8
    assert sum(batch["loss"] for batch in rows[0]["micro_batches_by_rank"][0]) == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert "the loss jumped to" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "options"), [("vicuna-7b-instruct", ()), ("vicuna-7b-align", ()), ("vicuna-7b-instruct-lora", ())])
def test_counted_arithmetic_is_that_of_the_estimate(name: str, options: tuple[str, ...]) -> None:
    recipe = parse_command([str(RECIPES / f"{name}.yaml"), "--run.no-gradient-checkpointing", *options], "")
    earlier = earlier_stages(RECIPES)
    found = costs(student(recipe, earlier), cached=False)
    tokens = 1024
    counts = Counts(positions=tokens, samples=1, images=1, squares=tokens**2)
    flops = sum(getattr(counts, unit) * cost for unit, cost in found.items())
    assert flops == pytest.approx(estimate(recipe, earlier, tokens).step_flops, rel=0.05)


def test_mfu_is_flops_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = parse_command([str(RECIPES / "tiny-instruct.yaml"), "--run.peak-tflops", "2"], "")
    model = student(recipe, {})
    meter = Meter(model, recipe, Accelerator(cpu=True))
    clock = iter((100.0, 101.0, 104.0))
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(clock))
    with meter.waiting():
        pass
    meter._began = 94.0
    row = meter.read(Counts(tokens=80, positions=100, samples=2, images=1))
    assert row["data_wait_seconds"] == [1.0] and row["tokens_per_second"] == 8.0 and row["seconds"] == 10.0
    expected = sum({"positions": 100, "samples": 2, "images": 1, "squares": 0}[unit] * cost for unit, cost in costs(model, False).items())
    assert row["mfu"] == pytest.approx(expected / 10 / 2e12) and row["tflops_per_second"] == pytest.approx(expected / 10 / 1e12)


def test_no_peak_no_mfu() -> None:
    assert meter_module.known_peak(torch.device("cpu")) is None
    assert load_recipe(RECIPES / "tiny-instruct.yaml").run.peak_tflops is None


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "data")
    for name in ("a", "b"):
        assert run_here("tiny-instruct", data, tmp_path / name, "--run.steps", "4", "--run.save-every", "4") == 0
    assert {"data_wait_seconds", "memory_gib", "tflops_per_second"} <= log_rows(tmp_path / "a")[0].keys()
    with pytest.raises(SystemExit) as done:
        cli(["plot", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.value.code == 0
    with Image.open(tmp_path / "a/curves.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20, "a blank picture"
    with pytest.raises(SystemExit) as done:
        cli(["plot", str(tmp_path / "nothing")])
    assert done.value.code == 1 and "has no log.jsonl" in capsys.readouterr().err
