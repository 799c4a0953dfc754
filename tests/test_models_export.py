"""Exported experts: applied by hand, as the file says, they give what the model's own experts add."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from toy import BOTH

from llava_collab.cli import main
from llava_collab.data.conversation import SampleError
from llava_collab.export import export_experts
from llava_collab.files import model_sha256, sha256
from llava_collab.models.build import ModelSpec, build, extract_features, load
from llava_collab.models.hypernetwork import HyperNetwork
from llava_collab.types import Request, Turn

QUESTION = "Is there a cat?"
KINDS: dict[str, tuple[dict, dict]] = {
    "as in the paper": ({}, {}),
    "swiglu, factorised, both layers": (
        {"activation": "swiglu", "generator": "factorised", "layers": "both"},
        {"activation": "swiglu", "generator": "factorised", "layers": "all"},
    ),
    "gelu, behind the GELU": (
        {"activation": "gelu", "insertion": "after_gelu"},
        {"activation": "gelu", "layers": [1, 3], "guidance_layer": 0},
    ),
    "static": ({"mode": "static", "layers": "second"}, {"mode": "static"}),
}


def make(tmp_path: Path, visual: dict | None, language: dict | None):
    both = {key: None if own is None else BOTH[key] | own for key, own in (("visual_expert", visual), ("language_expert", language))}
    model, processor = build(ModelSpec(**both), seed=0)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, HyperNetwork):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    paths = []
    for colour, size in (("red", (40, 24)), ("blue", (9, 31))):
        paths.append(tmp_path / f"{colour}.png")
        Image.new("RGB", size, colour).save(paths[-1])
    return model, processor, paths


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["experts"])  # noqa: SIM118


def by_hand(x_TD: torch.Tensor, down: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The file's equations, spelled out; token by token, so that no shape can be swapped unseen."""

    def one(x: torch.Tensor) -> torch.Tensor:
        inner = down @ x
        if activation == "swiglu":
            g, v = inner[: len(inner) // 2], inner[len(inner) // 2 :]
            return up @ (g * torch.sigmoid(g) * v)
        if activation == "gelu":
            return up @ (inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        return up @ (inner * torch.sigmoid(inner))

    return torch.stack([one(x) for x in x_TD])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported_weights_applied_by_hand_are_the_models_experts(tmp_path: Path, kind: str) -> None:
    model, processor, paths = make(tmp_path, *KINDS[kind])
    out = tmp_path / "deep" / "experts.safetensors"
    meta = export_experts(model, processor, QUESTION, paths, out, folder=tmp_path / "model")
    tensors, stored = read(out)
    assert stored == meta and [p.name for p in out.parent.iterdir()] == [out.name]
    shapes = {key: shape for expert in stored["experts"].values() for key, shape in expert["tensors"].items()}
    assert shapes == {key: list(w.shape) for key, w in tensors.items()}

    seen: dict[str, torch.Tensor] = {}
    settings, blocks = model.config, model.config.language.blocks(model.config.get_text_config().num_hidden_layers)
    for n in blocks:
        layer = model.model.language_model.layers[n]
        layer.post_attention_layernorm.register_forward_hook(lambda _m, inputs, x, n=n: seen.update({f"h{n}": inputs[0][0], f"x{n}": x[0]}))
        layer.mlp.register_forward_hook(lambda _m, _i, out, n=n: seen.update({f"ffn{n}": out[0]}))
        layer.register_forward_hook(lambda _m, _i, out, n=n: seen.update({f"out{n}": out[0]}))
    model.model.multi_modal_projector.register_forward_hook(lambda _m, _i, out: seen.update(projected=out))
    batch = processor.encode_requests([Request("q", (Turn("user", "<image>\n<image>\n" + QUESTION),), tuple(paths))])
    model(**batch)
    language = stored["experts"]["language_expert"]
    assert language["places"] == [f"block_{n}" for n in blocks]
    for n in blocks:
        own = seen[f"out{n}"] - seen[f"h{n}"] - seen[f"ffn{n}"]  # what the block added beside attention and FFN
        weights = (tensors[f"language_expert.block_{n}.{part}"] for part in ("down", "up"))
        torch.testing.assert_close(by_hand(seen[f"x{n}"], *weights, language["activation"]), own, rtol=1e-3, atol=1e-4)
        assert own.abs().mean() > 1e-2

    projector = model.model.multi_modal_projector
    for i, f_PV in enumerate(extract_features(model, batch["pixel_values"])):
        first, second = (
            [tensors.get(f"{name}.image_{i}.{part}") for part in ("down", "up")] for name in ("visual_expert", "visual_expert_2")
        )
        activation, before = settings.visual.activation, settings.visual.insertion == "before_gelu"
        hidden = projector.linear_1(f_PV)
        static = projector.act(hidden)
        shift = 0.0 if first[0] is None else by_hand(f_PV, *first, activation)
        result = projector.linear_2(projector.act(hidden + shift) if before else static + shift)
        result = result if second[0] is None else result + by_hand(static, *second, activation)
        torch.testing.assert_close(seen["projected"][i], result, rtol=1e-3, atol=1e-4)
    assert {"visual_expert", "visual_expert_2"} & set(stored["experts"])


def test_the_verb_says_what_it_wrote_and_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, processor, (red, _) = make(tmp_path, {}, {})
    out, folder = tmp_path / "e.safetensors", tmp_path / "model"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder), "--image", str(red), "--prompt", QUESTION, "--out", str(out)])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    tensors, meta = read(out)
    assert all(key in printed for key in tensors) and str(out) in printed
    assert (meta["model"], meta["model_sha256"], meta["prompt"]) == ("model", model_sha256(folder), QUESTION)
    assert meta["images"] == [{"name": "red.png", "sha256": sha256(red)}]
    assert str(tmp_path) not in json.dumps(meta)
    again, _ = load(folder)
    before = out.read_bytes()
    export_experts(again, processor, QUESTION, [red], out, folder=folder)
    assert out.read_bytes() == before  # the same sample, the same file
    export_experts(again, processor, "Is there a dog?", [red], out, folder=folder)
    other, _ = read(out)
    assert torch.equal(other["visual_expert.image_0.up"], tensors["visual_expert.image_0.up"])  # its guidance is the image alone
    assert not torch.equal(other["language_expert.block_3.up"], tensors["language_expert.block_3.up"])
    assert not any(module._forward_hooks for module in again.modules() if isinstance(module, HyperNetwork))


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    model, processor, paths = make(tmp_path, None, None)
    out = tmp_path / "e.safetensors"
    with pytest.raises(ValueError, match="both of this model's experts are off"):
        export_experts(model, processor, QUESTION, paths, out, folder=tmp_path / "model")
    model, processor, paths = make(tmp_path / "v", {}, None)
    with pytest.raises(ValueError, match="for images only"):
        export_experts(model, processor, QUESTION, [], out, folder=tmp_path / "v" / "model")
    with pytest.raises(SampleError, match="none.png"):
        export_experts(model, processor, QUESTION, [tmp_path / "none.png"], out, folder=tmp_path / "v" / "model")
    assert not out.exists()


def test_there_is_no_merge_and_the_error_says_why(tmp_path: Path) -> None:
    model, _, _ = make(tmp_path, {}, {})
    with pytest.raises(NotImplementedError, match=r"each sample.*activation.*export"):
        model.merge()
