"""Data files -> `Sample`s. LLaVA's JSON (one array) and JSONL (one object a line) are read record by record, in constant memory.

A record: `{"id", "image": path or [paths], "conversations": [{"from": "human"|"gpt"|"system", "value": text}, ...]}`, and, where
known, `category`, `family`, `answers` (all references); whatever else it holds goes to `meta`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO, cast

from llava_collab.data.conversation import IMAGE_MARK, SampleError
from llava_collab.data.images import load_image
from llava_collab.data.places import INDEX
from llava_collab.data.shards import ShardSet
from llava_collab.types import Request, Role, Turn

__all__ = ["Sample", "iter_records", "load_image", "parse_record", "read_samples", "read_shards"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KNOWN_KEYS = {"id", "image", "images", "conversations", "category", "family", "answers"}
_SEPARATORS = re.compile(r"[\s,\[\]]*")
_MAX_RECORD = 1 << 26  # characters: where a record is longer than this, it's a broken one that would swallow the rest of the file


@dataclass(frozen=True)
class Sample:
    """One conversation with its images, in the order of their `<image>` marks. `answers` are the references (first: the gold one).

    Of shards (`read_shards`) `images` are `ShardMember`s, which stand for paths wherever `load_image` opens them: in training and checks.
    `source` is the data file (or the index of shards) that it comes from.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    category: str = ""
    family: str = ""
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def request(self, max_new_tokens: int = 64) -> Request:
        """The question alone: everything but the final assistant turn."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        return Request(self.id, turns, self.images, max_new_tokens)


def read_samples(path: Path | str, image_root: Path | str | None = None) -> list[Sample]:
    """All samples of a LLaVA JSON or JSONL file; image paths are relative to `image_root` (default: the file's folder).

    Unknown roles, missing images and the like are left for the dataset (which skips and counts) and for `check_file`.

    Raises `FileNotFoundError`, and `SampleError` (bad_record) that names file and record where a record is no such record at all.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    source = str(path)
    records = enumerate(iter_records(path), start=1)
    return [replace(parse_record(record, root, f"{source}, record {number}"), source=source) for number, record in records]


def read_shards(shards: ShardSet) -> list[Sample]:
    """All samples of a set of shards, in the order of the data file that they were made of; pictures stay where they are.

    Raises `ShardError` where lines are not those of the index, `SampleError` (bad_record) for a line that holds no LLaVA record.
    """
    samples, source = [], shards.place.address(INDEX)
    for number, row in shards.rows():
        sample = parse_record(row.get("record"), Path(), f"{shards.address(number)}, {row.get('key')}")
        members = shards.members(number, row, [str(image) for image in sample.images])
        samples.append(replace(sample, images=cast(tuple[Path, ...], members), source=source))
    return samples


def parse_record(record: Any, image_root: Path, where: str) -> Sample:
    """One record as a `Sample`; `where` names it in errors. Raises `SampleError` (bad_record)."""
    sample_id = str(record.get("id", where)) if isinstance(record, dict) else where
    try:
        images = record.get("image", record.get("images")) or []
        images = [images] if isinstance(images, str) else images
        turns = tuple(Turn(_role(turn["from"]), _text(turn["value"])) for turn in record["conversations"])
        if len(images) == 1:
            turns = tuple(Turn(turn.role, _image_first(turn.text)) if turn.role == "user" else turn for turn in turns)
        paths = tuple(image_root / _text(image) for image in images)
        answers = tuple(_text(answer) for answer in record.get("answers") or ())
    except (KeyError, TypeError, AttributeError) as error:
        raise SampleError(sample_id, "bad_record", f"{where} is not a LLaVA record: {type(error).__name__}: {error}") from error
    if not answers and turns and turns[-1].role == "assistant":
        answers = (turns[-1].text,)
    meta = {key: value for key, value in record.items() if key not in _KNOWN_KEYS}
    return Sample(sample_id, paths, turns, str(record.get("category", "")), str(record.get("family", "")), answers, meta)


def iter_records(path: Path | str) -> Iterator[Any]:
    """The records of a JSON array or JSONL file, one at a time, without holding the file in memory.

    Raises `FileNotFoundError`, `SampleError` (bad_record) with file and place at the first text that is no JSON.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _array_records(file, path) if is_array else _line_records(file, path)
        except UnicodeDecodeError as error:
            raise SampleError("", "bad_record", f"{path} is not UTF-8 ({error})") from error


def _line_records(file: TextIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise SampleError("", "bad_record", f"{path}, line {number} is not JSON ({error}): {line[:80]!r}") from error
            yield record


def _array_records(file: TextIO, path: Path, chunk_size: int = 1 << 20) -> Iterator[Any]:
    """Objects of one big array: LLaVA's 665K file is a single line of 1 GB."""
    decoder = json.JSONDecoder()
    buffer, number = "", 0
    while chunk := file.read(chunk_size):
        buffer, start = buffer + chunk, 0
        while (start := _SEPARATORS.match(buffer, start).end()) < len(buffer):  # type: ignore[union-attr]  # matches always
            try:
                record, start = decoder.raw_decode(buffer, start)
            except json.JSONDecodeError as error:
                if len(buffer) - start > _MAX_RECORD or not buffer.startswith("{", start):
                    raise SampleError("", "bad_record", f"{path}, record {number + 1} is not JSON ({error.msg})") from error
                break  # the record goes on in the next chunk
            yield record
            number += 1
        buffer = buffer[start:]
    if buffer:
        raise SampleError("", "bad_record", f"{path}, record {number + 1} is cut off or not JSON: {buffer[:80]!r}")


def _role(name: str) -> Role:
    return cast(Role, _ROLES.get(name, name))  # an unknown role goes through, to be counted with its sample's id


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _image_first(text: str) -> str:
    """A single mark at the end of a turn is moved to the front, as LLaVA does (`train.py`, `preprocess_multimodal`)."""
    if text.count(IMAGE_MARK) == 1 and text.rstrip().endswith(IMAGE_MARK) and text.strip() != IMAGE_MARK:
        return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}"
    return text
