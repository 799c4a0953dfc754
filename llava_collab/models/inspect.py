"""What a path is: its kind, its parts, what it stands on, and the command that loads or converts it.

Only files decide, never a name. Nothing is fetched and no weights are read but their headers (`.bin` files are mapped).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import read_json
from .delta import BASE, TENSORS, is_delta
from .original import LORA_REST, PROJECTOR, variant_of
from .weights import headers, weight_files

_EXPERTS = ("visual_expert", "language_expert", "adapter")
_TRAINABLE = "trainable.safetensors"  # what a checkpoint of a LoRA run holds instead of a whole model
_PARTS = (  # the first that occurs in a tensor's name, in any of the layouts
    ("visual expert", "visual_expert"),
    ("language expert", "language_expert"),
    ("adapter", ".adapter."),
    ("projector", "projector"),
    ("vision tower", "vision_tower"),
    ("language model", ""),
)


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model, and how many of them are in which dtype."""

    name: str
    parameters: int
    dtypes: dict[str, int]


@dataclass
class Finding:
    """What `inspect` found: a kind in words, the parts, facts to print line by line, and what to do with it."""

    path: Path
    kind: str
    command: str
    facts: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def text(self) -> str:
        """The report, a few lines."""
        lines = [f"{self.path}: {self.kind}", *(f"  {fact}" for fact in self.facts)]
        for part in self.parts:
            dtypes = ", ".join(part.dtypes) if len(part.dtypes) == 1 else ", ".join(f"{n:,} {dtype}" for dtype, n in part.dtypes.items())
            lines.append(f"  {part.name:16} {part.parameters:>15,} parameters  {dtypes}")
        return "\n".join([*lines, f"  -> {self.command}"])


