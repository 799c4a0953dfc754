"""Readers of the published files of public sets: each turns one `Part` into `Entry`s, and knows that set's form and nothing else.

The forms are those of the sets' own download pages: visualqa.org (VQA v2), the GQA download page, COCO's caption annotations, the
VSR repository's `data/splits`, VIST's story-in-sequence files, textvqa.org, and the DocVQA page of the Robust Reading Competition.
Prompts for short answers are those of LLaVA-1.5 (Liu et al. 2023, table of response formats).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from llava_collab.cmt.public.entries import IMAGES, Entry, Part, Skip, stream, texts
from llava_collab.cmt.public.saved import saved_rows, unpack
from llava_collab.data.conversation import SampleError, check_image_count, check_turns
from llava_collab.data.samples import iter_records, parse_record

SHORT = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."
STATEMENT = "Is this statement about the image true or false? Answer with one word."
STORY = "These photos were taken one after the other. Tell their story, one sentence for each photo."
SPATIAL = "Spatial Inference"
# GQA's relations that say where a thing is; its other ones (wearing, holding, ...) say what it does.
PLACES = frozenset(
    "above,around,at,atop,behind,below,beneath,beside,between,by,in,in between,in front of,inside,near,next to,on,on the back of,"
    "on the bottom of,on the edge of,on the front of,on the side of,on top of,outside,over,surrounding,to the left of,"
    "to the right of,under,underneath".split(",")
)
_KEPT = ("human_answers", "choices", "checklist", "objects", "beats", "ocr_tokens")  # what metrics read
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}

Reader = Callable[[Part], Iterator[Entry]]


def _asked(part: Part, name: Any, image: str, question: str, answers: tuple[str, ...], **more: Any) -> Entry:
    """One picture, one question, one answer."""
    turns = (("human", f"<image>\n{question}"), ("gpt", answers[0]))
    fields = {"family": part.source.name, "category": part.source.category, **more}
    return Entry(id=str(name), images=(image,), turns=turns, answers=answers, held=part.held, **fields)


def _short(question: Any) -> str:
    return f"{_question(question)}\n{SHORT}"


def _question(text: Any) -> str:
    return texts([text], "empty_question")[0]


def _by_votes(people: tuple[str, ...], gold: str = "") -> tuple[str, ...]:
    """Distinct answers of several people: the gold one, then by votes (first given first)."""
    counts = Counter(people)
    return tuple(sorted(counts, key=lambda answer: (answer != gold, -counts[answer])))


def vqav2(part: Part) -> Iterator[Entry]:
    """VQA v2: questions and annotations in two files, joined by `question_id`; ten people's answers are kept."""
    questions, annotations = part.paths
    known: dict[int, tuple[str, tuple[str, ...]]] = {}

    def take(entry: Any) -> None:
        people = tuple(str(given["answer"]) for given in entry["answers"])
        known[entry["question_id"]] = (entry["multiple_choice_answer"], people)

    part.collect(annotations, "annotations.item", take)

    def make(entry: Any) -> Entry:
        if entry["question_id"] not in known:
            raise ValueError(f"question {entry['question_id']} has no annotation in {annotations.name}")
        gold, people = known[entry["question_id"]]
        people = texts(people)
        more = {"human_answers": list(people)}
        answers = _by_votes(people, gold)
        return _asked(part, entry["question_id"], part.place.coco(entry["image_id"]), _short(entry["question"]), answers, extra=more)

    return part.each(questions, stream(questions, "questions.item"), make)


def gqa(part: Part) -> Iterator[Entry]:
    """GQA, balanced questions: an object of questions by id. Questions about where things are go to Spatial Inference."""

    def make(pair: Any) -> Entry:
        name, entry = pair
        more = {"category": SPATIAL, "family": "gqa_spatial"} if _spatial(entry) else {}
        image = part.place.first(f"gqa/images/{entry['imageId']}.jpg")
        return _asked(part, name, image, _short(entry["question"]), texts([entry["answer"]]), **more)

    return part.each(part.paths[0], stream(part.paths[0], ""), make)


def _spatial(entry: dict[str, Any]) -> bool:
    """A relation question (`types.semantic`) whose program relates by place: arguments read `object,relation,s|o (id)`."""
    if not str(entry["types"]["semantic"]).startswith("rel"):
        return False
    steps = [str(step["argument"]) for step in entry["semantic"] if "rel" in step["operation"]]
    return any(name.strip() in PLACES for step in steps for name in step.replace("|", ",").split(","))


def coco_captions(part: Part) -> Iterator[Entry]:
    """COCO captions: one entry a picture, with all its captions (five, rarely more) as references in the order of their ids."""
    captions: dict[int, list[tuple[int, str]]] = {}

    def take(entry: Any) -> None:
        captions.setdefault(entry["image_id"], []).append((entry["id"], entry["caption"]))

    part.collect(part.paths[0], "annotations.item", take)

    def make(pair: Any) -> Entry:
        image_id, said = pair
        return _asked(part, image_id, part.place.coco(image_id), CAPTION, texts([caption for _, caption in sorted(said)]))

    return part.each(part.paths[0], iter(captions.items()), make)


