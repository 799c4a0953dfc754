"""The configuration of a HyperLLaVA: stock LLaVA's, plus what its two experts look like (`None` = that expert is off)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlavaConfig


@dataclass(frozen=True)
class ExpertConfig:
    """The sizes of one expert and of the hypernetwork that writes it (paper, section 4.4: best at 64 and 16)."""

    bottleneck: int = 16
    """Width K between the down- and the up-projection ("downsampling dimension")."""
    code_width: int = 64
    """Width C of the layer code e(n) ("expert input dimension")."""

    def __post_init__(self) -> None:
        for name in ("bottleneck", "code_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expert config: `{name}` must be a positive integer, got {value!r}")

    @classmethod
    def read(cls, value: dict[str, Any], where: str) -> ExpertConfig:
        """From a plain dict; an unknown key is an error that names `where` it stands."""
        unknown = set(value) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"`{where}` has unknown keys {sorted(unknown)}; it knows {sorted(cls.__dataclass_fields__)}")
        return cls(**value)


class HyperLlavaConfig(LlavaConfig):
    """`LlavaConfig` with `visual_expert` and `language_expert`: None (off) or a dict of `ExpertConfig`'s fields.

    With both off the model is stock LLaVA, bit for bit. The visual expert stands on the first projector layer (Eq. 6, "use
    1st", the reported model), the language expert beside the FFN of the posterior half of the blocks (Eq. 7, Table 3).
    """

    model_type = "hyper_llava"

    visual_expert: dict | None = None
    language_expert: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("visual_expert", "language_expert"):
            value = getattr(self, name)
            if value is not None:  # written out in full, so that a checkpoint does not depend on today's defaults
                setattr(self, name, asdict(ExpertConfig.read(dict(value), name)))

    @property
    def expert_layers(self) -> range:
        """The decoder layers that carry a language expert: L/2 .. L-1 (16..31 of 32)."""
        layers = self.get_text_config().num_hidden_layers
        return range(layers // 2, layers) if self.language_expert is not None else range(0)