def inspect(path: str | Path) -> Finding:
    """What `path` is. Raises ValueError where nothing is there, or where what is there is damaged."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"nothing is at {path} (a hub id or the name of a base can be used in a recipe's model section as it is)")
    if path.is_file():
        return _file(path)
    for look in (_run, _checkpoint, _delta, _original, _adapter, _by_config):
        if (finding := look(path)) is not None:
            return finding
    nested = sorted(child.name for child in path.iterdir() if child.is_dir() and (child / "config.json").is_file())
    facts = [f"folders with a config.json inside: {', '.join(nested[:8])}"] if nested else []
    return Finding(path, "nothing known", "a model folder has a config.json, a run folder a recipe.yaml", facts)


def _file(path: Path) -> Finding:
    if path.suffix not in (".safetensors", ".bin"):
        return Finding(path, "a file of no known kind", "give a folder")
    return Finding(path, "a file of tensors", f"llava-collab inspect {path.parent}", [], count_parts([path]))


def _run(path: Path) -> Finding | None:
    if not (path / "recipe.yaml").is_file():
        return None
    facts = [f"checkpoints: {', '.join(names)}"] if (names := [p.name for p in sorted((path / "checkpoints").glob("step-*"))]) else []
    resume = f"python train/train.py {path / 'recipe.yaml'}"
    if not (path / "finished.json").is_file():
        return Finding(path, "a training run, not finished", f"go on: {resume}", facts)
    model = _by_config(path / "model")
    facts += [f"finished after {read_json(path / 'finished.json')['step']} steps; its model is {path / 'model'}"]
    return Finding(path, "a training run, finished", f'llava-collab ask {path / "model"} "..."', facts, model.parts if model else [])


def _checkpoint(path: Path) -> Finding | None:
    if not ((path / "manifest.json").is_file() and (path / "state.json").is_file()):
        return None
    facts = [f"step {read_json(path / 'state.json').get('step', '?')}"]
    if (path / _TRAINABLE).is_file():
        facts.append("only what is trained (adapters over a base that the recipe names)")
        parts, command = count_parts([path / _TRAINABLE]), "go on with its run: python train/train.py RUN/recipe.yaml"
    else:
        parts, command = count_parts(weight_files(path)), f'llava-collab ask {path} "..." (or go on with its run)'
    return Finding(path, "a checkpoint of a training run", command, facts, parts)


def _delta(path: Path) -> Finding | None:
    if not is_delta(path):
        return None
    stored = read_json(path / BASE)
    base = ", ".join(f"{part} {value.get('folder', value.get('name'))}" for part, value in stored["base"].items())
    facts = [f"over {base}", f"{len(stored['sha256'])} tensors are the base's, {len(stored['lora'])} of them with LoRA factors here"]
    facts += _experts(read_json(path / "config.json"))
    return Finding(path, "a HyperLLaVA stored as a delta", f'llava-collab ask {path} "..."', facts, count_parts([path / TENSORS]))


def _original(path: Path) -> Finding | None:
    variant = variant_of(path)
    if variant is None:
        return None
    raw = read_json(path / "config.json")
    facts = [f"vision tower {raw['mm_vision_tower']}, projector {raw.get('mm_projector_type')}, images {raw.get('image_aspect_ratio')}"]
    command = f"llava-collab convert {path} OUT"
    if variant != "full":
        adapter = read_json(path / "adapter_config.json") if variant == "lora" else {}
        base = adapter.get("base_model_name_or_path") or raw.get("_name_or_path")
        facts.append(f"over {base or 'a base that its files do not name'}")
        command += "" if base and Path(base).is_dir() else f" --base {base or 'BASE'}"
    kind = {"full": "a LLaVA", "projector": "a projector", "lora": "a LoRA"}[variant] + " in the original layout (haotian-liu/LLaVA)"
    names = {"full": (), "projector": (PROJECTOR,), "lora": (LORA_REST, "adapter_model.safetensors", "adapter_model.bin")}[variant]
    files = [path / name for name in names if (path / name).is_file()] or weight_files(path)
    return Finding(path, kind, command, facts, count_parts(files))


def _adapter(path: Path) -> Finding | None:
    if not (path / "adapter_config.json").is_file():
        return None
    raw = read_json(path / "adapter_config.json")
    facts = [f"{raw.get('peft_type')}, over {raw.get('base_model_name_or_path')}"]
    files = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()]
    command = "merge it by peft into its base (PeftModel.merge_and_unload), and give the merged folder as a base"
    return Finding(path, "a peft adapter", command, facts, count_parts(files))


def _by_config(path: Path) -> Finding | None:
    if not (path / "config.json").is_file():
        return None
    raw = read_json(path / "config.json")
    kind, files = raw.get("model_type"), weight_files(path)
    facts = [f"{kind}, architectures {raw.get('architectures')}"] + ([] if files else ["it holds no weights"])
    parts = count_parts(files)
    if kind == "hyper_llava":
        return Finding(
            path, "a HyperLLaVA", f'llava-collab ask {path} "..."; train on from it: model.init_from: {path}', _experts(raw), parts
        )
    if kind == "llava":
        command = f'llava-collab ask {path} "..."; add experts to it: model.init_from: {path}'
        return Finding(path, "a stock LLaVA (llava-hf layout)", command, facts, parts)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Finding(path, "a language model", f"build on it: model.language_model: {path}", facts, _total(parts))
    if _is_tower(path):
        return Finding(path, "a vision tower", f"build on it: model.vision_tower: {path}", facts, _total(parts))
    return Finding(
        path, f"a {kind!r} model, which nothing here loads", "see docs/architecture.md for what fits where", facts, _total(parts)
    )


def _is_tower(path: Path) -> bool:
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError):  # a model type that transformers does not know
        return False
    vision: Any = getattr(config, "vision_config", config)
    return hasattr(vision, "image_size") and hasattr(vision, "patch_size") and hasattr(vision, "hidden_size")


def _experts(raw: dict[str, Any]) -> list[str]:
    return [f"{name}: {'off' if raw.get(name) is None else ', '.join(f'{k} {v}' for k, v in raw[name].items())}" for name in _EXPERTS]


def count_parts(files: list[Path]) -> list[Part]:
    """The parts of a LLaVA in some files of tensors, in any layout."""
    counts: dict[str, Counter[str]] = {}
    for path in files:
        for name, (shape, dtype) in headers(path).items():
            size = 1
            for side in shape:
                size *= side
            counts.setdefault(next(part for part, mark in _PARTS if mark in name), Counter())[dtype] += size
    return [Part(name, counts[name].total(), dict(counts[name])) for name, _ in reversed(_PARTS) if name in counts]


def _total(parts: list[Part]) -> list[Part]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.dtypes)
    return [Part("all", total.total(), dict(total))] if parts else []
