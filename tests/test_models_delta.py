"""Deltas: only what differs is stored, the whole comes back bit for bit, and another base is noticed and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from llava_collab.models import HyperLlavaForConditionalGeneration, HyperLlavaProcessor
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.convert import same_bits
from llava_collab.models.delta import LoraFactors, is_delta, lora_factors, save_delta
from llava_collab.models.inspect import inspect
from llava_collab.training.lora import add_adapters, merge_adapters
from llava_collab.training.recipe import TuneRecipe
from llava_collab.types import Request, Turn

EXPERTS = {"visual_expert": {"bottleneck": 4, "code_width": 8}, "language_expert": {"bottleneck": 4, "code_width": 8}}
Pair = tuple[HyperLlavaForConditionalGeneration, HyperLlavaProcessor]
Q = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def trained() -> Pair:
    """The tiny base with experts and one decoder weight that training moved; the tower and the rest are the base's."""
    model, processor = build(ModelSpec(**EXPERTS), seed=3)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "_expert" in name or name == Q:
            nn.init.normal_(parameter, std=0.3)
    return model, processor


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and [name for name in ours if not same_bits(ours[name], theirs[name])] == []


def test_a_delta_over_named_bases_holds_what_differs_and_loads_like_any_model(trained: Pair, tmp_path: Path) -> None:
    model, processor = trained
    save_delta(model, processor, tmp_path / "delta", ModelSpec(), seed=3)
    stored = set(load_file(tmp_path / "delta/delta.safetensors"))
    fresh = {name for name in model.state_dict() if "multi_modal_projector" in name or "language_expert" in name}
    assert stored == fresh | {Q}
    (tmp_path / "delta").rename(tmp_path / "x")
    again, processor_again = load(tmp_path / "x")
    assert_same(model, again)
    request = Request("q", (Turn("user", "<image>\nWhat?"),), (Image.new("RGB", (9, 7), "red"),))
    batch = processor_again.encode_requests([request])
    expected = model(**processor.encode_requests([request])).logits  # to the last bit only where memory is aligned alike
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    base = json.loads((tmp_path / "x/base.json").read_text())
    assert base["base"] == {"language_model": {"name": "tiny"}, "vision_tower": {"name": "tiny"}}
    assert base["sha256"].keys() | stored == model.state_dict().keys() - {"lm_head.weight"}
    assert "stored as a delta" in inspect(tmp_path / "x").kind and "bottleneck 4" in inspect(tmp_path / "x").text()
    assert "tiny" in (tmp_path / "x/README.md").read_text() and list(tmp_path.glob(".*")) == []


def test_a_delta_over_a_checkpoint_moves_with_it_and_can_be_trained_on(trained: Pair, tmp_path: Path) -> None:
    model, processor = trained
    for part in build(ModelSpec(), seed=3):
        part.save_pretrained(tmp_path / "runs/static")
    save_delta(model, processor, tmp_path / "runs/delta", tmp_path / "runs/static")
    assert not any("linear_" in name for name in load_file(tmp_path / "runs/delta/delta.safetensors"))  # the projector is the base's here
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert_same(model, load(tmp_path / "elsewhere/delta")[0])
    assert_same(model, build(ModelSpec(init_from=str(tmp_path / "elsewhere/delta"), **EXPERTS))[0])
    save_delta(model, processor, tmp_path / "elsewhere/second", tmp_path / "elsewhere/delta")  # a delta may be a base
    assert load_file(tmp_path / "elsewhere/second/delta.safetensors") == {}
    assert_same(model, load(tmp_path / "elsewhere/second")[0])
    (tmp_path / "elsewhere/static").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"is a delta over .*static, which is not there.*base\.json"):
        load(tmp_path / "elsewhere/delta")


def test_another_base_is_noticed_and_its_tensor_named(trained: Pair, tmp_path: Path) -> None:
    model, processor = trained
    for part in build(ModelSpec(), seed=3):
        part.save_pretrained(tmp_path / "static")
    save_delta(model, processor, tmp_path / "delta", tmp_path / "static")
    file = tmp_path / "static/model.safetensors"
    tensors = load_file(file)
    used = next(name for name in tensors if "layers.2.mlp.up_proj" in name)
    overridden = next(name for name in tensors if "layers.1.self_attn.q_proj" in name)
    original = tensors[used].clone()
    tensors[overridden] += 1
    save_file(tensors, file, {"format": "pt"})
    assert_same(model, load(tmp_path / "delta")[0])  # what the delta stores itself does not matter
    tensors[used][0, 0] = torch.nextafter(original[0, 0], torch.tensor(9.0))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"another base.*1 of \d+ tensors.*layers\.2\.mlp\.up_proj"):
        load(tmp_path / "delta")


