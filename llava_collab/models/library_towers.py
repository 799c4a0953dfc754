"""Vision towers of timm and open_clip behind LLaVA's interface: `timm/<name>` and `open_clip/<architecture>:<weights>`.

Shapes: N images, H x W pixels, P patches, V width.

A tower is cut behind the block that is read (the last but one of a vision transformer, as LLaVA does; the last stage of a pyramid), so
it gives one hidden state, nothing that is stored is idle, and `vision_feature_layer` is -1. What the model has beside patches
and one class token (registers) is left out. Names are the libraries' own, with timm's `local-dir:FOLDER`; open_clip's weights are a tag
of its table or a file.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

PREFIXES = ("timm/", "open_clip/")


class LibraryVisionConfig(PreTrainedConfig):
    """`library`: timm or open_clip; `architecture`: its name there; `layer`: the block read, from the end; `class_token`: whether one
    stands in front of the patches; `quick_gelu`: open_clip's variant of GELU. The rest describes the result as LLaVA needs it."""

    model_type = "library_vision"

    library: str = "timm"
    architecture: str = ""
    layer: int = -1
    class_token: bool = False
    quick_gelu: bool = False
    hidden_size: int = 0
    image_size: int = 224
    patch_size: int = 16


class LibraryVisionModel(PreTrainedModel):
    """One tower of a `LibraryVisionConfig`, randomly initialised (`pretrained_tower` makes one with the library's weights)."""

    config_class = LibraryVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    base_model_prefix = "library_vision"
    supports_gradient_checkpointing = False

    def __init__(self, config: LibraryVisionConfig) -> None:
        super().__init__(config)
        # on the CPU in fp32, whatever the caller's context (transformers loads on the meta device): buffers that no file holds, such
        # as tables of positions, get their values here, and transformers wipes them before it calls _init_weights
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                self.trunk = _cut(_create(config.library, config.architecture, quick_gelu=config.quick_gelu), config.layer)
        finally:
            torch.set_default_dtype(dtype)
        for module in self.trunk.modules():
            names = module._non_persistent_buffers_set
            module._values = {name: value.clone() for name, value in module._buffers.items() if name in names and value is not None}  # pyright: ignore
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, value in getattr(module, "_values", {}).items():
            init.copy_(getattr(module, name), value)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """[N, 3, H, W] normalised pixels to `last_hidden_state` (= the one hidden state) [N, P(+1), V]; the class token first."""
        state = _state(self.trunk, pixel_values.to(next(self.parameters()).dtype), self.config.class_token)
        return BaseModelOutputWithPooling(last_hidden_state=state, hidden_states=(state,))  # pyright: ignore


def pretrained_tower(name: str, dtype: torch.dtype) -> tuple[LibraryVisionModel, tuple[float, ...], tuple[float, ...]]:
    """The tower of a name such as timm/vit_base_patch16_224.augreg_in21k or open_clip/ViT-B-16:laion2b_s34b_b88k, pixel mean and std.

    open_clip's weights are a tag of its table or a file. Raises ImportError naming the extra to install, and ValueError for a name
    without weights and for a model that gives no square grid of patches.
    """
    library, _, architecture = name.partition("/")
    tag, quick_gelu = "", False
    if library == "open_clip":
        architecture, _, tag = architecture.partition(":")
        if not tag:
            raise ValueError(f"{name} names no weights: write {name}:TAG, such as open_clip/ViT-B-16:laion2b_s34b_b88k, or {name}:FILE")
        quick_gelu = _quick_gelu(architecture, tag)
    trunk = _create(library, architecture, quick_gelu=quick_gelu, pretrained=tag or True)
    size, mean, std = _pixels(trunk)
    # one pass over nothing: what a model really gives is the one thing that every library agrees on
    with torch.no_grad():
        shapes = [state.shape for state in _states(trunk.eval(), torch.zeros(1, 3, size, size))]
    layer = -2 if len(shapes) > 1 and shapes[-1] == shapes[-2] else -1
    patches, width = shapes[layer][1:]
    side = round(patches**0.5)
    if side * side != patches or size % side:
        raise ValueError(f"{name} gives {patches} patches of {size}-pixel images; LLaVA needs a square grid that divides the image")
    class_token = _has_class_token(trunk)
    known = (getattr(trunk, "pretrained_cfg", None) or {}).get("architecture") if library == "timm" else None
    config = LibraryVisionConfig(
        library=library,
        architecture=known or architecture,
        layer=layer,
        class_token=class_token,
        quick_gelu=quick_gelu,
        hidden_size=width,
        image_size=size,
        patch_size=size // side,
    )
    tower: Any = LibraryVisionModel(config)
    tower.trunk.load_state_dict(_cut(trunk, layer).state_dict())
    return tower.to(dtype), mean, std


