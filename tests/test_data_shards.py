"""Shards: what the writer writes, that plain WebDataset reads it, that a run's batches are those of JSON and pictures, what is told."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import ROOT
from synthetic import write_shapes

from llava_collab.data import shard_writer
from llava_collab.data.check import check_file
from llava_collab.data.conversation import SampleError
from llava_collab.data.features import FeatureCache
from llava_collab.data.images import load_image, resolve_image
from llava_collab.data.places import Place, ShardError, names_shards
from llava_collab.data.samples import read_samples, read_shards
from llava_collab.data.shard_writer import write_shards
from llava_collab.data.shards import ShardMember, open_shards
from llava_collab.data.skips import TooManyBadSamples


def contents(folder: Path) -> dict[str, bytes]:
    """What others would be given of a folder of shards."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(sample_id: Any, image: Any = "a.png") -> dict[str, Any]:
    marks = "<image>" * (1 if isinstance(image, str) else len(image or ()))
    turns = [{"from": "human", "value": f"{marks}what?"}, {"from": "gpt", "value": "this"}]
    return {"id": sample_id, "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), 50)


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    """index.json of five shards."""
    return write_shards(data, tmp_path / "shards", per_shard=11)


def test_the_same_samples_come_out(data: Path, shards: Path) -> None:
    plain, sharded = read_samples(data), read_shards(open_shards(shards))
    assert len(sharded) == 50 and {sample.source for sample in sharded} == {str(shards)}
    for one, other in zip(plain, sharded, strict=True):
        assert (one.id, one.turns, one.answers, len(one.images)) == (other.id, other.turns, other.answers, len(other.images))
        for path, member in zip(one.images, other.images, strict=True):
            assert isinstance(member, ShardMember) and member.read_bytes() == path.read_bytes() and member.file == path.name
            assert load_image(member).tobytes() == load_image(path).tobytes() and resolve_image(member) is member
            assert pickle.loads(pickle.dumps(member)).read_bytes() == path.read_bytes()  # noqa: S301 - how a worker that is spawned gets it
    index = json.loads(shards.read_text())
    assert [shard["samples"] for shard in index["shards"]] == [11, 11, 11, 11, 6] and (index["samples"], index["left_out"]) == (50, {})
    for shard in index["shards"]:
        for kind in ("tar", "jsonl"):
            content = (shards.parent / f"{shard['name']}.{kind}").read_bytes()
            assert shard[kind] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_plain_webdataset_reads_them(data: Path, shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in shards.parent.glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    for one, sample in zip(read_samples(data), found, strict=True):
        assert sample["__key__"] == one.id and sample["json"]["id"] == one.id
        if one.images:
            assert sample["json"]["image"] == f"{one.id}.0.png"
            assert sample["0.png"].tobytes() == load_image(one.images[0]).tobytes()


IDS = ["plain", "a.b.c", "../up/a b", "bild-ü-图", "plain", "plain~4", "", 7, "plain", "x" * 300, "a.b.c"]


def test_ids_that_no_tar_would_take_get_keys_of_their_own(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for name in ("a.png", "b.PNG"):
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / name)
    rows = [row(name, [None, "a.png", ["a.png", "b.PNG"]][number % 3]) for number, name in enumerate(IDS)]
    del rows[6]["id"]
    index = write_shards(write(tmp_path / "d.jsonl", rows), tmp_path / "shards", per_shard=4)
    samples = read_shards(open_shards(index))
    assert [sample.id for sample in samples[:6]] == IDS[:6] and samples[7].id == "7"
    tars = sorted(index.parent.glob("*.tar"))
    found = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    keys = [sample["__key__"] for sample in found]
    assert len(set(keys)) == len(keys) == len(IDS) and keys[0] == "plain" and keys[7] == "7"
    assert all(re.fullmatch(r"[\w~-]{1,80}", key, re.ASCII) for key in keys)
    assert [len([name for name in sample if name[0].isdigit()]) for sample in found] == [len(sample.images) for sample in samples]
    assert json.loads(found[2]["json"])["image"] == [f"{keys[2]}.0.png", f"{keys[2]}.1.png"]
    with tarfile.open(tars[0]) as tar:
        assert tar.getnames()[-1] == f"{keys[3]}.json" and {member.mtime for member in tar.getmembers()} == {0}


def test_the_bytes_are_the_same_for_any_number_of_processes_and_again(data: Path, shards: Path, tmp_path: Path) -> None:
    other = write_shards(data, tmp_path / "other", per_shard=11, workers=2).parent
    assert contents(other) == contents(shards.parent)
    before = {path: path.stat().st_mtime_ns for path in shards.parent.iterdir() if path.name != ".lock"}
    write_shards(data, shards.parent, per_shard=11)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write_shards(data, shards.parent, per_shard=20)
    assert sorted(path.name for path in shards.parent.glob("*.tar")) == [f"shard-00000{n}.tar" for n in range(3)]
    assert contents(write_shards(data, shards.parent, per_shard=11).parent) == contents(other)


def test_what_changed_is_written_anew_and_nothing_else(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", 30)
    index = write_shards(data, tmp_path / "shards", per_shard=10)
    before = contents(index.parent)
    picture = data.parent / "13.png"
    content = bytearray(picture.read_bytes())
    Image.new("RGB", (32, 32), (1, 2, 3)).save(picture)  # another picture
    write_shards(data, index.parent, per_shard=10)
    after = contents(index.parent)
    assert {name for name in after if after[name] != before[name]} == {"shard-000001.tar", "shard-000001.jsonl", "index.json"}
    picture.write_bytes(content)
    os.utime(picture, ns=(1, 1))
    write_shards(data, index.parent, per_shard=10)
    assert contents(index.parent) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from llava_collab.data import shard_writer
write, calls = shard_writer.write_chunks, []
def write_chunks(path, chunks):
    calls.append(path)
    def cut():
        for number, chunk in enumerate(chunks):
            if len(calls) == 3 and number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk
    write(path, cut())
shard_writer.write_chunks = write_chunks
shard_writer.write_shards(Path(sys.argv[1]), Path(sys.argv[2]), per_shard=11)
"""


def test_a_killed_writer_goes_on_where_it_was(data: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(data), str(out)], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.glob("shard-*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert not (out / "index.json").exists() and len(list(out.glob(".shard-*.tmp"))) == 1
    with pytest.raises(ShardError, match="index.json is not there"):
        open_shards(out / "index.json")
    written: list[str] = []
    real = shard_writer.write_chunks

    def noted(path: Path, chunks: Iterator[bytes]) -> None:
        written.append(path.name)
        real(path, chunks)

    monkeypatch.setattr(shard_writer, "write_chunks", noted)
    write_shards(data, out, per_shard=11)
    assert written == [f"shard-00000{n}.tar" for n in (2, 3, 4)]
    assert contents(out) == contents(shards.parent) and not list(out.glob(".shard-*.tmp"))


def test_bad_samples_are_left_out_and_named(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", 240)
    (data.parent / "1.png").unlink()
    cut = data.parent / "30.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    broken = [*map(json.loads, data.read_text().splitlines()), {"id": "odd", "conversations": "none"}]
    index = write_shards(write(data, broken), tmp_path / "shards", per_shard=100)
    assert json.loads(index.read_text())["left_out"] == {"missing_image": 1, "truncated_image": 1, "bad_record": 1}
    rows = [json.loads(line) for line in (index.parent / "skipped.jsonl").read_text().splitlines()]
    named = [(row["index"], row["id"], Path(row["file"]).name, row["reason"]) for row in rows]
    assert named[:2] == [(1, "shape-1", "1.png", "missing_image"), (30, "shape-30", "30.png", "truncated_image")]
    assert named[2][:2] == (240, "odd") and named[2][3] == "bad_record"
    assert [sample.id for sample in read_shards(open_shards(index))] == [f"shape-{n}" for n in range(240) if n not in (1, 30)]
    write_shards(data, index.parent, per_shard=100)
    assert [json.loads(line) for line in (index.parent / "skipped.jsonl").read_text().splitlines()] == rows
    with pytest.raises(TooManyBadSamples, match="3 of 241 samples are bad, all listed in"):
        write_shards(data, tmp_path / "none", max_bad_fraction=0)
    assert not (tmp_path / "none" / "index.json").exists()


def test_a_broken_picture_in_a_shard_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shapes(tmp_path / "data", 10)
    (data.parent / "3.png").write_bytes(b"no picture")
    with monkeypatch.context() as careless:
        careless.setattr(shard_writer, "load_image", lambda path, sample_id: None)
        index = write_shards(data, tmp_path / "shards")
    member = read_shards(open_shards(index))[3].images[0]
    with pytest.raises(SampleError, match=r"shard-000000.tar: 3.png can't be decoded .*\[truncated_image\]") as caught:
        load_image(member, "shape-3")
    assert caught.value.file == f"{index.parent}/shard-000000.tar: 3.png"
    report = check_file(index)
    assert report.samples == 10 and report.problems == {"truncated_image": 1} and "shape-3" in report.text()


def test_what_does_not_fit_is_told_with_shard_sample_and_cure(data: Path, shards: Path, tmp_path: Path) -> None:
    tar = shards.parent / "shard-000002.tar"
    samples = read_shards(open_shards(shards))
    member: Any = samples[24].images[0]
    whole = tar.read_bytes()
    tar.write_bytes(whole[: member.offset + 20])
    with pytest.raises(ShardError, match=r"shard-000002.tar has \d+ bytes, but \d+ in .*index.json: cut off.*data shard"):
        open_shards(shards)
    with pytest.raises(ShardError, match="sample shape-24: .*shard-000002.tar: 24.png: the shard ends before byte .* cut off.*data shard"):
        load_image(member, "shape-24")
    tar.write_bytes(whole[: member.offset] + b"X" + whole[member.offset + 1 :])
    with pytest.raises(ShardError, match="sample shape-24: .*shard-000002.tar: 24.png: the shard was changed"):
        load_image(member, "shape-24")
    with pytest.raises(ShardError, match="shard-000002.tar was changed"):
        check_file(shards)
    tar.unlink()
    with pytest.raises(ShardError, match="shard-000002.tar is missing; .*index.json lists it"):
        open_shards(shards)
    with pytest.raises(ShardError, match="shard-000002.tar can't be opened"):
        load_image(member, "shape-24")
    tar.write_bytes(whole)
    lines = tar.with_suffix(".jsonl")
    lines.write_bytes(lines.read_bytes().replace(b"shape-24", b"shape-25"))
    with pytest.raises(ShardError, match="shard-000002.jsonl does not fit"):
        read_shards(open_shards(shards))
    text_of = shards.read_text()
    for text, told in (
        ("[]", "is no index"),
        ("{", "is no index"),
        ('{"format": "x"}', "of the format 'x'"),
        ('{"a": 1}', "no index of shards .KeyError"),
        (text_of.replace('"shard-000001"', '"../shard-000001"'), "'../shard-000001.tar' with sha256 .* is no file of a set"),
        (re.sub('"sha256": "..', '"sha256": "/x', text_of), "is no file of a set"),
    ):
        shards.write_text(text)
        with pytest.raises(ShardError, match=f"index.json .*{told}"):
            open_shards(shards)


def test_a_foreign_folder_and_a_second_writer_are_refused(data: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    shutil.copy(shards.parent / "shard-000000.tar", tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds shards that were not written here"):
        write_shards(data, tmp_path / "foreign")
    with shard_writer.locked(shards.parent / ".lock"), pytest.raises(ValueError, match="another process is writing"):
        write_shards(data, shards.parent)
    with pytest.raises(ValueError, match="must be positive"):
        write_shards(data, tmp_path / "x", per_shard=0)


def test_features_are_found_by_a_members_bytes(data: Path, shards: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "tower")
    (path,), (member,) = read_samples(data)[0].images, read_shards(open_shards(shards))[0].images
    assert cache.key(member) == cache.key(path) == cache.key(member)


def test_a_check_of_shards_finds_what_that_of_the_file_does(data: Path, shards: Path) -> None:
    report, plain = check_file(shards), check_file(data)
    assert report.ok and (report.samples, report.text_only, report.images) == (plain.samples, plain.text_only, plain.images)
    assert check_file(shards, limit=7).samples == 7


def test_addresses() -> None:
    assert Place.of("a/index.json").folder == Path("a") and Place.of("index.json").folder == Path(".")
    assert Place.of(Path("/index.json")).folder == Path("/") and Place.of("s3://b/x/index.json").folder is None
    assert Place.of("s3://b/x/index.json").address("shard-000000.tar") == "s3://b/x/shard-000000.tar"
    assert Place.of("pipe:cat /d/{shard}").address("index.json") == "pipe:cat /d/index.json"
    assert [names_shards(text) for text in ("a/index.json", "gs://b/index.json", "pipe:cat {shard}", "a/train.json", "my-index.json")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    for wrong, told in (("s3://b/train.json", "name the index.json"), ("pipe:cat /d", "write {shard} where")):
        with pytest.raises(ShardError, match=told):
            Place.of(wrong)
