"""Imported before any test: the package mends a torchvision that does not fit its torch, which transformers would trip over."""

import signal

import llava_collab  # noqa: F401

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that; tests send it to themselves and to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
