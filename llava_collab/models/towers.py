"""Two vision towers as one: their features on one grid, concatenated along channels, then pixel-shuffled into fewer, wider tokens.

Shapes: N images, H x W pixels, g grid side, V_i width of tower i, s shuffle factor, P = (g/s)^2 tokens, V = s^2 * sum(V_i).

Behind LLaVA's own interface: any tower is a transformers model whose `hidden_states[vision_feature_layer]` is [N, P(+1), V]; CLIP,
SigLIP and DINOv2 fit as they are, this pair fits with layer -1 and strategy "full".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FusedVisionConfig(PreTrainedConfig):
    """`towers`: dicts with `config` (of a transformers vision model), `layer` (hidden state taken), `mean` and `std` (its own
    pixel normalisation; the pair takes ImageNet-normalised pixels). `grid` g, `shuffle` s."""

    model_type = "fused_vision"

    towers: list[dict[str, Any]] | None = None
    grid: int = 8
    shuffle: int = 2
    image_size: int = 224
    hidden_size: int = 0
    patch_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.towers = self.towers or []
        if self.grid % self.shuffle:
            raise ValueError(f"grid {self.grid} is not a multiple of shuffle {self.shuffle}")
        self.hidden_size = self.shuffle**2 * sum(tower["config"]["hidden_size"] for tower in self.towers)
        self.patch_size = self.image_size * self.shuffle // self.grid
        super().__post_init__(**kwargs)


class FusedVisionModel(PreTrainedModel):
    """The pair (or any number) of towers of a `FusedVisionConfig`."""

    config_class = FusedVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    base_model_prefix = "towers"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: FusedVisionConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList()
        for index, tower in enumerate(config.towers or []):
            part = dict(tower["config"])
            self.towers.append(AutoModel.from_config(AutoConfig.for_model(part.pop("model_type"), **part)))
            # x_own = (x * std_imagenet + mean_imagenet - mean_own) / std_own = x * scale + shift
            scale = [a / b for a, b in zip(IMAGENET_STD, tower["std"], strict=True)]
            shift = [(a - b) / c for a, b, c in zip(IMAGENET_MEAN, tower["mean"], tower["std"], strict=True)]
            self.register_buffer(f"scale_{index}", torch.tensor(scale).view(1, 3, 1, 1))
            self.register_buffer(f"shift_{index}", torch.tensor(shift).view(1, 3, 1, 1))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """[N, 3, H, W] ImageNet-normalised pixels to `last_hidden_state` (= the one hidden state) [N, P, V]."""
        grids = []
        for index, (tower, spec) in enumerate(zip(self.towers, self.config.towers, strict=True)):
            pixels = pixel_values * getattr(self, f"scale_{index}") + getattr(self, f"shift_{index}")
            pixels = pixels.to(next(tower.parameters()).dtype)
            hidden_NPV = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states[spec["layer"]]
            grids.append(_on_grid(hidden_NPV, self.config.grid))
        shuffled = F.pixel_unshuffle(torch.cat(grids, dim=1), self.config.shuffle)
        features_NPV = shuffled.flatten(2).transpose(1, 2).contiguous()
        return BaseModelOutputWithPooling(last_hidden_state=features_NPV, hidden_states=(features_NPV,))  # pyright: ignore


def _on_grid(hidden_NPV: Tensor, grid: int) -> Tensor:
    """[N, P(+1), V] to [N, V, g, g]: CLS dropped, each token layer-normalised (the towers' scales differ), resized by area or linearly."""
    side = int(hidden_NPV.shape[1] ** 0.5)
    tokens_NPV = hidden_NPV[:, hidden_NPV.shape[1] - side * side :]
    normed_NPV = F.layer_norm(tokens_NPV.float(), tokens_NPV.shape[-1:]).to(tokens_NPV.dtype)
    square = normed_NPV.transpose(1, 2).unflatten(2, (side, side))
    if side > grid:
        return F.adaptive_avg_pool2d(square, grid)
    if side < grid:
        return F.interpolate(square.float(), size=(grid, grid), mode="bilinear", align_corners=False).to(square.dtype)
    return square


AutoConfig.register("fused_vision", FusedVisionConfig, exist_ok=True)
AutoModel.register(FusedVisionConfig, FusedVisionModel, exist_ok=True)
