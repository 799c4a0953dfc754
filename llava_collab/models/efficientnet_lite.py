"""EfficientNet-lite0 as a Hugging Face vision tower: a 7 x 7 grid of 1280-wide features from a 224 px image.

EfficientNet (Tan and Le, 2019, arXiv 1905.11946) in its "lite" form: no squeeze-and-excitation, ReLU6, fixed stem and head. Convolutions
are padded as TensorFlow's SAME does it, more at the end than at the start, because the weights were trained so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# rows of Table 1 of the paper: repeats, kernel, stride, expansion, output channels
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
STEM_WIDTH = 32


class EfficientNetLiteConfig(PreTrainedConfig):
    """Geometry as LLaVA asks for it: `patch_size` is the total stride, so an image has (image_size / patch_size)^2 tokens."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32
    batch_norm_eps: float = 1e-3


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(input / stride) rows and columns, with any odd zero of padding at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        pads: list[int] = []
        for length in (input.shape[-1], input.shape[-2]):
            pad = max((-(-length // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - length, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(input, pads))


def conv_norm(inputs: int, outputs: int, kernel: int, eps: float, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, no activation."""
    return nn.Sequential(SameConv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=eps, momentum=0.01))


class InvertedBottleneck(nn.Module):
    """MBConv: widen by 1 x 1, filter each channel, narrow by 1 x 1; added to its input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = conv_norm(inputs, wide, 1, eps) if expansion > 1 else None
        self.depthwise = conv_norm(wide, wide, kernel, eps, stride, groups=wide)
        self.project = conv_norm(wide, outputs, 1, eps)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        y_NCHW = x_NCHW if self.expand is None else F.relu6(self.expand(x_NCHW))
        y_NCHW = self.project(F.relu6(self.depthwise(y_NCHW)))
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class EfficientNetLiteModel(PreTrainedModel):
    """The tower. `hidden_states` is the one final grid, so LLaVA reads it with vision_feature_layer=-1 and select strategy "full"."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["InvertedBottleneck"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps = config.batch_norm_eps
        blocks, width = [], STEM_WIDTH
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(width, outputs, kernel, stride if i == 0 else 1, expansion, eps))
                width = outputs
        self.stem = conv_norm(3, STEM_WIDTH, 3, eps, stride=2)
        self.blocks = nn.ModuleList(blocks)
        self.head = conv_norm(width, config.hidden_size, 1, eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: object) -> BaseModelOutputWithPooling:
        """pixel_values [N, 3, H, W], scaled as (byte - 127) / 128.

        Returns last_hidden_state [N, ceil(H / 32) * ceil(W / 32), 1280], row by row, its mean as pooler_output [N, 1280], and, if asked
        for, hidden_states with that one entry. Further keywords (return_dict and the like) are accepted and mean nothing here.
        """
        x_NCHW = F.relu6(self.stem(pixel_values.to(self.dtype)))
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        grid_NPD = F.relu6(self.head(x_NCHW)).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=grid_NPD,
            pooler_output=grid_NPD.mean(1),
            hidden_states=(grid_NPD,) if output_hidden_states else None,
        )


def rename_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the published checkpoint by this module's names; the classifier, which a tower does not use, is dropped."""
    first = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1"}
    inner = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1"}
    inner |= {"_project_conv": "project.0", "_bn2": "project.1"}
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("_blocks."):
            _, index, part, leaf = name.split(".")
            renamed[f"blocks.{index}.{inner[part]}.{leaf}"] = tensor
        elif not name.startswith("_fc."):
            part, leaf = name.split(".")
            renamed[f"{first[part]}.{leaf}"] = tensor
    return renamed


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
