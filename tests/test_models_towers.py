"""Towers of every library behind one interface, the guard for torchvision, and the decoders that experts do not fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from running import run_apart
from toy import toy_config
from transformers import (
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    GPTNeoXConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_collab import torchvision_guard
from llava_collab.models import HyperLlavaForConditionalGeneration
from llava_collab.models.build import ModelSpec, build, load
from llava_collab.models.convert import convert, same_bits
from llava_collab.models.inspect import inspect
from llava_collab.types import Request, Turn

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SMALL, intermediate_size=32), "full"),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, mlp_ratio=2), "default"),
}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (extra: towers)")
needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed (extra: towers)")


def save_tower(kind: type, config: object, folder: Path) -> str:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


def works_as_a_tower(name: str, tmp_path: Path, tokens: int, strategy: str) -> HyperLlavaForConditionalGeneration:
    """Build, forward, backward into every weight of the tower that is read, save, load, same logits; returns the model."""
    model, processor = build(ModelSpec(vision_tower=name, visual_expert={"bottleneck": 2, "code_width": 4}))
    assert (processor.tokens_per_image, model.config.vision_feature_select_strategy) == (tokens, strategy)
    request = Request("q", (Turn("user", "<image>\nWhat is it?"),), (Image.linear_gradient("L").convert("RGB"),))
    batch = processor.encode_requests([request])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tokens
    logits = model(**batch).logits
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.model.vision_tower.parameters())
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, processor = load(tmp_path / "saved")
    torch.testing.assert_close(again(**processor.encode_requests([request])).logits, logits, rtol=1e-5, atol=1e-6)
    return model


@pytest.mark.parametrize("kind", TOWERS)
def test_transformers_towers_with_and_without_a_class_token(kind: str, tmp_path: Path) -> None:
    model_class, config, strategy = TOWERS[kind]
    folder = save_tower(model_class, config, tmp_path / "tower")
    assert inspect(folder).kind == "a vision tower"
    model = works_as_a_tower(folder, tmp_path, 4, strategy)
    tower = model_class.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 28, 28)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, -4:]
    projected = model.model.get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(torch.cat(list(projected)), model.model.multi_modal_projector(expected)[0])


def test_a_tower_with_registers_is_refused(tmp_path: Path) -> None:
    folder = save_tower(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2), tmp_path / "tower")
    with pytest.raises(ValueError, match="5 tokens beside its patches"):
        build(ModelSpec(vision_tower=folder))


def test_library_towers_without_their_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("timm", "timm/vit_base_patch16_224"), ("open_clip", "open_clip/ViT-B-16:openai")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ImportError, match=r"llava_collab\[towers\]"):
            build(ModelSpec(vision_tower=name))
    with pytest.raises(ValueError, match=r"names no weights.*open_clip/ViT-B-16:TAG"):
        build(ModelSpec(vision_tower="open_clip/ViT-B-16"))


def timm_folder(architecture: str, folder: Path) -> tuple[str, torch.nn.Module]:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    save_for_hf(model, folder, safe_serialization=True)
    return f"timm/local-dir:{folder}", model


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "tokens", "strategy"),
    [("test_vit", 100, "default"), ("test_vit4", 100, "full"), ("test_convnext", 25, "full"), ("test_efficientnet", 25, "full")],
)
def test_timm_towers(architecture: str, tokens: int, strategy: str, tmp_path: Path) -> None:
    name, original = timm_folder(architecture, tmp_path / "timm")
    model = works_as_a_tower(name, tmp_path, tokens, strategy)
    tower = model.model.vision_tower
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []  # nothing idle
    pixels = torch.randn(2, 3, 160, 160)
    states = original.forward_intermediates(pixels, intermediates_only=True)
    depth = 2 if architecture.startswith("test_vit") else 1
    expected = states[-depth].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels).hidden_states[-1][:, -tokens:], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="library_vision"):
        convert_without_experts(model, tmp_path)


def convert_without_experts(model: HyperLlavaForConditionalGeneration, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "saved/config.json").read_text()) | {"visual_expert": None}
    model.model.multi_modal_projector.visual_expert = None
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    convert(tmp_path / "saved", tmp_path / "stock", to="stock")


@needs_timm
@pytest.mark.slow
def test_buffers_that_no_file_holds_survive_loading(tmp_path: Path) -> None:
    name, _ = timm_folder("eva02_tiny_patch14_224", tmp_path / "timm")  # its rotary table is such a buffer
    model, processor = build(ModelSpec(vision_tower=name))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    ours, theirs = (dict(m.model.vision_tower.named_buffers()) for m in (model, load(tmp_path / "saved")[0]))
    unsaved = [key for key in ours if key not in model.model.vision_tower.state_dict()]
    assert unsaved and all(same_bits(ours[key], theirs[key]) for key in unsaved)


@needs_open_clip
@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_towers(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
    (tmp_path / "toy-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    original = open_clip.create_model("toy-clip", force_quick_gelu=quick).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: {"quick_gelu": quick})
    model = works_as_a_tower(f"open_clip/toy-clip:{tmp_path / 'weights.pt'}", tmp_path, 16, "default")
    assert model.config.vision_config.quick_gelu is quick
    tower = model.model.vision_tower
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []
    pixels = torch.randn(2, 3, 32, 32)
    out = original.visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
    expected = torch.cat([out["image_intermediates_prefix"][-2], out["image_intermediates"][-2]], dim=1)
    torch.testing.assert_close(tower(pixels).hidden_states[-1], expected, rtol=1e-5, atol=1e-5)


def test_torchvision_is_left_alone_where_it_is_absent_or_torch_has_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch/lib").mkdir(parents=True)
    found = {"torch": SimpleNamespace(origin=str(tmp_path / "torch/__init__.py")), "torchvision": None}
    monkeypatch.setattr(torchvision_guard.importlib.util, "find_spec", found.get)
    monkeypatch.setattr(torchvision_guard, "_library", None)
    monkeypatch.setattr(torchvision_guard, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert not torchvision_guard.mend_torchvision()
    found["torchvision"] = SimpleNamespace(origin="somewhere")
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    assert not torchvision_guard.mend_torchvision()


def test_a_torchvision_without_its_operators_is_mended(tmp_path: Path) -> None:
    if any((Path(torch.__file__).parent / "lib").glob("libtorch_cuda*")):
        pytest.skip("this torch has CUDA libraries, so nothing needs mending")
    (tmp_path / "torchvision").mkdir()  # imports as the registry's wheel does beside a CPU-only torch
    body = "import torch\nfor op in ('nms', 'qnms'):\n    torch.library.register_fake(f'torchvision::{op}')(lambda *a: None)\n"
    (tmp_path / "torchvision/__init__.py").write_text(body)
    lines = ["import sys", f"sys.path.insert(0, {str(tmp_path)!r})", "import llava_collab, torchvision"]
    lines += ["from llava_collab.torchvision_guard import mend_torchvision as mended", "print(mended(), torchvision.__file__)"]
    done = run_apart(["-c", "\n".join(lines)])
    assert done.returncode == 0 and done.stdout.split() == ["True", str(tmp_path / "torchvision/__init__.py")], done.stderr
    lines[2] = "import torchvision"
    assert "torchvision::nms does not exist" in run_apart(["-c", "\n".join(lines[:3])]).stderr  # what it looks like without


@pytest.mark.parametrize("kind", [GPTNeoXConfig, Gemma2Config])
def test_a_decoder_that_experts_do_not_fit_says_what_they_need(kind: type) -> None:
    config = toy_config(language_expert={})
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    config.text_config = kind(**sizes)
    with pytest.raises(ValueError, match=r"needs blocks made of exactly.*post_attention_layernorm.*set language_expert to null"):
        HyperLlavaForConditionalGeneration(config)
