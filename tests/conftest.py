"""Imported before any test: the package mends a torchvision that does not fit its torch, which transformers would trip over."""

import llava_collab  # noqa: F401
