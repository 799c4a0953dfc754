"""The real program on the real `tiny` model: exact resume, clean stops, errors that name the sample, adapters, precision, two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, arguments, log_rows, losses, run_apart, run_here
from safetensors.torch import load_file, save_file
from synthetic import write_shapes

from llava_collab.models import experts
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.delta import LoraFactors
from llava_collab.models.modeling import HyperLlavaForConditionalGeneration
from llava_collab.training.checkpoint import damage
from llava_collab.training.lora import add_adapters, merge_adapters
from llava_collab.training.opening import exclusive, store_delta
from llava_collab.training.recipe import LoraRecipe, RecipeError, TuneRecipe

SHORT = ("--run.steps", "6", "--run.save-every", "3", "--run.no-save-first")

KILLER = """
import os, signal, sys, torch
from running import program
steps, update = 0, torch.optim.AdamW.step
def step(self, *args, **kwargs):
    global steps
    steps += 1
    if steps == {step}:
        os.kill(os.getpid(), signal.{signal})
    return update(self, *args, **kwargs)
torch.optim.AdamW.step = step
sys.exit(program().main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a break."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run_here("tiny-instruct", data, out, *SHORT) == 0
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _same(left: Path, right: Path) -> bool:
    a, b = _weights(left / "model"), _weights(right / "model")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_a_model_a_log_and_its_recipe(straight: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log_rows(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["lr"]["llm"] == 0.0
    assert rows[0].keys() >= {"grad_norm", "tokens_per_second", "supervised_fraction", "padding_share", "skipped", "experts"}
    assert rows[-1]["experts"]["language_expert"]["output_ratio"] > 0
    load(straight / "model")
    load(straight / "checkpoints" / "step-6")
    assert run_here("tiny-instruct", data, straight, *SHORT) == 0
    assert "is finished (6 steps)" in capsys.readouterr().out
    assert run_here("tiny-instruct", data, straight, *SHORT, "--optim.lr", "0.5", "--data.blind") == 1
    told = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.5" in told and "data.blind: False -> True" in told


def test_after_a_kill_the_same_command_goes_on_bit_for_bit(straight: Path, data: Path, tmp_path: Path) -> None:
    command = arguments("tiny-instruct", data, tmp_path / "run", *SHORT)
    killed = run_apart(["-c", KILLER.format(step=5, signal="SIGKILL"), *command])
    assert killed.returncode == -9 and not (tmp_path / "run" / "finished.json").exists(), killed.stderr
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 0
    assert losses(tmp_path / "run") == losses(straight)
    assert _same(tmp_path / "run", straight)


def test_a_damaged_last_checkpoint_costs_its_steps_only(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    weights = tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 0
    said = capsys.readouterr().out
    assert "step-6 is damaged" in said and "resuming from" in said
    assert losses(tmp_path / "run") == losses(straight) and _same(tmp_path / "run", straight)
    assert damage(tmp_path / "run" / "checkpoints" / "step-6") is None


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_leaves(straight: Path, data: Path, tmp_path: Path, signal: str, code: int) -> None:
    command = arguments("tiny-instruct", data, tmp_path / "run", *SHORT)
    stopped = run_apart(["-c", KILLER.format(step=4, signal=signal), *command])
    assert stopped.returncode == code, stopped.stderr
    assert "stopped after step 5 of 6; run the same command to go on" in stopped.stdout
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 0
    assert losses(tmp_path / "run") == losses(straight) and _same(tmp_path / "run", straight)


def test_a_deadline_saves_and_leaves_with_its_own_code(data: Path, tmp_path: Path) -> None:
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT, "--run.deadline-minutes", "0") == 75
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-1\n"


def test_a_step_that_is_not_finite_stops_before_the_update(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward: Any = HyperLlavaForConditionalGeneration.forward
    calls: list[int] = []

    def poisoned(self: HyperLlavaForConditionalGeneration, **inputs: Any) -> Any:
        calls.append(1)
        out = forward(self, **inputs)
        if len(calls) == 8:  # the second micro-batch of step 4
            out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(HyperLlavaForConditionalGeneration, "forward", poisoned)
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 1
    told = capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    bad = next(b for b in report["micro_batches_by_rank"][0] if not b["finite"])
    assert "error: step 4:" in told and f"rank 0: samples {', '.join(bad['sample_ids'])})" in told and len(bad["sample_ids"]) == 4
    assert len(log_rows(tmp_path / "run")) == 3 and (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-3\n"


def test_an_expert_that_is_not_used_is_found(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experts, "apply_expert", lambda x, weights, *_: x.new_zeros(*x.shape[:-1], weights[1].shape[1]))
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 1
    told = capsys.readouterr().err
    assert "error: step 1: 10 trainable parameters got no gradient" in told and "model.language_expert.decoder_weight" in told


def test_two_stages(data: Path, tmp_path: Path) -> None:
    assert run_here("tiny-align", data, tmp_path / "align", *SHORT) == 0
    before, after = (_weights(tmp_path / "align" / "checkpoints" / f"step-{step}") for step in (3, 6))
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"multi_modal_projector"}
    stage2 = (*SHORT, "--model.init-from", str(tmp_path / "align" / "model"))
    assert run_here("tiny-instruct", data, tmp_path / "instruct", *stage2) == 0
    assert load(tmp_path / "instruct" / "model")[0].config.language_expert is not None


def test_a_blind_run_exempts_what_only_images_reach(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT, "--data.blind") == 0
    assert "see no image, so they are not expected to learn" in capsys.readouterr().out
    assert {row["images"] for row in log_rows(tmp_path / "run")} == {0}


def test_adapters_resume_and_merge_into_a_plain_model(data: Path, tmp_path: Path) -> None:
    lora = (*SHORT, "--tune.llm", "lora", "--tune.lora.r", "4")
    assert run_here("tiny-instruct", data, tmp_path / "one", *lora) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-6")
    (tmp_path / "two" / "finished.json").unlink()
    assert run_here("tiny-instruct", data, tmp_path / "two", *lora) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two") and _same(tmp_path / "one", tmp_path / "two")
    saved = load_file(tmp_path / "one" / "checkpoints" / "step-6" / "trainable.safetensors")
    assert any(".lora_A." in name for name in saved) and "lm_head.weight" not in saved
    model, _ = load(tmp_path / "one" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters()) and model.config.language_expert is not None


def test_runs_with_adapters_are_stored_as_a_chain_of_small_differences(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = (*SHORT, "--tune.llm", "lora", "--tune.lora.r", "4", "--run.precision", "bf16")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_here("tiny-instruct", data, first, *lora, "--model.visual-expert", "null", "--model.language-expert", "null") == 0
    base = store_delta(first, tmp_path / "released/base")
    start = ("--model.init-from", str(first / "model"), "--tune.projector", "lora")
    assert run_here("tiny-instruct", data, second, *lora, *start) == 0
    folder = store_delta(second, tmp_path / "released/model", base)
    shutil.rmtree(first)
    assert str(tmp_path) not in (folder / "config.json").read_text() and "/" not in (folder / "config.json").read_text()
    stored = load_file(folder / "delta.safetensors")
    assert "model.multi_modal_projector.linear_1.weight.lora_A" in stored
    assert {str(t.dtype) for name, t in stored.items() if "lora" in name} == {"torch.bfloat16"}
    assert all("lora" in name or "_expert" in name for name in stored), sorted(stored)
    for dtype in (None, torch.float32):
        released, trained = load(folder, dtype=dtype)[0].state_dict(), load(second / "model", dtype=dtype)[0].state_dict()
        assert released.keys() == trained.keys() and all(torch.equal(released[name], trained[name]) for name in trained)
    with monkeypatch.context() as other_cpu:  # where a matrix product differs in its last bits, so does what LoRA factors give
        plain = LoraFactors.merged
        other_cpu.setattr(LoraFactors, "merged", lambda self, base_OI: plain(self, base_OI) * (1 + 2e-3))
        load(folder)
    tensors = load_file(base / "delta.safetensors")
    save_file(tensors | {"model.multi_modal_projector.linear_1.bias": torch.ones(64)}, base / "delta.safetensors")
    with pytest.raises(ValueError, match="was made over another .*base/delta.safetensors"):
        load(folder)
    (second / "finished.json").unlink()
    with pytest.raises(RecipeError, match="no finished run"):
        store_delta(second, tmp_path / "other")


def test_merged_logits_are_those_of_the_adapters() -> None:
    model, _ = build(ModelSpec())
    ids_BT = torch.arange(10, 30)[None]
    plain = model(input_ids=ids_BT).logits
    tuner = add_adapters(model, TuneRecipe(llm="lora", lora=LoraRecipe(r=4, alpha=8, dropout=0.0)))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = model(input_ids=ids_BT).logits
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(merge_adapters(tuner)(input_ids=ids_BT).logits, adapted, rtol=1e-4, atol=1e-5)


def test_a_part_without_any_adapter_is_told() -> None:
    model, _ = build(ModelSpec())
    with pytest.raises(RecipeError, match=r"of the llm got an adapter; correct tune\.lora\.target \('q_porj',\)"):
        add_adapters(model, TuneRecipe(llm="lora", projector="lora", lora=LoraRecipe(target=("q_porj",))))


def test_four_bits_need_a_gpu(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_here("tiny-instruct", data, tmp_path / "run", "--tune.llm", "lora4bit") == 1
    assert "lora4bit needs a CUDA GPU. Use tune.llm: lora" in capsys.readouterr().err


def test_bf16_trains_fp32_weights_beside_frozen_bf16_ones(data: Path, tmp_path: Path, straight: Path) -> None:
    assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT, "--run.precision", "bf16") == 0
    saved = _weights(tmp_path / "run" / "checkpoints" / "step-6")
    kinds = {name: {t.dtype for n, t in saved.items() if n.startswith(name)} for name in ("vision_tower", "multi_modal_projector")}
    assert kinds == {"vision_tower": {torch.bfloat16}, "multi_modal_projector": {torch.float32}}
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=2e-2)
    model, _ = load(tmp_path / "run" / "model")
    kept = {name: p.dtype for name, p in model.named_parameters()}
    assert kept["lm_head.weight" if "lm_head.weight" in kept else "model.language_model.embed_tokens.weight"] == torch.bfloat16
    assert kept["model.language_expert.base"] == torch.float32


def test_cached_features_and_checkpointing_change_nothing_but_rounding(
    data: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))
    assert run_here("tiny-instruct", data, tmp_path / "cached", *SHORT, "--data.feature-cache") == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(straight), rel=1e-2)
    assert run_here("tiny-instruct", data, tmp_path / "recomputed", *SHORT, "--run.gradient-checkpointing") == 0
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.parametrize("file", ["missing.jsonl", "bad.jsonl"])
def test_data_that_can_not_be_used_is_told(data: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text(data.read_text().replace(".png", ".gone"), encoding="utf-8")
    assert run_here("tiny-instruct", tmp_path / file, tmp_path / "run", *SHORT) == 1
    assert ("no file" if file == "missing.jsonl" else "missing_image") in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(data: Path, tmp_path: Path, straight: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train" / "train.py")]
    command = [*torchrun, *arguments("tiny-instruct", data, tmp_path / "run", *SHORT)]
    done = run_apart(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-5)
    assert (tmp_path / "run" / "checkpoints" / "step-6" / "random-1.json").exists()


def test_two_trainings_in_one_folder_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(tmp_path / "run"):
        assert run_here("tiny-instruct", data, tmp_path / "run", *SHORT) == 1
    assert "another process is training" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()