def test_bf16_of_a_bf16_model_and_of_an_fp32_one(trained: Pair, tmp_path: Path) -> None:
    model, processor = trained
    save_delta(model, processor, tmp_path / "delta", ModelSpec(), dtype=torch.bfloat16)
    again, _ = load(tmp_path / "delta")
    for name, tensor in again.state_dict().items():
        assert same_bits(tensor, model.state_dict()[name].to(torch.float32 if "_expert" in name else torch.bfloat16)), name
    save_delta(again, processor, tmp_path / "second", ModelSpec())
    assert_same(again, load(tmp_path / "second")[0])
    assert load(tmp_path / "second", dtype=torch.float32)[0].lm_head.weight.dtype == torch.float32


def lora_trained() -> tuple[nn.Module, HyperLlavaProcessor, dict[str, LoraFactors]]:
    model, processor = build(ModelSpec())
    tuner = add_adapters(model, TuneRecipe(llm="lora", projector="lora"))
    torch.manual_seed(2)
    for name, parameter in tuner.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    factors = lora_factors(model)
    return merge_adapters(tuner), processor, factors


def test_lora_is_stored_as_its_factors(tmp_path: Path) -> None:
    merged, processor, factors = lora_trained()
    assert isinstance(merged, HyperLlavaForConditionalGeneration)
    save_delta(merged, processor, tmp_path / "delta", ModelSpec(), lora=factors)
    stored = load_file(tmp_path / "delta/delta.safetensors")
    fresh = {name for name in factors if "multi_modal_projector" in name}  # no base: stored whole
    assert {name.removesuffix(".lora_A") for name in stored if name.endswith("lora_A")} == set(factors) - fresh and Q in factors
    assert factors.keys() & stored.keys() == fresh and len(fresh) == 2
    assert_same(merged, load(tmp_path / "delta")[0])
    save_delta(merged, processor, tmp_path / "half", ModelSpec(), lora=factors, dtype=torch.bfloat16)
    assert same_bits(load(tmp_path / "half")[0].state_dict()[Q], merged.state_dict()[Q].bfloat16())


def test_lora_factors_that_are_not_the_weights_are_refused(tmp_path: Path) -> None:
    merged, processor, factors = lora_trained()
    assert isinstance(merged, HyperLlavaForConditionalGeneration)
    wrong = factors | {Q: LoraFactors(factors[Q].down_RI, factors[Q].up_OR, 2 * factors[Q].scale)}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight do not give"):
        save_delta(merged, processor, tmp_path / "delta", ModelSpec(), lora=wrong)
    with pytest.raises(ValueError, match=r"does not have: nothing\.weight"):
        save_delta(merged, processor, tmp_path / "delta", ModelSpec(), lora={"nothing.weight": factors[Q]})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_earlier_delta_and_foreign_folders_are_kept(
    trained: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = trained
    save_delta(model, processor, tmp_path / "delta", ModelSpec())
    before = (tmp_path / "delta/delta.safetensors").read_bytes()

    def torn(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors | {Q: tensors[Q] + 1}, path, metadata)

    monkeypatch.setattr("llava_collab.models.delta.save_file", torn)
    with pytest.raises(ValueError, match=r"would not hold the model.*q_proj"):
        save_delta(model, processor, tmp_path / "delta", ModelSpec())
    assert (tmp_path / "delta/delta.safetensors").read_bytes() == before and list(tmp_path.iterdir()) == [tmp_path / "delta"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(ValueError, match="is no delta"):
        save_delta(model, processor, tmp_path / "mine", ModelSpec())
    assert not is_delta(tmp_path / "mine") and (tmp_path / "mine/thesis.txt").exists()


def test_a_delta_that_lacks_a_tensor_names_it(trained: Pair, tmp_path: Path) -> None:
    model, processor = trained
    save_delta(model, processor, tmp_path / "delta", ModelSpec())
    file = tmp_path / "delta/delta.safetensors"
    tensors = load_file(file)
    del tensors[Q]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing: .*layers\.1\.self_attn\.q_proj"):
        load(tmp_path / "delta")
