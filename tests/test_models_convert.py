"""Conversion: LLaVA-1.5 in both layouts and all variants gives a reference's logits; what is damaged or foreign is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from original_llava import IMAGE_TOKEN_INDEX, VISION, Toy
from PIL import Image
from safetensors.torch import load_file, save_file
from toy import DECODERS, toy_config
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_collab.data.conversation import TEMPLATES
from llava_collab.models import HyperLlavaForConditionalGeneration, HyperLlavaProcessor
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.chat_templates import taking_parts, taking_strings
from llava_collab.models.convert import convert, same_bits
from llava_collab.models.inspect import inspect
from llava_collab.types import Request, Turn

IDS_T = torch.tensor([1, 70, 80, IMAGE_TOKEN_INDEX, 90, 100, 110])
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LLAVA_HF_TEMPLATE = (  # of llava-hf/llava-1.5-7b-hf: reads typed parts only
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.make()


@pytest.fixture
def clip(toy: Toy, tmp_path: Path) -> Path:
    return toy.save_clip(tmp_path / "clip")


@torch.no_grad()
def logits(model: torch.nn.Module, rows: int) -> torch.Tensor:
    """Of the same prompt in our terms: 16 image tokens in place of the mark; the vocabulary without what conversion adds."""
    at = IDS_T.tolist().index(IMAGE_TOKEN_INDEX)
    ids = torch.cat([IDS_T[:at], torch.full((16,), model.config.image_token_id), IDS_T[at + 1 :]])[None]
    return model.eval()(input_ids=ids, pixel_values=PIXELS, attention_mask=torch.ones_like(ids)).logits[0, :, :rows]


def check(out: Path, toy: Toy) -> tuple[HyperLlavaForConditionalGeneration, HyperLlavaProcessor]:
    """The folder loads without a complaint and computes what the reference computes."""
    model, processor = load(out)
    rows = toy.llama.config.vocab_size
    torch.testing.assert_close(logits(model, rows), toy.logits(IDS_T, PIXELS), rtol=1e-5, atol=1e-5)
    assert list(out.glob("*.bin")) == [] and list(out.parent.glob(".*")) == []
    return model, processor


@pytest.mark.parametrize(("tower", "kind"), [(True, "llava"), (False, "llava_llama")])
def test_a_full_original(toy: Toy, clip: Path, tmp_path: Path, tower: bool, kind: str) -> None:
    source = toy.save_full(tmp_path / "liuhaotian", clip, tower=tower, model_type=kind)
    assert "convert" in inspect(source).command and "a LLaVA in the original layout" in inspect(source).kind
    with pytest.raises(ValueError, match="llava-collab convert"):
        load(source)
    model, processor = check(convert(source, tmp_path / "out"), toy)
    old = toy.llama.config.vocab_size  # 259; as in llava-hf: <image>, then <pad>, then up to a multiple of 64
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [old, old + 1] and processor.tokenizer.pad_token == "<pad>"
    assert model.config.image_token_id == old and model.config.text_config.pad_token_id == old + 1 == model.generation_config.pad_token_id
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == 320
    for name in ("lm_head", "model.language_model.embed_tokens"):
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(weight[old:], weight[:old].mean(0).expand(320 - old, -1))
    assert processor.chat_template == TEMPLATES["vicuna_v1"] and processor.image_aspect_ratio == "pad"
    batch = processor.encode_requests([Request("q", (Turn("user", "<image>\nWhat?"),), (Image.new("RGB", (40, 20), "red"),))])
    assert (batch["input_ids"] == old).sum() == 16 and model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_a_projector_alone_over_a_language_model(toy: Toy, clip: Path, tmp_path: Path) -> None:
    base = toy.save_language_model(tmp_path / "vicuna")
    source = toy.save_config(tmp_path / "pretrain", clip, tune_mm_mlp_adapter=True)
    torch.save(toy.projector_tensors(), source / "mm_projector.bin")
    with pytest.raises(ValueError, match="names no base.*--base"):
        convert(source, tmp_path / "out")
    assert "projector" in inspect(source).kind and "--base BASE" in inspect(source).command
    _, processor = check(convert(source, tmp_path / "out", base=str(base)), toy)
    assert processor.chat_template == TEMPLATES["plain"]
    toy.save_config(source, clip, _name_or_path=str(base))
    check(convert(source, tmp_path / "again"), toy)


@pytest.mark.parametrize("over", ["language model", "full model"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_lora_over_a_base(toy: Toy, clip: Path, tmp_path: Path, over: str, suffix: str) -> None:
    base = toy.save_full(tmp_path / "b", clip) if over == "full model" else toy.save_language_model(tmp_path / "b")
    source = toy.save_config(tmp_path / "lora", clip)
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base), "bias": "none", "use_rslora": False}
    (source / "adapter_config.json").write_text(json.dumps(adapter))
    trained, factors = Toy.make(), {}
    torch.manual_seed(5)
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}"
        weight = trained.llama.get_submodule(name).weight.data
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        weight += 3 * up @ down
        factors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    torch.nn.init.normal_(trained.projector[0].weight)
    torch.save(factors, source / "adapter_model.bin") if suffix == "bin" else save_file(factors, source / "adapter_model.safetensors")
    torch.save(trained.projector_tensors("base_model.model.model."), source / "non_lora_trainables.bin")
    check(convert(source, tmp_path / "out"), trained)
    assert inspect(source).kind.startswith("a LoRA in the original layout") and str(base) in "".join(inspect(source).facts)
    (source / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks non_lora_trainables\.bin"):
        convert(source, tmp_path / "out2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"missing: model\.mm_projector\.2\.bias"),
        ("unexpected", r"unexpected: model\.layers\.7\.mlp\.up_proj\.weight"),
        ("mismatched", r"mismatched: model\.mm_projector\.0\.weight \[32, 7\] instead of \[32, 24\]"),
        ("shard", r"lists pytorch_model-00002-of-00002\.bin, which is not there"),
        ("pickle", r"pytorch_model-00001-of-00002\.bin is not a plain file of tensors"),
    ],
)
def test_a_damaged_original_names_what_is_wrong(toy: Toy, clip: Path, tmp_path: Path, damage: str, message: str) -> None:
    source = toy.save_full(tmp_path / "source", clip)
    where = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    keys = {"missing": "model.mm_projector.2.bias", "mismatched": "model.mm_projector.0.weight"}
    file = source / where.get(keys.get(damage, ""), "pytorch_model-00001-of-00002.bin")
    held = torch.load(file, weights_only=True)
    if damage == "missing":
        del held[keys[damage]]
    elif damage == "unexpected":
        held["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    elif damage == "mismatched":
        held[keys[damage]] = torch.zeros(32, 7)
    elif damage == "shard":
        (source / "pytorch_model-00002-of-00002.bin").unlink()
    else:
        held["x"] = Path  # code by reference: what pickles can smuggle in
    torch.save(held, file)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"mm_projector_type": "linear"},
        {"image_aspect_ratio": "anyres"},
        {"mm_use_im_start_end": True},
        {"model_type": "llava_mpt"},
        {"mm_vision_select_feature": "slicefour_patch"},
    ],
)
def test_settings_that_llava_15_does_not_have_are_refused_by_name(toy: Toy, clip: Path, tmp_path: Path, change: dict) -> None:
    source = toy.save_full(tmp_path / "source", clip, **change)
    (key, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{key} is {value!r}"):
        convert(source, tmp_path / "out")


def test_the_tower_inside_wins_over_the_named_one(toy: Toy, clip: Path, tmp_path: Path) -> None:
    source = toy.save_full(tmp_path / "tuned", clip)
    other = Toy.make().clip
    torch.nn.init.normal_(other.embeddings.patch_embedding.weight)
    other.save_pretrained(clip)
    model, _ = check(convert(source, tmp_path / "out"), toy)
    torch.save({}, tmp_path / "empty.bin")
    key = VISION.removesuffix("vision_model.")
    assert any(name.startswith(key) for name in toy.tensors(tower=True)) and not any(
        name.startswith(key) for name in toy.tensors(tower=False)
    )


def test_half_precision_stays(toy: Toy, clip: Path, tmp_path: Path) -> None:
    half = Toy.make()
    half.llama.half()
    half.projector.half()
    model, _ = load(convert(half.save_full(tmp_path / "source", clip, tower=False), tmp_path / "out"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_to_stock_and_back(toy: Toy, clip: Path, tmp_path: Path) -> None:
    source = toy.save_full(tmp_path / "source", clip)
    convert(source, tmp_path / "ours")
    stock_folder = convert(tmp_path / "ours", tmp_path / "stock", to="stock")
    stock, report = LlavaForConditionalGeneration.from_pretrained(stock_folder, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert type(AutoModelForImageTextToText.from_pretrained(stock_folder)) is LlavaForConditionalGeneration
    torch.testing.assert_close(logits(stock, toy.llama.config.vocab_size), toy.logits(IDS_T, PIXELS), rtol=1e-5, atol=1e-5)
    processor = AutoProcessor.from_pretrained(stock_folder, backend="pil")
    assert type(processor) is LlavaProcessor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nWhat? ASSISTANT:")
    image = Image.new("RGB", (32, 32), "red")
    theirs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    ours = load(tmp_path / "ours")[1].encode_requests([Request("q", (Turn("user", "<image>\nWhat?"),), (image,))])
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist() and torch.equal(theirs["pixel_values"], ours["pixel_values"])
    again, _ = check(convert(stock_folder, tmp_path / "again"), toy)
    first = load(tmp_path / "ours")[0].state_dict()
    assert all(same_bits(first[name], tensor) for name, tensor in again.state_dict().items())
    assert "stock LLaVA" in inspect(stock_folder).kind and "a HyperLLaVA" in inspect(tmp_path / "again").kind


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_llava_hf_folder_with_its_own_names_and_template_loads_as_it_is(decoder: str, toy: Toy, tmp_path: Path) -> None:
    drop = ("model_type", "visual_expert", "language_expert")
    config = LlavaConfig(**{key: value for key, value in toy_config(decoder).to_dict().items() if key not in drop})
    torch.manual_seed(0)
    stock = LlavaForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "language_model.lm_head.weight" in names or "lm_head.weight" in names
    images = Toy.make().save_clip(tmp_path / "clip")
    _, processor = build(ModelSpec())
    LlavaProcessor(
        image_processor=AutoProcessor.from_pretrained(images, backend="pil"),
        tokenizer=processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_HF_TEMPLATE,
    ).save_pretrained(tmp_path)
    model, processor = load(tmp_path)
    torch.testing.assert_close(logits(model, 120), logits(stock, 120), rtol=1e-5, atol=1e-6)
    encoded = processor.encode([Turn("user", "<image>\nWhat is it?")], [Image.new("RGB", (9, 9))], add_generation_prompt=True)
    text = processor.tokenizer.decode(encoded["input_ids"][encoded["input_ids"] != processor.tokenizer.convert_tokens_to_ids("<image>")])
    assert text == "USER: \nWhat is it? ASSISTANT:" and processor.tokens_per_image == 16


def test_templates_take_strings_and_parts(toy: Toy) -> None:
    tokenizer = toy.tokenizer
    strings = [{"role": "user", "content": "<image>\nA?"}, {"role": "assistant", "content": "b"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}, strings[1]]
    for template in TEMPLATES.values():
        assert taking_strings(template, tokenizer) == template
        expected = tokenizer.apply_chat_template(strings, chat_template=template, tokenize=False)
        both = taking_parts(template)
        assert taking_parts(both) == both
        assert tokenizer.apply_chat_template(parts, chat_template=both, tokenize=False) == expected
        assert tokenizer.apply_chat_template(strings, chat_template=both, tokenize=False) == expected


def test_experts_have_no_place_in_stock_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for part in build(ModelSpec(language_expert={})):
        part.save_pretrained(tmp_path / "hyper")
    with pytest.raises(ValueError, match="`language_expert` is on"):
        convert(tmp_path / "hyper", tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="there already"):
        convert(tmp_path / "hyper", tmp_path / "hyper")
