"""The tensors of a folder, in whatever files and under whatever names they are stored; hub ids as folders.

`.bin` files are read with `weights_only=True`: tensors and nothing that runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import read_json

STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))  # in order of preference
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """`source` itself if it is a folder, else the hub repository of that id, fetched at `revision` (default: its newest).

    Raises ValueError where it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{source} is neither a folder nor a hub repository that can be reached: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, by transformers' names; [] if there are none.

    Raises ValueError naming the shards of an index that are not there.
    """
    for stem, suffix in STEMS:
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            if lost := [path.name for path in shards if not path.is_file()]:
                raise ValueError(f"{folder} is incomplete: {index.name} lists {', '.join(lost)}, which is not there")
            return shards
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    return []


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors and .bin files, on the CPU (.bin files stay mapped, not copied). Raises ValueError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _read(path)
    return tensors


def headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a file, without reading the tensors. Raises ValueError for a damaged file."""
    if path.suffix != ".safetensors":
        return {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in _read(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), str(part.get_dtype()))) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "BOOL": "bool"}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a plain file of tensors ({str(error).splitlines()[0]}); it is damaged, or refused as unsafe"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds something other than named tensors")
    return loaded
