"""A built CMT-open as WebDataset shards: tar files of `ID.json`, `ID.0.webp`, `ID.1.webp` ..., the same bytes every time.

Each sample carries its own pictures, so that a shard can be read alone and in any order; `image` in its JSON names the members.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_collab.cmt.splits import SPLITS
from llava_collab.data.samples import iter_records
from llava_collab.files import read_json, sha256, write_bytes, write_json

INDEX = "shards/index.json"


def write_shards(out: Path, per_shard: int = 2_000) -> Path:
    """Write `out/shards/SPLIT-000000.tar` ... of the finished build in `out`, and `out/shards/index.json` with counts and hashes.

    Shards that an earlier call wrote of the same build are kept. Raises FileNotFoundError without a build, ModuleNotFoundError without
    webdataset.
    """
    manifest = read_json(out / "manifest.json")
    (out / "shards").mkdir(exist_ok=True)
    known = read_json(out / INDEX) if (out / INDEX).is_file() else {}
    for split in SPLITS:
        rows = list(iter_records(out / f"{split}.jsonl"))
        starts = range(0, len(rows), per_shard)
        for number, start in enumerate(tqdm(starts, desc=f"shards of {split}", unit="shard", disable=not rows)):
            name, part = f"{split}-{number:06d}.tar", rows[start : start + per_shard]
            source = _source(part, manifest["splits"][split]["pixels_sha256"])
            entry = known.get(name, {})
            if entry.get("source") != source or not (out / "shards" / name).is_file():
                write_bytes(out / "shards" / name, _tar(out, part))
                known[name] = {"split": split, "items": len(part), "sha256": sha256(out / "shards" / name), "source": source}
                write_json(out / INDEX, known)
    wanted = {f"{split}-{n:06d}.tar" for split in SPLITS for n in range(-(-manifest["splits"][split]["items"] // per_shard))}
    write_json(out / INDEX, {name: known[name] for name in sorted(wanted)})
    for stale in {path.name for path in (out / "shards").glob("*.tar")} - wanted:  # of a larger build, or of smaller shards
        (out / "shards" / stale).unlink()
    return out / INDEX


def _source(rows: list[dict[str, Any]], pixels: str) -> str:
    return hashlib.sha256(json.dumps([rows, pixels]).encode()).hexdigest()


def _tar(out: Path, rows: list[dict[str, Any]]) -> bytes:
    try:
        from webdataset.writer import TarWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("shards are written with webdataset: pip install 'llava_collab[data]'") from error
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0.0) as writer:
        for row in rows:
            members = {f"{index}{Path(file).suffix}": (out / file).read_bytes() for index, file in enumerate(row["image"])}
            named = row | {"image": [f"{row['id']}.{member}" for member in members]}
            writer.write({"__key__": row["id"], "json": json.dumps(named, ensure_ascii=False).encode(), **members})
    return buffer.getvalue()
