"""What the entry point `lmms_eval.models` calls. It imports nothing but lmms-eval: an exception in here is only a warning there."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval (as `ModelManifest`s): `--model llava_collab`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return [ModelManifest(model_id="llava_collab", chat_class_path="llava_collab.evaluation.lmms_eval.model.LlavaCollab")]
