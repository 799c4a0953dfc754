"""The prompts of one question of every category and family of CMT-open, in every conversation template, as the model gets them.

    python tests/golden/prompts.py        write prompts.txt anew

Run it only when a prompt is meant to change, and say in the commit why. Each line: category, family, template, number of ids, hash of the
ids, and the text that the ids stand for (a run of placeholders is written once). Ids are those of the `tiny` tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from test_cmt_sources import make_assets  # noqa: E402

from llava_collab.cmt.build import _row  # noqa: E402
from llava_collab.cmt.families import BY_NAME  # noqa: E402
from llava_collab.cmt.items import pool_of  # noqa: E402
from llava_collab.cmt.sources import read_world  # noqa: E402
from llava_collab.cmt.splits import group_rng  # noqa: E402
from llava_collab.data.conversation import IMAGE_MARK, TEMPLATES, encode_turns  # noqa: E402
from llava_collab.data.samples import Sample, parse_record  # noqa: E402
from llava_collab.models.tiny import tiny_tokenizer  # noqa: E402

FILE = HERE / "prompts.txt"
PATCHES = 16
GROUPS = 400


def questions(folder: Path) -> list[Sample]:
    """The first question of every family that test groups bring up, as the builder writes it."""
    pool = pool_of(read_world(make_assets(folder)), "test")
    found: dict[tuple[str, str], Sample] = {}
    for name, category in BY_NAME.items():
        for index in range(GROUPS):
            group = category.make(pool, group_rng(name, "test", index), 1)
            files = [f"{image}.png" for image in range(len(group.images))]
            for question in group.questions:
                sample = parse_record(_row(question, group, category, "test", index, files), folder, f"{name} {index}")
                found.setdefault((name, question.family), sample)
    return list(found.values())


def lines(folder: Path) -> list[str]:
    """The lines of the file, computed."""
    tokenizer = tiny_tokenizer()
    run = re.compile(f"(?:{re.escape(IMAGE_MARK)}){{{PATCHES}}}")
    made = []
    for sample in questions(folder):
        for template, jinja in TEMPLATES.items():
            turns = sample.request().turns
            ids = encode_turns(tokenizer, turns, chat_template=jinja, tokens_per_image=PATCHES, add_generation_prompt=True).input_ids
            written = json.dumps(run.sub(f"{IMAGE_MARK}*{PATCHES}", str(tokenizer.decode(ids))), ensure_ascii=False)
            digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
            made.append(f"{sample.category} | {sample.family} | {template} | {len(ids)} | {digest} | {written}")
    return made


def read() -> list[str]:
    """The stored lines."""
    return FILE.read_text(encoding="utf-8").splitlines()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = lines(Path(folder))
    FILE.write_text("\n".join(made) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(made)} prompts")


if __name__ == "__main__":
    main()
