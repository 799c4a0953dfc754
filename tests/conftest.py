"""Imported before any test: the package mends a torchvision that does not fit its torch, which transformers would trip over."""

import signal

import llava_collab  # noqa: F401

# What a shell starts in the background ignores Ctrl-C, under nohup hang-ups too, and children inherit that; tests send both.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
