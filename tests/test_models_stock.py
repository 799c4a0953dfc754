"""With the experts off the model is stock LLaVA: same logits, same files, in both directions; and our own files come back whole."""

from pathlib import Path

import pytest
import torch
from toy import BOTH, DECODERS, pad_batch, pixels, prompt, toy_config, toy_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from llava_collab.models import HyperLlavaForConditionalGeneration, HyperLlavaModel


def batch() -> dict[str, torch.Tensor]:
    return pad_batch([prompt(6, seed=1), prompt(9, seed=2)], "right") | {"pixel_values": pixels(2)}


def stock(decoder: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    keep = {k: v for k, v in toy_config(decoder).to_dict().items() if k not in ("model_type", "visual_expert", "language_expert")}
    return LlavaForConditionalGeneration(LlavaConfig(**keep)).eval()


def clean(report: dict) -> bool:
    return not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_loss_and_generation_equal_stock(decoder: str) -> None:
    theirs, ours = stock(decoder), toy_model(decoder)
    ours.load_state_dict(theirs.state_dict())
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    a, b = theirs(**inputs, labels=labels), ours(**inputs, labels=labels)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    left = pad_batch([prompt(6, seed=1), prompt(9, seed=2)]) | {"pixel_values": pixels(2)}
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        kwargs = {"max_new_tokens": 5, "do_sample": False} | how
        assert torch.equal(theirs.generate(**left, **kwargs), ours.generate(**left, **kwargs)), how


@pytest.mark.parametrize("decoder", DECODERS)
def test_files_travel_both_ways(decoder: str, tmp_path: Path) -> None:
    theirs = stock(decoder)
    theirs.save_pretrained(tmp_path / "stock")
    ours, report = HyperLlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert clean(report)
    inputs = batch()
    assert torch.equal(theirs(**inputs).logits, ours.eval()(**inputs).logits)
    ours.save_pretrained(tmp_path / "ours")
    back, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert clean(report) and torch.equal(theirs(**inputs).logits, back.eval()(**inputs).logits)


@pytest.mark.parametrize("decoder", DECODERS)
def test_experts_survive_save_auto_load_and_renaming(decoder: str, tmp_path: Path) -> None:
    model, inputs = toy_model(decoder, **BOTH), batch()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "hyper-llava")
    (tmp_path / "hyper-llava").rename(tmp_path / "x")
    again, report = HyperLlavaForConditionalGeneration.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert clean(report) and torch.equal(expected, again.eval()(**inputs).logits)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert type(auto) is HyperLlavaForConditionalGeneration and torch.equal(expected, auto.eval()(**inputs).logits)
    headless = AutoModel.from_pretrained(tmp_path / "x")
    assert type(headless) is HyperLlavaModel
    torch.testing.assert_close(headless.eval()(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_fresh_experts_change_no_bit(decoder: str) -> None:
    off, on = toy_model(decoder), toy_model(decoder, trained=False, **BOTH)
    on.load_state_dict(off.state_dict(), strict=False)
    inputs = batch()
    assert torch.equal(off(**inputs).logits, on(**inputs).logits)


def test_experts_in_fp32_when_loaded_in_bf16(tmp_path: Path) -> None:
    toy_model(**BOTH).save_pretrained(tmp_path)
    model = HyperLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "_expert" in n} == {torch.float32}
    assert model(**batch()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50), "a decoder with `layers`; GPT2Model has none"),
        (GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32, vocab_size=50), "attention"),
        (GraniteConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32, vocab_size=50), "unscaled"),
    ],
)
def test_a_block_of_another_shape_is_refused(other: PreTrainedConfig, says: str) -> None:
    config = toy_config()
    config.text_config, config.language_expert = other, toy_config(language_expert={}).language_expert
    with pytest.raises(ValueError, match=says):
        HyperLlavaForConditionalGeneration(config)
