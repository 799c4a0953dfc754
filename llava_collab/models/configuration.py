"""The configuration of a HyperLLaVA: stock LLaVA's, plus what its experts look like and its low-rank adapter (`None`: it has none).

Every choice that the paper makes, leaves open or contradicts is one field. Evidence tags: [paper] stands in arXiv 2403.13447;
[figure] is read off its framework figure; [open] the paper is silent or contradicts itself, and the default is our choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from transformers import LlavaConfig

from ..adapters.layer import AdapterConfig


@dataclass(frozen=True)
class ExpertConfig:
    """What both experts have: the sizes and the kind of the hypernetwork that writes them."""

    bottleneck: int = 16
    """Width K between the down- and the up-projection. [paper, section 4.4: "downsampling dimension", best at 16]"""
    code_width: int = 64
    """Width C of the layer code e(n). [paper, section 4.4: "expert input dimension", best at 64]"""
    activation: Literal["silu", "swiglu", "gelu"] = "silu"
    """Between the projections (Eq. 5). [open: the text says SwiGLU, cites Swish and expands GELU]; swiglu generates 2K rows down"""
    generator: Literal["shared", "per_layer", "factorised"] = "shared"
    """How Eq. 4 is read. [open] shared: a flat decoder for all layers, and b(n) of each; per_layer: a flat decoder of each layer;
    factorised: W1 e as a small matrix times a shared W2, applied without ever writing out a weight"""
    encoder_layers: Literal[1, 2] = 1
    """Depth of E_n (Eq. 3): a linear map, or two with a ReLU between. [open]"""
    mode: Literal["dynamic", "static", "constant"] = "dynamic"
    """dynamic: the method. Controls: static keeps K(n) = b(n), the expert's shape without a hypernetwork; constant feeds the whole
    hypernetwork one and the same guidance"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the generator computes in; its parameters stay float32. [open]"""
    initialisation: Literal["zero_output", "small"] = "zero_output"
    """zero_output: the model starts exactly at the static one; small: tiny uniform weights, no b(n), a start that is almost dead. [open]"""
    detach: bool = True
    """Stop the gradient from the generated weights into what the guidance was pooled from. [open]"""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key in fields(self):
            value, hint = getattr(self, key.name), hints[key.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"expert config: `{key.name}` must be one of {list(get_args(hint))}, got {value!r}")
        for name in ("bottleneck", "code_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"expert config: `{name}` must be a positive integer, got {value!r}")
        if not isinstance(self.detach, bool):
            raise ValueError(f"expert config: `detach` must be true or false, got {self.detach!r}")

    @classmethod
    def read(cls, value: dict[str, Any], where: str) -> Self:
        """From a plain dict; an unknown key is an error that names `where` it stands."""
        unknown = set(value) - {key.name for key in fields(cls)}
        if unknown:
            raise ValueError(f"`{where}` has unknown keys {sorted(unknown)}; it knows {sorted(key.name for key in fields(cls))}")
        return cls(**value)


@dataclass(frozen=True)
class VisualExpertConfig(ExpertConfig):
    """The expert in the projector (Eq. 6). Its guidance is one vector an image, made of the vision tower's features of that image."""

    layers: Literal["first", "second", "both"] = "first"
    """Which of the projector's layers. [paper, Table 2: first is best and reported; the figure draws both]"""
    insertion: Literal["before_gelu", "after_gelu"] = "before_gelu"
    """Where the first layer's expert is added: to what the GELU reads (a shift of that layer's parameters) or to what it gives. [open]"""
    guidance: Literal["mean", "cls"] = "mean"
    """Mean of the patch features, or the tower's class token at the same layer (towers that have one). [open]"""


@dataclass(frozen=True)
class LanguageExpertConfig(ExpertConfig):
    """The experts beside the FFN of decoder blocks (Eq. 7). Their guidance is one vector a sample."""

    layers: Literal["posterior", "anterior", "all"] | list[int] = "posterior"
    """Which blocks: the later half, the earlier half, all, or a list of block numbers from 0. [paper, Table 3: posterior is best]"""
    guidance_layer: int | None = None
    """Pool the state after so many blocks (0: the initial embeddings); null: where the first expert stands, which is the middle for
    posterior and the initial embeddings for anterior and all. [paper]"""
    guidance: Literal["prompt_mean", "last_prompt_token"] = "prompt_mean"
    """Pooled over the first turn's prompt tokens, images included. [open: the paper says "the output of the intermediate layer"]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str):
            if self.layers not in ("posterior", "anterior", "all"):
                raise ValueError(
                    f"expert config: `layers` must be posterior, anterior, all or a list of block numbers, got {self.layers!r}"
                )
        elif not self.layers or sorted(set(self.layers)) != list(self.layers) or any(type(n) is not int or n < 0 for n in self.layers):
            raise ValueError(f"expert config: `layers` as a list must hold rising block numbers from 0, got {self.layers!r}")

    def blocks(self, count: int) -> tuple[int, ...]:
        """The numbers of the expert blocks in a decoder of `count`. Raises ValueError for blocks or a guidance layer out of range."""
        half = count // 2
        named = {"posterior": range(half, count), "anterior": range(half), "all": range(count)}
        chosen = tuple(named[self.layers] if isinstance(self.layers, str) else self.layers)
        if not chosen or chosen[-1] >= count:
            raise ValueError(f"`language_expert.layers` {self.layers!r} does not fit a decoder of {count} blocks (0 to {count - 1})")
        if self.guidance_layer is not None and not 0 <= self.guidance_layer <= chosen[0]:
            raise ValueError(
                f"`language_expert.guidance_layer` must be between 0 and {chosen[0]}, the first expert's block; got {self.guidance_layer}"
            )
        return chosen


class HyperLlavaConfig(LlavaConfig):
    """`LlavaConfig` with `visual_expert` and `language_expert`: None (off), or a dict of the fields of the two classes above; and
    `adapter`: None, or a dict of `adapters.AdapterConfig`'s fields, where `method` may name one of `adapters.METHODS`.

    With all of them off the model is stock LLaVA, bit for bit. `{}` is the paper's reported model. Raises ValueError for unknown keys
    and for values that can't be.
    """

    model_type = "hyper_llava"

    visual_expert: dict | None = None
    language_expert: dict | None = None
    adapter: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        kinds = (("visual_expert", VisualExpertConfig), ("language_expert", LanguageExpertConfig), ("adapter", AdapterConfig))
        for name, kind in kinds:
            value = getattr(self, name)
            if value is not None:  # written out in full, so that a checkpoint does not depend on today's defaults
                setattr(self, name, asdict(kind.read(dict(value), name)))
        if self.visual is not None and self.visual.guidance == "cls" and self.vision_feature_select_strategy != "default":
            raise ValueError(
                "`visual_expert.guidance: cls` needs a vision tower with a class token in front of its patches "
                f"(vision_feature_select_strategy 'default', not {self.vision_feature_select_strategy!r}). Use guidance: mean"
            )
        if self.language is not None:
            self.language.blocks(self.get_text_config().num_hidden_layers)

    @property
    def visual(self) -> VisualExpertConfig | None:
        """`visual_expert` as an object."""
        return None if self.visual_expert is None else VisualExpertConfig(**self.visual_expert)

    @property
    def language(self) -> LanguageExpertConfig | None:
        """`language_expert` as an object."""
        return None if self.language_expert is None else LanguageExpertConfig(**self.language_expert)

    @property
    def low_rank(self) -> AdapterConfig | None:
        """`adapter` as an object."""
        return None if self.adapter is None else AdapterConfig(**self.adapter)
