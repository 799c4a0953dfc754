"""Chance that depends on names alone: the same on every machine, Python and order of work."""

from __future__ import annotations

import hashlib
import random


def unit_interval(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key` (the first 8 bytes of its SHA-256)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def rng_of(key: str) -> random.Random:
    """A generator whose seed depends on nothing but `key` (the first 16 bytes of its SHA-256)."""
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))
