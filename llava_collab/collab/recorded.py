"""`Recorded`: a model whose answers are kept, so that composites of it, other thresholds and a resumed run ask it nothing twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import sha256, write_bytes
from ..types import Answer, Model, Request, Usage
from .asking import Verb, ask


class Recorded:
    """A `ScoringModel` that asks `model` only what `path` (JSONL, one answer a line) does not hold; usage is that of the first time.

    `identity` says which model it is: answers of another one in the same file are passed over. Errors are not kept, so they are tried
    again. Lines are appended as batches are answered; a half-written last line is taken away. Several threads may ask at once.
    """

    def __init__(self, model: Model, path: Path, identity: str, batch_size: int = 16) -> None:
        self.model, self.path, self.identity, self.batch_size = model, path, identity, batch_size
        self.name = model.name
        self._lock = threading.Lock()
        self._known: dict[str, Answer] = {}
        content = path.read_bytes() if path.is_file() else b""
        if not content.endswith(b"\n") and content:
            content = content[: content.rfind(b"\n") + 1]
            write_bytes(path, content)  # without the line that a kill cut in two
        for line in content.split(b"\n")[:-1]:
            try:
                row = json.loads(line)
                answer = _answer(row["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: a line is no kept answer ({error}); remove that line, it is asked again") from error
            if row["identity"] == identity:
                self._known[row["key"]] = answer

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.Model`."""
        return self._run(requests, "generate")

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.ScoringModel`."""
        return self._run(requests, "score")

    def _run(self, requests: Sequence[Request], verb: Verb) -> list[Answer]:
        keys = [_key(request, verb) for request in requests]
        with self._lock:
            new = dict(zip(keys, requests, strict=True))
            order = sorted((key for key in new if key not in self._known), key=lambda key: (len(new[key].text), key))
            failed: dict[str, Answer] = {}
            with tqdm(total=len(order), desc=self.name, unit="item", disable=len(order) <= self.batch_size) as bar:
                for at in range(0, len(order), self.batch_size):
                    batch = order[at : at + self.batch_size]
                    answers = ask(self.model, [new[key] for key in batch], verb)
                    try:
                        self._keep(batch, answers, failed)
                    except OSError as error:  # no sample's fault: an OSError would be taken for one
                        raise RuntimeError(f"{self.path}: answers can't be kept ({error}); mend that, then run it again") from error
                    bar.update(len(batch))
            return [self._known[key] if key in self._known else failed[key] for key in keys]

    def _keep(self, keys: Sequence[str], answers: Sequence[Answer], failed: dict[str, Answer]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, answer in zip(keys, answers, strict=True):
                if answer.error is not None:
                    failed[key] = answer
                    continue
                self._known[key] = answer
                file.write(json.dumps({"key": key, "identity": self.identity, "answer": asdict(answer)}, ensure_ascii=False) + "\n")


def _key(request: Request, verb: Verb) -> str:
    """What decides an answer: turns, bytes of the pictures, choices, limit; not the request's id."""
    images = [_picture(image) for image in request.images]
    turns = [[turn.role, turn.text] for turn in request.turns]
    content = json.dumps([verb, turns, images, list(request.choices), request.max_new_tokens], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _picture(image: Any) -> str:
    if not isinstance(image, str | Path):
        return hashlib.sha256(image.tobytes()).hexdigest()
    try:
        stat = Path(image).stat()
    except OSError:
        return f"missing: {image}"
    return _remembered(Path(image), stat.st_mtime_ns, stat.st_size)


@cache
def _remembered(path: Path, modified: int, size: int) -> str:
    return sha256(path)


def _answer(fields: dict[str, Any]) -> Answer:
    """An answer from its JSON form."""
    scores = None if fields["scores"] is None else tuple(fields["scores"])
    parts = tuple(_answer(part) for part in fields["parts"])
    return Answer(**fields | {"usage": Usage(**fields["usage"]), "scores": scores, "parts": parts})
