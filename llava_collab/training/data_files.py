"""The samples that a recipe's files name: JSON with pictures beside it, or shards, local and remote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_collab.assets import cache_root
from llava_collab.data.places import names_shards
from llava_collab.data.sampler import Window
from llava_collab.data.samples import Sample, read_samples, read_shards
from llava_collab.data.shard_cache import ShardCache
from llava_collab.data.shards import ShardMember, ShardSet, open_shards
from llava_collab.training.recipe import DataFile, DataRecipe, RecipeError

REMOTE_WINDOW = 16


def read_all(data: DataRecipe) -> list[Sample]:
    """All samples of all files, each file `repeat` times.

    Raises RecipeError for a file, a category or a family that is not there, ShardError for shards that are not as their index says.
    """
    cache = ShardCache(Path(data.shard_cache or cache_root() / "shards"), int(data.shard_cache_gib * 2**30))
    if data.shard_window is not None and not any(names_shards(file.path) for file in data.files):
        raise RecipeError(f"data.shard_window is {data.shard_window}, but no file of data.files names shards; take it out.")
    samples: list[Sample] = []
    for number, file in enumerate(data.files):
        found = _read(file, f"data.files[{number}]", cache)
        for kind, wanted in (("category", file.categories), ("family", file.families)):
            if unknown := set(wanted) - {getattr(sample, kind) for sample in found}:
                raise RecipeError(f"data.files[{number}]: {file.path} has no sample of {kind} {sorted(unknown)}.")
            found = [sample for sample in found if not wanted or getattr(sample, kind) in wanted]
        samples += found * file.repeat
    return samples


def _read(file: DataFile, where: str, cache: ShardCache) -> list[Sample]:
    if names_shards(file.path):
        if file.image_root is not None:
            raise RecipeError(f"{where}: image_root is given, but {file.path} names shards, which hold their pictures; take it out.")
        return read_shards(open_shards(file.path, cache))
    try:
        return read_samples(file.path, file.image_root)
    except FileNotFoundError as error:
        raise RecipeError(f"{where}: no file {file.path}; paths are relative to the current directory.") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{where}: {file.path} is a folder; name the JSON or JSONL file, or the index.json of shards in it.") from error


def window(data: DataRecipe, samples: Sequence[Sample]) -> Window | None:
    """How the order is bound to shards: as the recipe says, or where shards are remote. None: not at all.

    Raises RecipeError where the cache is too small for the shards that are open at a time, with as many again for those before and behind.
    """
    pictures = [sample.images[0] if sample.images else None for sample in samples]
    remote: dict[ShardSet, None] = dict.fromkeys(p.shards for p in pictures if isinstance(p, ShardMember) and p.shards.remote)
    size = data.shard_window or (REMOTE_WINDOW if remote else None)
    if size is None:
        return None
    largest = sorted((shard.tar.bytes for shards in remote for shard in shards.shards), reverse=True)[: 2 * size]
    if sum(largest) > data.shard_cache_gib * 2**30:
        raise RecipeError(
            f"data.shard_cache_gib: {data.shard_cache_gib:g} GiB can't hold twice the {size} shards that are open at a time "
            f"({sum(largest) / 2**30:.3g} GiB). Raise it, or lower data.shard_window."
        )
    numbers: dict[tuple[ShardSet, int], int] = {}
    shards = [numbers.setdefault((p.shards, p.shard), len(numbers)) if isinstance(p, ShardMember) else -1 for p in pictures]
    return Window(shards, size) if numbers else None  # a blind run has no use for shards
