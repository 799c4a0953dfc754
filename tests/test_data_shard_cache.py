"""Remote shards: the same samples over fsspec and commands, one bounded cache for all processes, errors with their cure."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from running import ROOT
from synthetic import write_shapes

from llava_collab.data import places
from llava_collab.data.places import Place, ShardError
from llava_collab.data.samples import Sample, read_shards
from llava_collab.data.shard_cache import ShardCache
from llava_collab.data.shard_writer import write_shards
from llava_collab.data.shards import open_shards

BIG = 1 << 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of six shards of eight samples."""
    folder = tmp_path_factory.mktemp("store")
    return write_shards(write_shapes(folder / "data", 48), folder / "shards", per_shard=8).parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PAUSES", (0.0, 0.0))


def pictures(samples: list[Sample]) -> list[bytes]:
    return [picture.read_bytes() for sample in samples for picture in sample.images]


def tars(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob("*.tar"))


@pytest.fixture
def memory(shards: Path) -> str:
    files = fsspec.filesystem("memory")
    for path in shards.glob("[!.]*"):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    return "memory://bucket/index.json"


@pytest.mark.parametrize("way", ["file://{folder}/index.json", "pipe:cat {folder}/{{shard}}", "memory"])
def test_every_way_there_gives_the_same_samples(shards: Path, memory: str, tmp_path: Path, way: str) -> None:
    address = memory if way == "memory" else way.format(folder=shards)
    cache = ShardCache(tmp_path / "cache", BIG)
    remote = open_shards(address, cache)
    local, found = read_shards(open_shards(shards / "index.json")), read_shards(remote)
    assert remote.remote and [(s.id, s.turns) for s in found] == [(s.id, s.turns) for s in local]
    assert not tars(cache)  # texts alone need no shard
    assert pictures(found) == pictures(local) and len(tars(cache)) == 6
    copies = {path: path.stat().st_ino for path in tars(cache)}
    assert pictures(read_shards(open_shards(address, cache))) == pictures(local)
    assert {path: path.stat().st_ino for path in tars(cache)} == copies  # nothing was copied again


def test_the_least_recently_used_go_and_never_one_that_is_read(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    size = max(shard["tar"]["bytes"] for shard in index["shards"])
    room = 3 * size + sum(shard["jsonl"]["bytes"] for shard in index["shards"])
    cache = ShardCache(tmp_path / "cache", room)
    found = open_shards(f"file://{shards}/index.json", cache)
    samples = read_shards(found)
    for shard in (0, 1, 2, 0, 3):
        samples[8 * shard].images[0].read_bytes()
    digests = [shard["tar"]["sha256"] for shard in index["shards"]]
    kept = {path.stem for path in tars(cache)}
    assert digests[0] in kept and digests[3] in kept and digests[1] not in kept
    with found.open(found.shards[0].tar) as stream:
        for shard in (1, 2, 3, 4, 5, 4, 3, 2, 1):
            samples[8 * shard].images[0].read_bytes()
            assert sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file()) <= room
        assert stream.read() == (shards / "shard-000000.tar").read_bytes()
        assert (cache.folder / f"{digests[0]}.tar").is_file()
    for shard in (1, 2, 3, 4, 5):
        samples[8 * shard].images[0].read_bytes()
    assert not (cache.folder / f"{digests[0]}.tar").exists()


FILLER = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from llava_collab.data.samples import read_shards
from llava_collab.data.shard_cache import ShardCache
from llava_collab.data.shards import open_shards
folder, address, limit = sys.argv[1:]
samples = read_shards(open_shards(address, ShardCache(Path(folder), int(limit))))
for sample in samples * 2:
    for picture in sample.images:
        picture.read_bytes()