def _create(library: str, architecture: str, *, quick_gelu: bool = False, pretrained: str | bool = False) -> nn.Module:
    """The library's whole vision model: with its weights if `pretrained` (or the weights of that tag), else random."""
    try:
        if library == "timm":
            import timm  # pyright: ignore[reportMissingImports]

            return timm.create_model(architecture, pretrained=bool(pretrained), num_classes=0)
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"the vision tower {library}/{architecture} needs {library}: pip install 'llava_collab[towers]' (with -c constraints-cpu.txt "
            f"beside a CPU-only torch) [{error}]"
        ) from error
    whole: Any = open_clip.create_model(
        architecture,
        pretrained=pretrained if isinstance(pretrained, str) else None,
        load_weights=bool(pretrained),
        force_quick_gelu=quick_gelu,
        pretrained_text=False,
    )
    visual = whole.visual
    if hasattr(visual, "trunk"):  # open_clip's wrapper around a timm model
        visual.trunk.preprocess_cfg = visual.preprocess_cfg
        return visual.trunk
    return visual


def _quick_gelu(architecture: str, tag: str) -> bool:
    """Whether the weights of a tag were trained with QuickGELU: where the architecture's name does not say so, open_clip only warns."""
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False  # _create says what to install

    return bool((open_clip.get_pretrained_cfg(architecture, tag) or {}).get("quick_gelu"))


def _pixels(trunk: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Image side in pixels, mean and std that a model was trained with. Raises ValueError for images that are not square."""
    settings = getattr(trunk, "preprocess_cfg", None)
    if settings is None:
        from timm.data import resolve_model_data_config  # pyright: ignore[reportMissingImports]

        settings = resolve_model_data_config(trunk)
        settings = settings | {"size": settings["input_size"][1:]}
    size = settings["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{type(trunk).__name__} takes images of {size} pixels; LLaVA's are square")
    return sides.pop(), tuple(settings["mean"]), tuple(settings["std"])


def _has_class_token(trunk: Any) -> bool:
    if _is_open_clip(trunk):
        return getattr(trunk, "class_embedding", None) is not None
    returns_it = "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
    return returns_it and getattr(trunk, "cls_token", None) is not None


def _is_open_clip(trunk: nn.Module) -> bool:
    return type(trunk).__module__.startswith("open_clip.")


def _cut(trunk: Any, layer: int) -> nn.Module:
    """Drop, in place, the blocks behind `layer`, the final norm, and whatever pools or projects."""
    if not hasattr(trunk, "prune_intermediate_layers"):
        raise ValueError(f"{type(trunk).__name__} can't be read at one of its blocks; take another timm model or a ViT of open_clip")
    trunk.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
    if getattr(trunk, "attn_pool", None) is not None:
        trunk.attn_pool = None
    return trunk


def _state(trunk: nn.Module, pixels_N3HW: Tensor, class_token: bool) -> Tensor:
    """[N, P(+1), V] of a cut trunk's last block."""
    return _states(trunk, pixels_N3HW, [-1], class_token)[0]


def _states(trunk: Any, pixels_N3HW: Tensor, indices: list[int] | None = None, class_token: bool = False) -> list[Tensor]:
    """[N, P(+1), V] of the given blocks (default: all), patches row by row."""
    if _is_open_clip(trunk):
        out = trunk.forward_intermediates(
            pixels_N3HW, indices=indices, intermediates_only=True, output_fmt="NLC", output_extra_tokens=class_token
        )
        patches, extra = out["image_intermediates"], out.get("image_intermediates_prefix")
    elif class_token:
        out = trunk.forward_intermediates(
            pixels_N3HW, indices=indices, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        patches, extra = [state for state, _ in out], [prefix for _, prefix in out]
    else:
        grids = trunk.forward_intermediates(pixels_N3HW, indices=indices, intermediates_only=True, output_fmt="NCHW")
        patches, extra = [grid.flatten(2).transpose(1, 2) for grid in grids], None
    if not class_token or extra is None:
        return list(patches)
    return [torch.cat([prefix[:, :1], state], dim=1) for prefix, state in zip(extra, patches, strict=True)]


AutoConfig.register("library_vision", LibraryVisionConfig, exist_ok=True)
AutoModel.register(LibraryVisionConfig, LibraryVisionModel, exist_ok=True)
