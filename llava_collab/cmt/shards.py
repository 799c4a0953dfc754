"""A built CMT-open as WebDataset shards, one set a split."""

from __future__ import annotations

from pathlib import Path

from llava_collab.cmt.splits import SPLITS
from llava_collab.data import shard_writer


def write_shards(out: Path, per_shard: int = 2_000, workers: int = 1) -> list[Path]:
    """Write `out/shards/SPLIT/` for every split of the finished build in `out` that has items; returns the paths of their index.json.

    Raises what `shard_writer.write_shards` does.
    """
    files = {split: out / f"{split}.jsonl" for split in SPLITS}
    return [
        shard_writer.write_shards(file, out / "shards" / split, per_shard=per_shard, workers=workers, max_bad_fraction=0)
        for split, file in files.items()
        if file.is_file() and file.stat().st_size
    ]