def vsr(part: Part) -> Iterator[Entry]:
    """VSR: one statement about a COCO picture a line, `label` 1 (true) or 0. Entries have no id: theirs is made of what they say."""

    def make(entry: Any) -> Entry:
        if entry["label"] not in (0, 1):
            raise ValueError(f"label {entry['label']!r} is neither 0 nor 1")
        question = f"{_question(entry['caption'])}\n{STATEMENT}"
        answer = ("True",) if entry["label"] else ("False",)
        image = part.place.coco(int(PurePosixPath(entry["image"]).stem))
        return _asked(part, f"{PurePosixPath(entry['image']).stem}-{_digest(question, answer)}", image, question, answer)

    return part.each(part.paths[0], iter_records(part.paths[0]), make)


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def vist(part: Part) -> Iterator[Entry]:
    """VIST: each annotation (a list of one) is a photo with its sentence; a story's five are put in the worker's order.

    Albums stay together. Stories of another length are skipped: a few lost photos.
    """
    stories: dict[str, list[dict[str, Any]]] = {}

    def take(entry: Any) -> None:
        stories.setdefault(entry[0]["story_id"], []).append(entry[0])

    part.collect(part.paths[0], "annotations.item", take)
    folder = part.paths[0].name.split(".")[0]

    def make(pair: Any) -> Entry:
        name, photos = pair
        photos = sorted(photos, key=lambda photo: int(photo["worker_arranged_photo_order"]))
        if len(photos) != 5:
            raise Skip("not_five_photos")
        said = " ".join(texts([photo["original_text"] for photo in photos]))
        images = tuple(part.place.first(f"vist/images/{folder}/{photo['photo_flickr_id']}.jpg") for photo in photos)
        turns = (("human", "<image>\n" * len(images) + STORY), ("gpt", said))
        together = (f"vist album {photos[0]['album_id']}",)
        return Entry(str(name), part.source.name, part.source.category, images, turns, (said,), part.held, together)

    return part.each(part.paths[0], iter(stories.items()), make)


def textvqa(part: Part) -> Iterator[Entry]:
    """TextVQA: ten people's answers are kept; OCR tokens, where their file is there, stand beside the prompt and never in it."""
    path, *ocr = part.paths
    tokens: dict[str, list[str]] = {}
    for file in ocr:
        part.collect(file, "data.item", lambda entry: tokens.update({entry["image_id"]: entry["ocr_tokens"]}))

    def make(entry: Any) -> Entry:
        people = texts(entry["answers"])
        more = {"human_answers": list(people)}
        if entry["image_id"] in tokens:
            more["ocr_tokens"] = tokens[entry["image_id"]]
        image = part.place.first(f"textvqa/train_images/{entry['image_id']}.jpg")
        return _asked(part, entry["question_id"], image, _short(entry["question"]), _by_votes(people), extra=more)

    return part.each(path, stream(path, "data.item"), make)


def docvqa(part: Part) -> Iterator[Entry]:
    """DocVQA (single page): a list of accepted answers, the first is taught. Pages of one document stay together."""

    def make(entry: Any) -> Entry:
        name = PurePosixPath(entry["image"]).name
        image = part.place.first(f"docvqa/documents/{name}", f"docvqa/spdocvqa_images/{name}")
        answers = tuple(dict.fromkeys(texts(entry["answers"])))
        together = (f"docvqa document {entry['ucsf_document_id']}",)
        return _asked(part, entry["questionId"], image, _short(entry["question"]), answers, together=together)

    return part.each(part.paths[0], stream(part.paths[0], "data.item"), make)


def llava(part: Part) -> Iterator[Entry]:
    """LLaVA JSON or JSONL, any number of turns. A record's own `category` goes before the source's.

    LLaVA's ids come more than once, so an entry's id holds a digest of what it says too.
    """

    def make(record: Any) -> Entry:
        sample = parse_record(record, part.place.out / IMAGES / part.source.images, "record")
        category = sample.category or part.source.category
        part.source.check_category(category)
        if not sample.images:
            raise Skip("no_image")
        try:
            check_turns(sample.turns, sample_id=sample.id)
            check_image_count(sample.turns, len(sample.images), sample_id=sample.id)
        except SampleError as error:
            raise Skip(error.reason) from error
        given = [str(PurePosixPath(part.source.images) / image) for image in _images(record)]
        images = tuple(map(part.place.first, given))
        turns = tuple((_ROLES[turn.role], turn.text) for turn in sample.turns)
        extra = {key: sample.meta[key] for key in _KEPT if key in sample.meta}
        name = f"{sample.id}-{_digest(given, turns)}"
        return Entry(name, part.source.name, category, images, turns, texts(sample.answers), part.held, extra=extra)

    return part.each(part.paths[0], iter_records(part.paths[0]), make)


def _images(record: dict[str, Any]) -> list[str]:
    images = record.get("image", record.get("images"))
    return [images] if isinstance(images, str) else list(images or ())


def datasets(part: Part) -> Iterator[Entry]:
    """A folder saved by `datasets.save_to_disk`: columns for picture, question and answers as sources.yaml names them."""
    columns = part.source.columns

    def make(found: Any) -> Entry:
        row, held = found
        given = row[columns["answers"]]
        answers = tuple(dict.fromkeys(texts([given] if isinstance(given, str) else given)))
        picture = row[columns["image"]]
        if picture is None:
            raise Skip("no_image")
        inside = isinstance(picture, dict)
        image = unpack(part, picture) if inside else part.place.first(str(PurePosixPath(part.source.images) / picture))
        question = _question(row[columns["question"]])
        name = f"{PurePosixPath(image).stem}-{_digest(image, question, answers)}"
        return replace(_asked(part, name, image, question, answers), held=held)

    return part.each(part.paths[0], saved_rows(part), make)


READERS: dict[str, Reader] = {
    reader.__name__: reader for reader in (llava, vqav2, gqa, coco_captions, vsr, vist, textvqa, docvqa, datasets)
}
