"""Building and loading: nothing missing, nothing unexpected, only config.json decides; prompts of a chat equal those of training."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy import toy_model
from transformers import AutoProcessor, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from llava_collab.collab.single import Single
from llava_collab.data.collate import Collator
from llava_collab.models import HyperLlavaProcessor, LanguageExpertConfig
from llava_collab.models.build import ModelSpec, build, extract_features, feature_cache, load, tower_key
from llava_collab.models.towers import IMAGENET_MEAN, IMAGENET_STD, FusedVisionConfig, FusedVisionModel
from llava_collab.types import Request, Turn

EXPERTS = {"visual_expert": {"bottleneck": 4, "code_width": 8}, "language_expert": {"bottleneck": 4, "code_width": 8}}


def picture(colour: str = "red", size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture(scope="module")
def tiny():
    model, processor = build(ModelSpec(**EXPERTS), seed=0)
    for expert in (model.model.multi_modal_projector.visual_expert, model.model.language_expert):
        for parameter in (expert.decoder_weight, expert.base):
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tiny_is_tiny_and_depends_on_the_seed_alone(tiny) -> None:
    model, _ = tiny
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    a, b, c = (build(ModelSpec(), seed=s)[0].lm_head.weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_checkpoint_comes_back_whole_under_any_name(tiny, folder: Path, tmp_path: Path) -> None:
    model, processor = tiny
    request = Request("q", (Turn("user", "<image>\nWhat is it?"),), (picture(),))
    expected = model(**processor.encode_requests([request])).logits
    folder.rename(tmp_path / "x")
    again, processor_again = load(tmp_path / "x")
    assert isinstance(processor_again, HyperLlavaProcessor) and type(AutoProcessor.from_pretrained(tmp_path / "x")) is HyperLlavaProcessor
    assert torch.equal(again(**processor_again.encode_requests([request])).logits, expected)
    assert tower_key(again, processor_again) == tower_key(model, processor)
    assert again.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_cached_features_are_the_same_whatever_the_dtype_of_the_model(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))
    image = tmp_path / "a.png"
    picture().save(image)
    in_bf16, in_fp32 = load(folder, dtype=torch.bfloat16), load(folder, dtype=torch.float32)
    assert tower_key(*in_bf16) == tower_key(*in_fp32)
    written = feature_cache(*in_fp32, [image])
    expected = extract_features(in_bf16[0], in_bf16[1].pixel_values([picture()]))[0]
    assert torch.equal(written.get(image), expected)
    assert torch.equal(feature_cache(*in_bf16, [image]).get(image), expected)
    assert next(in_fp32[0].model.vision_tower.parameters()).dtype == torch.float32


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_a_checkpoint_that_does_not_fit_names_the_key(folder: Path, damage: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "multi_modal_projector.linear_1.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "unexpected":
        tensors[key + "_2"] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{damage}: .*linear_1\.weight"):
        load(folder)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' checkpoint"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        load(tmp_path / "empty")


def test_experts_can_be_added_to_a_static_checkpoint_without_changing_it(tmp_path: Path) -> None:
    static, processor = build(ModelSpec(), seed=3)
    static.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hyper, processor = build(ModelSpec(init_from=str(tmp_path), template="chatml", **EXPERTS), seed=3)
    batch = processor.encode_requests([Request("q", (Turn("user", "<image>\nWhat?"),), (picture(),))])
    assert torch.equal(static(**batch).logits, hyper(**batch).logits)
    assert json.loads((tmp_path / "config.json").read_text())["visual_expert"] is None
    assert hyper.config.language_expert == asdict(LanguageExpertConfig(bottleneck=4, code_width=8))  # written out in full
    for expert in (hyper.model.language_expert, hyper.model.multi_modal_projector.visual_expert):
        assert expert.base.abs().sum() > 0 and not expert.decoder_weight.any()


def test_teacher_forced_logits_of_three_turns_equal_the_chats(tiny) -> None:
    model, processor = tiny
    images = [picture("red"), picture("blue")]
    turns = [
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "a red square"),
        Turn("user", "And this? <image>"),
        Turn("assistant", "blue"),
        Turn("user", "Which is left?"),
        Turn("assistant", "the red one"),
    ]
    full = processor.encode(turns, images)
    batch = Collator(0)([full])
    forced = model(**{k: v for k, v in batch.items() if k != "sample_ids"}).logits[0]
    for end in (2, 4, 6):
        before, answer = turns[: end - 1], turns[end - 1]
        shown = images[: sum(turn.text.count("<image>") for turn in before)]
        asked = processor.encode_requests([Request("chat", tuple(before), tuple(shown))])
        start = asked["input_ids"].shape[1]
        assert full["input_ids"][:start].tolist() == asked["input_ids"][0].tolist()
        assert asked["guidance_mask"][0].tolist() == full["guidance_mask"][:start].tolist()
        out = model(**asked, use_cache=True)
        ids = full["input_ids"][start:].tolist()[: len(processor.tokenizer.encode(answer.text)) + 1]
        logits = [out.logits[0, -1]]
        for token in ids[:-1]:
            out = model(
                input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, expert_weights=out.expert_weights, use_cache=True
            )
            logits.append(out.logits[0, -1])
        torch.testing.assert_close(torch.stack(logits), forced[start - 1 : start - 1 + len(ids)], rtol=1e-5, atol=1e-5)


def test_hugging_face_messages_take_the_same_road(tiny) -> None:
    model, processor = tiny
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]}]
    ours = processor.encode_requests([Request("q", (Turn("user", "<image>\nWhat is it?"),), (picture(),))])
    theirs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_one_bad_request_does_not_cost_the_others_their_answers(tiny) -> None:
    model, processor = tiny
    good = Request("good", (Turn("user", "<image>\nWhat is it?"),), (picture(),), max_new_tokens=4)
    bad = Request("bad", (Turn("user", "<image> <image>"),), (picture(),), max_new_tokens=4)
    gone = Request("gone", (Turn("user", "<image>"),), (Path("no-such.png"),), max_new_tokens=4)
    answers = Single(model, processor, "tiny").generate([good, bad, gone])
    assert answers[0].error is None and answers[0].usage.images == 1 and answers[0].usage.generated_tokens > 0
    assert re.search("bad.*2 .*1 images", answers[1].error or "") and "no-such.png" in (answers[2].error or "")
    together = Single(model, processor, "tiny").generate([good, good])
    assert together[0].text == answers[0].text == together[1].text


def test_a_pair_of_towers_is_each_tower_on_one_grid() -> None:
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14)
    clip = toy_model().config.vision_config
    spec = [
        {"config": dino.to_dict() | {"model_type": "dinov2"}, "layer": 2, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        {"config": clip.to_dict() | {"image_size": 56, "patch_size": 14}, "layer": -2, "mean": [0.5] * 3, "std": [0.5] * 3},
    ]
    config = FusedVisionConfig(towers=spec, grid=4, shuffle=2, image_size=56)
    assert (config.hidden_size, config.patch_size) == (4 * (24 + 32), 28)
    pair = FusedVisionModel(config).eval()
    pixels = torch.randn(2, 3, 56, 56)
    out = pair(pixels)
    assert out.hidden_states[-1].shape == (2, 4, config.hidden_size)
    alone = Dinov2Model(dino).eval()
    alone.load_state_dict(pair.towers[0].state_dict())
    state_NPV = alone(pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    first = torch.nn.functional.layer_norm(state_NPV, (24,))[:, [0, 1, 4, 5]]  # the four patches under the first token
    got = out.last_hidden_state[:, 0, : 24 * 4].view(2, 24, 4).transpose(1, 2)
    torch.testing.assert_close(got, first)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    raw = pixels * std + mean
    torch.testing.assert_close(pixels * pair.scale_1 + pair.shift_1, (raw - 0.5) / 0.5)


def test_features_of_a_batch_are_those_of_each_image(tiny) -> None:
    model, processor = tiny
    pixels = processor.pixel_values([picture("red"), picture("green", (9, 31))])
    both = extract_features(model, pixels)
    assert both.shape == (2, processor.tokens_per_image, model.config.vision_config.hidden_size)
    torch.testing.assert_close(both[1:], extract_features(model, pixels[1:]))


def test_unknown_template_and_base_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown template"):
        build(ModelSpec(template="vicuna"))
    with pytest.raises((ValueError, OSError)):
        build(ModelSpec(language_model="smollm2-136m"))
