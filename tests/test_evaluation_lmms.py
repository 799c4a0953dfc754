"""The lmms-eval plugin: prompts and answers are our evaluator's. Against a stand-in for lmms-eval, and against it where there is one."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from evaluating import talkative
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from running import ROOT, program, run_apart

from llava_collab.collab.single import Single
from llava_collab.data.samples import Sample, parse_record
from llava_collab.evaluation.evaluator import batches
from llava_collab.evaluation.lmms_eval.manifest import manifests
from llava_collab.evaluation.lmms_eval.messages import read_messages, write_messages
from llava_collab.evaluation.records import RecordError
from llava_collab.evaluation.suite import load_suite
from llava_collab.models.build import load
from llava_collab.types import Answer, Request, Turn

TASKS = ROOT / "eval" / "lmms_eval" / "cmt_open"
SUITE = load_suite(ROOT / "eval" / "suites" / "cmt-open.yaml")
INSTALLED = importlib.util.find_spec("lmms_eval") is not None


# --- messages ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["<image>", "\n", " ", "why?", "\n\n", "a <b>"]), max_size=8).map("".join))
def test_turns_survive_the_trip_through_messages(text: str) -> None:
    turns = (Turn("system", "Be brief."), Turn("user", text))
    images = tuple(range(text.count("<image>")))
    assert read_messages(write_messages(turns, images)) == (turns, images)


def test_messages_of_other_tasks_put_images_on_lines_of_their_own() -> None:
    parts = [{"type": "image", "url": "a"}, {"type": "image", "url": "b"}, {"type": "text", "text": "What is this?"}]
    turns, images = read_messages([{"role": "user", "content": parts}])
    assert (turns[0].text, images) == ("<image>\n<image>\nWhat is this?", ("a", "b"))
    assert read_messages([{"role": "user", "content": "Why?"}]) == ((Turn("user", "Why?"),), ())
    for bad in ({"type": "video", "url": "v"}, {"type": "text", "text": "this <image>"}):
        with pytest.raises(ValueError, match=r"found 'video'|parts of their own"):
            read_messages([{"role": "user", "content": [bad]}])
    for images in ((), ("a", "b")):
        with pytest.raises(ValueError, match="mark"):
            write_messages((Turn("user", "<image>\nWhy?"),), images)


# --- the model --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclasses.dataclass
class ModelManifest:
    model_id: str
    chat_class_path: str


class Lmms(abc.ABC):
    """The methods that lmms-eval's base class demands."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The class that the manifest names, loaded as lmms-eval does, on a stand-in for lmms-eval."""
    names = {"api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts}, "api.model": {"lmms": Lmms}}
    names["models.registry_v2"] = {"ModelManifest": ModelManifest}
    for name, contents in {"": {}, "api": {}, "models": {}, **names}.items():
        module = ModuleType(f"lmms_eval.{name}".rstrip("."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    [manifest] = manifests()
    place, _, name = manifest.chat_class_path.rpartition(".")
    made = getattr(importlib.import_module(place), name)
    assert manifest.model_id == "llava_collab" and issubclass(made, Lmms) and made.is_simple is False
    yield made
    del sys.modules[place]  # it stands on the stand-in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    for part in talkative():
        part.save_pretrained(place)
    return place


def asked(docs: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Instances as lmms-eval hands them over (ConfigurableMessagesTask.construct_requests)."""
    messages: Callable[[Any], Any] = lambda doc: doc["messages"]  # noqa: E731
    return [SimpleNamespace(args=("context", messages, dict(options), number, "task", "test")) for number in range(len(docs))]


def documents(count: int = 7) -> list[dict[str, Any]]:
    docs = []
    for i in range(count):
        images = [{"type": "image", "url": Image.new("RGB", (30, 20 + k), (20 * i, 90, 80 * k))} for k in range(i % 3)]
        docs.append({"messages": [{"role": "user", "content": [*images, {"type": "text", "text": "why " * (count - i)}]}]})
    return docs


def test_the_plugin_answers_as_our_model_does_in_order(plugin: type, folder: Path) -> None:
    docs = documents()
    model = plugin(pretrained=str(folder), batch_size="3", device="cpu")
    model.task_dict = {"task": {"test": docs}}
    results = model.generate_until(asked(docs, max_new_tokens=6, do_sample=False))
    ours = Single(*load(folder), "ours")
    turns = [read_messages(doc["messages"]) for doc in docs]
    answers = [ours.generate([Request(str(i), t, images, 6)])[0] for i, (t, images) in enumerate(turns)]
    assert [r.text for r in results] == [a.text for a in answers] and len({a.text for a in answers}) > 3
    assert [r.token_counts.input_tokens for r in results] == [a.usage.prompt_tokens for a in answers]
    stop = answers[0].text[2]
    assert model.generate_until(asked(docs, max_new_tokens=6, until=[stop]))[0].text == answers[0].text.split(stop)[0].rstrip()


def test_the_plugin_batches_as_the_evaluator(plugin: type, folder: Path) -> None:
    class Recording:
        name = "recording"

        def __init__(self) -> None:
            self.asked: list[list[str]] = []

        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            self.asked.append([request.id for request in requests])
            return [Answer(request.id) for request in requests]

    docs = documents(23)
    plain, model = Recording(), plugin(pretrained=str(folder), batch_size="3", device="cpu")
    model.task_dict, model.model = {"task": {"test": docs}}, Recording()
    assert [r.text for r in model.generate_until(asked(docs, max_new_tokens=6))] == [str(i) for i in range(23)]
    samples = [
        Sample(str(i), tuple(images), turns, "c") for i, doc in enumerate(docs) for turns, images in [read_messages(doc["messages"])]
    ]
    for batch in batches([sample.request(6) for sample in samples], 3):
        plain.generate(batch)
    assert model.model.asked == plain.asked and len(plain.asked) == 9


def test_the_plugin_refuses_what_it_can_not_do(plugin: type, folder: Path) -> None:
    for dtype in ("nn", "float64", "int8"):
        with pytest.raises(ValueError, match=f"dtype={dtype}: has to be one of stored, float32, bfloat16, float16"):
            plugin(pretrained=str(folder), device="cpu", dtype=dtype)
    model = plugin(pretrained=str(folder), device="cpu")
    docs = documents(2)
    docs[1]["messages"][0]["content"][0]["url"] = Path("nowhere.png")
    model.task_dict = {"task": {"test": docs}}
    with pytest.raises(RuntimeError, match=r"1 of 2 requests have no answer.*task, document 1: SampleError.*nowhere.png"):
        model.generate_until(asked(docs))
    model.max_errors = 1
    assert [bool(r.text) for r in model.generate_until(asked(docs, max_new_tokens=4))] == [True, False]
    with pytest.raises(ValueError, match="greedy"):
        model.generate_until(asked(docs, do_sample=True))
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])


def test_the_entry_point_names_a_module_that_imports_nothing() -> None:
    """An exception in it would be a mere warning of lmms-eval's."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"llava_collab": f"{manifests.__module__}:{manifests.__name__}"}
    told = run_apart(
        ["-c", f"import {manifests.__module__}, sys; print(sorted({{'torch', 'transformers', 'lmms_eval'}} & set(sys.modules)))"]
    )
    assert told.stdout == "[]\n", told.stderr


# --- the task ---------------------------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as its text."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def read_task(path: Path) -> dict[str, Any]:
    made = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    return read_task(TASKS / made.pop("include")) | made if "include" in made else made


def test_the_tasks_are_the_suite() -> None:
    group = read_task(TASKS / "cmt_open.yaml")
    tasks = {made["task"]: made for path in TASKS.glob("*.yaml") if (made := read_task(path))["task"] != group["task"]}
    utils = program("eval/lmms_eval/cmt_open/utils.py")
    assert group["task"] == [f"cmt_open_{c.lower().replace(' ', '_').replace('-', '_')}" for c in SUITE.categories] and set(
        group["task"]
    ) == set(tasks)
    for category, name in zip(SUITE.categories, group["task"], strict=True):
        task = tasks[name]
        assert task["generation_kwargs"] == {"max_new_tokens": SUITE.max_new_tokens[category], "do_sample": False}
        assert getattr(utils, task["process_docs"].partition(".")[2]).args == (category,)
        assert all(
            hasattr(utils, value.partition(".")[2]) for value in task.values() if isinstance(value, str) and value.startswith("utils.")
        )
    assert (TASKS / tasks["cmt_open_visual_qa"]["dataset_kwargs"]["data_files"]["test"]).parent.resolve() == utils.DATA.resolve()


def test_the_task_asks_and_scores_as_our_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = program("eval/lmms_eval/cmt_open/utils.py")
    monkeypatch.setattr(utils, "DATA", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\n<image>\nDescribe them."}, {"from": "gpt", "value": "A red kite and a dog."}]
    record = {"id": "x", "image": ["a.png", "a.png"], "conversations": turns, "category": "Detailed Description", "family": "f"}
    record |= {"answers": ["A red kite and a dog."], "objects": ["kite", "dog"], "checklist": ["red kite"]}
    caption = record | {"id": "y", "category": "Visual Captioning", "answers": ["a red kite", "a kite that is red"]}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (record, caption)), encoding="utf-8")
    scorer = SUITE.scorer(SUITE.read("train", tmp_path), SUITE.read("test", tmp_path))
    for row in (record, caption):
        sample = parse_record(row, tmp_path, "x")
        doc = row | {"choices": None, "beats": None}  # as a table of ragged records gives it
        turns_read, images = read_messages(utils.doc_to_messages(doc))
        assert turns_read == sample.request().turns and [image.size for image in images] == [(8, 8)] * 2
        for output in ("A dog.", "A red kite and a dog.", ""):
            assert utils.process_results(doc, [output]) == {"score": scorer.score(output, sample).score}
    assert utils.process_results(record, ["A red kite and a dog."])["score"] == 100.0


def test_samples_without_an_answer_are_not_compared() -> None:
    check = program("eval/lmms_check.py")
    rows = [{"sample_id": f"s{i}", "status": "ok", "score": 1.0, "error": None} for i in range(3)]
    assert list(check.answered(rows)) == ["s0", "s1", "s2"]
    rows[1] |= {"status": "error", "score": None, "error": "no picture"}
    with pytest.raises(RecordError, match="1 of 3 samples have no answer of ours: s1; the first: no picture"):
        check.answered(rows)


def test_the_check_refuses_the_results_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "lmms").mkdir()
    environment = os.environ | {"OUT": str(tmp_path), "VENV": str(tmp_path / "venv")}
    script = ["bash", str(ROOT / "scripts" / "lmms_eval_check.sh")]
    told = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 1 and f"{tmp_path}/lmms is there from an earlier run" in told.stderr and not (tmp_path / "venv").exists()


# --- with lmms-eval ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed; scripts/lmms_eval_check.sh makes an environment with it")
def test_lmms_eval_finds_the_model_and_asks_the_public_benchmarks_as_llava_does(tmp_path: Path) -> None:
    from lmms_eval.models import get_model  # type: ignore[import-not-found]
    from lmms_eval.utils import load_yaml_config  # type: ignore[import-not-found]

    assert get_model("llava_collab").__name__ == "LlavaCollab"
    public = program("eval/public.py")
    word, letter = (
        "\nAnswer the question using a single word or phrase.",
        "\nAnswer with the option's letter from the given choices directly.",
    )
    doc = {"question": "What is it?", "ocr_tokens": ["STOP", "GO"], "hint": "", "choices": ["a cat", "a dog"], "answer": 0}
    doc |= {f"choice_{name}": name for name in "abcd"} | {"A": "a cat", "B": "a dog", "category": "x", "L2-category": "x"}
    doc |= {"index": 0, "source": "x", "split": "dev"}
    unanswerable = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    expected = {
        "vqav2": "What is it?" + word,
        "gqa": "What is it?" + word,
        "vizwiz": "What is it?" + unanswerable + word,
        "scienceqa_img": "What is it?\nA. a cat\nB. a dog" + letter,
        "textvqa": "What is it?" + word,
        "textvqa+ocr": "What is it?\nReference OCR token: STOP, GO" + word,
        "pope": "What is it?" + word,
        "mme": "What is it?" + word,
        "seedbench": "What is it?\nA. a\nB. b\nC. c\nD. d" + letter,
        "llava_w": "What is it?",
        "mmvet": "What is it?",
    }
    run = public.Run("model", tmp_path)
    for benchmark in public.load_benchmarks()[1]:
        run._write_task(benchmark)
        task = load_yaml_config(str(tmp_path / "tasks" / f"{benchmark.own_task}.yaml"))
        assert benchmark.metric in [metric["metric"] for metric in task["metric_list"]], benchmark.name
        options = task.get("lmms_eval_specific_kwargs")
        text = task["doc_to_text"](dict(doc), *([options["default"]] if options else []))
        if benchmark.name in expected:
            assert text == expected[benchmark.name], benchmark.name
        else:  # how the options are listed is MMBench's affair
            assert text.endswith("\n" + (benchmark.prompt or "")) and not text.endswith("\n\n" + (benchmark.prompt or ""))