print(len(samples))
"""


@pytest.mark.parametrize("roomy", [True, False])
def test_two_processes_fill_one_cache_at_once(shards: Path, tmp_path: Path, roomy: bool) -> None:
    """With room for all, every file is fetched once; without, both go on through a cache that is always being cleared."""
    index = json.loads((shards / "index.json").read_text())
    limit = BIG if roomy else sum(shard["jsonl"]["bytes"] + shard["tar"]["bytes"] for shard in index["shards"][:3])
    log = tmp_path / "log"
    address = f"pipe:echo {{shard}} >> {log} && sleep 0.05 && cat {shards}/{{shard}}"
    command = [sys.executable, "-c", FILLER, str(tmp_path / "cache"), address, str(limit)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, told = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "48\n", told
    fetched = log.read_text().split()
    assert fetched.count("index.json") == 2 and set(fetched) >= {f"shard-00000{n}.tar" for n in range(6)}
    if roomy:
        assert len(fetched) == 2 + 12
    files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert not [path for path in files if path.suffix == ".tmp"] and sum(path.stat().st_size for path in files) <= limit


def test_what_a_killed_process_began_is_cleared(shards: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", BIG)
    cache.folder.mkdir()
    dead, alive = cache.folder / "a.tar.1.tmp", cache.folder / "b.tar.2.tmp"
    dead.write_bytes(b"half")
    with alive.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        read_shards(open_shards(f"file://{shards}/index.json", cache))
        assert not dead.exists() and alive.exists()


def test_a_copy_that_a_power_cut_left_short_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", BIG)
    samples = read_shards(open_shards(f"file://{shards}/index.json", cache))
    whole = samples[0].images[0].read_bytes()
    (copy,) = tars(cache)
    copy.write_bytes(b"")
    assert samples[0].images[0].read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut", r"OSError: cut off after \d+ of \d+ bytes. Check that it can be reached"),
        ("changed", "not the file that index.json describes; put index and shards of one writing there"),
        ("gone", "is not there .*copy the whole set"),
    ],
)
def test_a_remote_shard_that_is_not_right_is_told(memory: str, tmp_path: Path, damage: str, told: str) -> None:
    files = fsspec.filesystem("memory")
    content = files.cat("/bucket/shard-000001.tar")
    if damage == "gone":
        files.rm("/bucket/shard-000001.tar")
    else:
        files.pipe("/bucket/shard-000001.tar", content[:-700] if damage == "cut" else content[:600] + b"X" + content[601:])
    cache = ShardCache(tmp_path / "cache", BIG)
    samples = read_shards(open_shards(memory, cache))
    samples[0].images[0].read_bytes()
    with pytest.raises(ShardError, match=f"memory://bucket/shard-000001.tar.*{told}"):
        samples[8].images[0].read_bytes()
    assert len(tars(cache)) == 1 and not list(cache.folder.glob("*.tmp"))


def test_a_hiccup_passes(shards: Path, tmp_path: Path) -> None:
    once = f"if [ -e {tmp_path}/{{shard}} ]; then cat {shards}/{{shard}}; else touch {tmp_path}/{{shard}}; echo no route >&2; exit 7; fi"
    samples = read_shards(open_shards(f"pipe:{once}", ShardCache(tmp_path / "cache", BIG)))
    assert pictures(samples) == pictures(read_shards(open_shards(shards / "index.json")))
    with pytest.raises(ShardError, match="index.json >.*2; exit 7: OSError: .* ended with exit code 7: no route to index.json. Check that"):
        open_shards("pipe:echo no route to {shard} >&2; exit 7", ShardCache(tmp_path / "cache", BIG))


def test_a_cache_without_room_and_one_that_is_not_given(shards: Path, tmp_path: Path) -> None:
    address = f"file://{shards}/index.json"
    with pytest.raises(ShardError, match=r"no room for its \d+ bytes in .*cache; raise data.shard_cache_gib"):
        read_shards(open_shards(address, ShardCache(tmp_path / "cache", 100)))
    with pytest.raises(ShardError, match="is not a local folder"):
        open_shards(address)
    with pytest.raises(ShardError, match="Protocol not known"):
        open_shards("nowhere://x/index.json", ShardCache(tmp_path / "cache", BIG))


def test_a_full_disk_is_told(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def room(*_: Any) -> Iterator[tuple[Path, Any]]:
        with open("/dev/full", "wb", buffering=0) as full:
            yield tmp_path / "x", full

    monkeypatch.setattr(ShardCache, "_room", room)
    with pytest.raises(
        ShardError, match="can't write to .*cache .No space left on device.; free some space, or name another data.shard_cache"
    ):
        read_shards(open_shards(f"file://{shards}/index.json", ShardCache(tmp_path / "cache", BIG)))


def test_a_file_system_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(ModuleNotFoundError, match=r"s3://b/index.json: Install s3fs.*pip install 'llava_collab\[data\]'"):
        with Place.of("s3://b/index.json").open("index.json"):
            pass
