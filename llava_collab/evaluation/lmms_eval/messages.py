"""Turns with `<image>` marks as chat messages of typed parts, and back, without a character lost: prompts stay those of our evaluator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_collab.data.conversation import IMAGE_MARK
from llava_collab.types import Turn


def write_messages(turns: Sequence[Turn], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages `{"role", "content": [{"type": "text", "text"} | {"type": "image", "url": image}]}`, an image for each mark.

    Raises ValueError unless there are as many marks as images.
    """
    left = list(images)
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn.text.split(IMAGE_MARK)):
            if number:
                if not left:
                    raise ValueError(f"more {IMAGE_MARK} marks than images ({len(images)})")
                parts.append({"type": "image", "url": left.pop(0)})
                if not text[:1].isspace():
                    parts.append({"type": "text", "text": ""})  # what follows the image does so without a line break
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts})
    if left:
        raise ValueError(f"{len(left)} of {len(images)} images have no {IMAGE_MARK} mark")
    return messages


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[Turn, ...], tuple[Any, ...]]:
    """Turns and images of messages. An image is followed by a line break, as in LLaVA, unless the next part is text with whitespace
    of its own in front, or empty text.

    Raises ValueError for video and sound, and for text that holds a mark: nobody could tell it from an image.
    """
    turns, images = [], []
    for message in messages:
        content = message["content"]
        text, after_image = "", False
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                text += "\n" * after_image + IMAGE_MARK
                images.append(part["url"])
                after_image = True
            elif part["type"] == "text":
                if IMAGE_MARK in part["text"]:
                    raise ValueError(f"a text part holds {IMAGE_MARK!r}; images are parts of their own")
                text += ("\n" if after_image and re.match(r"\S", part["text"]) else "") + part["text"]
                after_image = False
            else:
                raise ValueError(f"messages may hold text and images, found {part['type']!r}")
        turns.append(Turn(message["role"], text))
    return tuple(turns), tuple(images)
