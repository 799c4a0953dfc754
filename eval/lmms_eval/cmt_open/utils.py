"""CMT-open for lmms-eval: our prompts, our metrics, our references, read from the built JSONL, so that its numbers are our evaluator's."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from llava_collab.data.images import load_image
from llava_collab.data.samples import Sample, parse_record
from llava_collab.evaluation.evaluator import prompt_text
from llava_collab.evaluation.lmms_eval.messages import write_messages
from llava_collab.evaluation.metrics import Scorer, references
from llava_collab.evaluation.suite import load_suite

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "data" / "cmt-open"


def only(category: str, docs: Any) -> Any:
    """The documents of one category, in the order of the file."""
    return docs.select([number for number, name in enumerate(docs["category"]) if name == category])


visual_qa = partial(only, "Visual QA")
visual_captioning = partial(only, "Visual Captioning")
spatial_inference = partial(only, "Spatial Inference")
detailed_description = partial(only, "Detailed Description")
visual_storytelling = partial(only, "Visual Storytelling")
knowledge_ocr = partial(only, "Knowledge OCR")
text_rich_images_qa = partial(only, "Text-Rich Images QA")


def sample_of(doc: dict[str, Any]) -> Sample:
    """Our sample; keys that this record lacks, and another of the file has, come as None."""
    return parse_record({key: value for key, value in doc.items() if value is not None}, DATA, str(doc["id"]))


@cache
def scorer() -> Scorer:
    """The suite's: captions are scored with frequencies of the training captions, descriptions with all object names."""
    suite = load_suite(ROOT / "eval" / "suites" / "cmt-open.yaml")
    return suite.scorer(suite.read("train", DATA), suite.read("test", DATA))


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    request = sample_of(doc).request()
    return write_messages(request.turns, [load_image(image, request.id) for image in request.images])


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [load_image(image, str(doc["id"])) for image in sample_of(doc).images]


def doc_to_text(doc: dict[str, Any]) -> str:
    return prompt_text(sample_of(doc).request())


def doc_to_target(doc: dict[str, Any]) -> str:
    return references(sample_of(doc))[0]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The primary score, 0 to 100, of the one answer."""
    return {"score": scorer().score(results[0], sample_of(doc)).score}
