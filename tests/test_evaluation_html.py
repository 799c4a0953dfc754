"""The HTML report: opened in a real browser, with pictures, filters, and answers that try to break out of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import program

from llava_collab.evaluation.html import embedded, render
from llava_collab.evaluation.records import RecordError, open_run, write_rows

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
EVIL = [
    "<img src=x onerror=\"document.title='harmed'\">",
    "</script><script>document.title='harmed'</script>",
    "a\u2028b <!-- <script> ${document.title='harmed'} \ud800",
    "javascript:document.title='harmed'",
]


# --- what needs no browser --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*EVIL, "&lt;", "]]>", "\x00"])
def test_data_cannot_end_the_script_block(text: str) -> None:
    written = embedded({"x": text})
    assert json.loads(written) == {"x": text} and written.isascii() and not set("<>&") & set(written)


def test_the_page_has_one_script_and_the_policy_knows_its_hash() -> None:
    page = render({"title": "{{policy}} {{data}}", "items": []})
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(page)
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert scripts == [{"id": "data", "type": "application/json"}, {}] and sum(tag == "style" for tag, _ in tags) == 1
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    loads = [value for _, attributes in tags for name in ("src", "href") if (value := attributes.get(name))]
    assert all(value.startswith(("#", "data:")) for value in loads)
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in page


# --- in the browser ---------------------------------------------------------------------------------------------------------------


def _row(number: int, output: str, score: float | None, prompt: str = "", **more: Any) -> dict[str, Any]:
    status = {"status": "error", "error": "<b>no image</b>"} if score is None else {"status": "ok", "error": None}
    category, family = ("Visual QA", "name") if number % 2 else ("Spatial Inference", "side")
    base = {"sample_id": f"s{number}", "category": category, "family": family, "prompt": prompt or f"<image>\nWhat is {number}?"}
    usage = {"calls": 1, "images": 1, "prompt_tokens": 3, "generated_tokens": 2, "flops": 1e9, "seconds": 0.1}
    measured = {"metric": "accuracy", "scores": {"words": 1.0}, "usage": usage, "seconds": 0.1}
    return base | {"references": [f"red {number}", "crimson"], "output": output, "score": score} | measured | status | more


def _folder(path: Path, name: str, rows: list[dict[str, Any]], **identity: Any) -> Path:
    open_run(path, {"model": name, "items": {"all": len(rows)}, "suite": "cmt-open", "split": "test"} | identity, {})
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of 50 items; s0 .. s4 are answered with markup; s5's picture is not there, s6's is broken, s7 asks something else now."""
    root = tmp_path_factory.mktemp("html")
    (root / "data").mkdir()
    lines = []
    for number in range(50):
        question = "Another question?" if number == 7 else f"What is {number}?"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"red {number}"}]
        lines.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns, "answers": [f"red {number}", "crimson"]})
        if number == 6:
            (root / "data" / "6.png").write_bytes(b"no picture")
        elif number != 5:
            Image.new("RGB", (400, 200 + number), (200, 40, 3 * number)).save(root / "data" / f"{number}.png")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for split in ("train", "test"):
        (root / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    plain = [_row(i, EVIL[i].replace("\ud800", "") if i < len(EVIL) else f"red {i}", 100.0 * (i % 3 == 0)) for i in range(50)]
    other = [_row(i, "blue", None if i == 9 else 30.0, images_from="s8" if i == 1 else None) for i in range(49)]
    other[45] = plain[45]
    runs = (_folder(root / "a", "<i>plain</i>", plain), _folder(root / "b", "other", other))
    module = program("eval/report.py")
    written = module.main(module.Args(runs=runs, out=root / "out", data_root=root / "data", thumbnail_side=128))
    assert (written.items, written.pictures, written.missing) == (50, 48, 3)  # 47 own pictures and the one that `other` was shown for s1
    module.main(module.Args(runs=runs, out=root / "out", data_root=root / "data", thumbnail_side=128))  # goes on from what is there
    return root / "out" / "index.html"


class _Page(HTMLParser):
    """What the tests ask of a dumped page: the title, the cards in order, the pictures with their natural widths, all text by card."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.title, self.count = "", ""
        self.cards: dict[str, str] = {}
        self.images: list[dict[str, str | None]] = []
        self.scores: list[str | None] = []
        self._card: str | None = None
        self._tag = ""
        self._skipped = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self._tag = "count" if values.get("id") == "count" else tag
        if tag in ("script", "style"):
            self._skipped = True
        if tag == "article":
            self._card = str(values["data-id"])
            self.cards[self._card] = ""
        if tag == "img":
            self.images.append(values)
        if "data-score" in values:
            self.scores.append(values["data-score"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._skipped = False
        if tag == "article":
            self._card = None

    def handle_data(self, data: str) -> None:
        if self._tag == "title":
            self.title += data
        elif self._tag == "count":
            self.count += data
        elif self._card is not None and not self._skipped:
            self.cards[self._card] += data
        self._tag = "" if self._tag in ("title", "count") else self._tag


def _open(index: Path, address: str, profile: Path) -> _Page:
    if CHROMIUM is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--window-size=1300,9000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{index.as_uri()}#{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "<article" in done.stdout or "No item" in done.stdout, done.stderr[-2000:]
    return _Page(done.stdout)


def test_pictures_scores_and_text_are_shown_and_answers_do_no_harm(report: Path, tmp_path: Path) -> None:
    page = _open(report, "mark=", tmp_path)
    assert page.title == "<i>plain</i>, other" and page.count == "50 items"
    assert list(page.cards) == [f"s{i}" for i in range(20)]  # one page
    for number, text in enumerate(EVIL):
        assert text.replace("\ud800", "") in page.cards[f"s{number}"]
    assert all(re.fullmatch(r"images/[0-9a-f]{20}-128\.webp", str(image["src"])) for image in page.images)  # no <img> but ours
    assert len(page.images) == 18 and all(image["data-shown"] == "128" for image in page.images)
    assert [n for n, text in page.cards.items() if "picture missing" in text] == ["s5", "s6", "s7"]
    assert page.scores[:4] == ["100", "30", "0", "30"]
    assert "error: <b>no image</b>" in page.cards["s9"] and "red 9orcrimson" in page.cards["s9"]
    assert "was shown the picture of s8" in page.cards["s1"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("q=what+11", ["s11"]),
        ("category=Visual+QA&sort=high&run=0", [f"s{i}" for i in (3, 9, 15, 21, 27, 33, 39, 45)]),
        ("status=error", ["s9"]),
        ("status=ok&run=1&min=31&max=99", []),
        ("run=0&min=100&family=side", [f"s{i}" for i in range(0, 50, 6)]),
        ("page=99&differ=answer&run=nonsense&theme=%3Cimg%3E", [f"s{i}" for i in (40, 41, 42, 43, 44, 46, 47, 48, 49)]),
    ],
)
def test_filters_come_from_the_address(report: Path, tmp_path: Path, address: str, expected: list[str]) -> None:
    cards = list(_open(report, address, tmp_path).cards)
    assert cards[: len(expected)] == expected if "sort" in address else cards == expected


# --- bad input --------------------------------------------------------------------------------------------------------------------


def test_without_the_data_set_the_page_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _folder(tmp_path / "a", "a", [_row(0, "x", 1.0)])
    module = program("eval/report.py")
    assert module.main(module.Args(runs=(run,), out=tmp_path / "out", data_root=tmp_path / "nowhere")).missing == 1
    assert "--data-root" in capsys.readouterr().err and "data set was not found" in (tmp_path / "out" / "index.html").read_text()


def test_runs_of_other_splits_and_no_runs_are_refused(tmp_path: Path) -> None:
    module = program("eval/report.py")
    runs = tuple(_folder(tmp_path / split, split, [_row(0, "x", 1.0)], split=split) for split in ("val", "test"))
    with pytest.raises(RecordError, match="different suites or splits"):
        module.main(module.Args(runs=runs, out=tmp_path / "out"))
    with pytest.raises(RecordError, match="at least one"):
        module.main(module.Args(runs=(), out=tmp_path / "out"))
