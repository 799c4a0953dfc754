"""Small files in the published forms of public sets, and the build of CMT-public from them, for its tests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_collab.cmt.public import build_public

Rows = dict[str, dict[str, Any]]


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A smooth random picture: no two seeds look alike, and it survives scaling."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def put(folder: Path, name: str, content: Any) -> Path:
    """A JSON file (JSONL by its name)."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(lines, encoding="utf-8")
    return path


def coco(folder: Path, *numbers: int) -> None:
    for number in numbers:
        picture(folder / f"coco/train2017/{number:012d}.jpg", number)


def vqav2(folder: Path, items: list[tuple[int, int]], split: str = "train2014") -> None:
    """(question id, image id) pairs as VQA v2 publishes them."""
    questions = [{"image_id": image, "question": f"What is in {name}?", "question_id": name} for name, image in items]
    people = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "mesh", ""]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "net",
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(people, 1)],
            "image_id": image,
            "answer_type": "other",
            "question_id": name,
        }
        for name, image in items
    ]
    head = {"info": {"version": "2.0"}, "license": {"name": "CC BY"}, "data_subtype": split}
    put(folder, f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", head | {"task_type": "Open-Ended", "questions": questions})
    put(folder, f"vqav2/v2_mscoco_{split}_annotations.json", head | {"annotations": annotations[::-1]})


def build(folder: Path, out: Path, **sizes: Any) -> tuple[dict[str, Any], dict[str, Rows]]:
    options: dict[str, Any] = {"workers": 1, "train": 10_000, "test": 70} | sizes
    manifest = build_public(folder, out, **options)
    return manifest, {split: {row["id"]: row for row in map(json.loads, (out / f"{split}.jsonl").open())} for split in ("train", "test")}


def all_rows(folder: Path, out: Path, **sizes: Any) -> Rows:
    _, rows = build(folder, out, **{"test": 0} | sizes)
    return rows["train"]


def llava_record(name: str, image: str, answer: str = "A man.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def die(task: object) -> None:
    """The work of a process that the system kills; lives in a module that a spawned process can import."""
    os.kill(os.getpid(), signal.SIGKILL)
