"""The judge, against a server of our own: verdicts, retries, limits, kills, keys, and what a hostile answer or server may try."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import ROOT, program

from llava_collab.collab.endpoint import JUDGE_KEY as KEY
from llava_collab.collab.endpoint import Client, EndpointError
from llava_collab.evaluation.judge import HEADER, JUDGEMENTS, PROMPT, PROMPT_SHA256, Budget, JudgeError, last, parse_verdict
from llava_collab.evaluation.judge_report import judge_table
from llava_collab.evaluation.records import RecordError, open_run, read_lines, write_rows
from llava_collab.evaluation.report import read_runs

Answer = tuple[int, dict[str, str], Any]
SECRET = "sk-very-secret-7"


def verdict(text: str, prompt: int = 100, generated: int = 10) -> Answer:
    usage = {"prompt_tokens": prompt, "completion_tokens": generated}
    return 200, {}, {"model": "judge-1", "choices": [{"message": {"content": text}}], "usage": usage}


class Server:
    """An endpoint whose answer to the n-th request (from 0) is `behave(n, prompt)`; keeps what it was sent."""

    def __init__(self) -> None:
        self.behave: Callable[[int, str], Answer] = lambda n, prompt: verdict("5 5")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers) | {"path": self.path})
                content = body["messages"][0]["content"]
                status, headers, payload = outer.behave(number, content if isinstance(content, str) else content[0]["text"])
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                try:
                    self.send_response(status)
                    for name, value in (headers | {"Content-Length": str(len(data))}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client gave up, as some tests want

            def log_message(self, *_: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in (KEY, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def client(server: Server, **more: Any) -> Client:
    return Client(server.url, "judge", backoff=0.01, **more)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Six descriptions and two yes/no questions, answered `good N` by the baseline and `bad N` by the other run."""
    (tmp_path / "data").mkdir()
    lines: list[dict[str, Any]] = []
    for number in range(8):
        category = "Detailed Description" if number < 6 else "Spatial Inference"
        turns = [{"from": "human", "value": f"<image>\nDescribe {number}."}, {"from": "gpt", "value": f"truth {number}"}]
        lines.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns, "category": category, "checklist": ["a hen"]})
        Image.new("RGB", (1000, 500), (10, 20, 200)).save(tmp_path / "data" / f"{number}.png")
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name in ("good", "bad"):
        rows = []
        for line in lines:
            number, prompt = line["id"][1:], line["conversations"][0]["value"]
            one = {"sample_id": line["id"], "category": line["category"], "family": "", "prompt": prompt, "metric": "rouge_l"}
            rows.append(
                one | {"references": [f"truth {number}"], "output": f"{name} {number}", "score": 5.0, "status": "ok", "error": None}
            )
        open_run(tmp_path / name, {"model": name, "items": {"all": 8}, "suite": "cmt-open", "split": "test"}, {})
        write_rows(tmp_path / name, rows)
    return tmp_path / "good", tmp_path / "bad"


def fair(number: int, prompt: str) -> Answer:
    """8 for `good`, 4 for `bad`, and a point more for whoever comes first."""
    first, second = (8 if "good" in part else 4 for part in re.split(r"\[Answer 2 ", prompt.split("[Answer 1 ")[1]))
    return verdict(f"{first + 1} {second}\nbecause")


def judged(runs: tuple[Path, ...], server: Server, out: Path, **more: Any) -> Any:
    module = program("eval/judge.py")
    options = {"parallel": 1, "attempts": 3, "data_root": runs[0].parent / "data"} | more
    return module.main(module.Args(runs=runs, endpoint=server.url, judge_model="judge", out=out, **options))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_collab.collab.endpoint._LONGEST_WAIT", 0.02)


# --- verdicts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "scores"), [("8 7", (8, 7)), ("\n **9.5, 1**\nwhy", (9.5, 1)), ("10 10.", (10, 10))])
def test_verdicts_are_read(text: str, scores: tuple[float, float]) -> None:
    assert parse_verdict(text) == scores


@pytest.mark.parametrize(
    "text", ["", "8", "8 7 6", "0 5", "11 5", "-8 7", "Answer 1: 8\n8 7", "8/10 7/10", "nan nan", "I can't. 8 7", "١ ٢ 3"]
)
def test_what_is_no_verdict_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no verdict"):
        parse_verdict(text)


def test_ratio_and_position_bias(runs: tuple[Path, Path], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.behave = fair
    summary = judged(runs, server, tmp_path / "out", parallel=3)
    assert str(summary) == "12 of 12 questions judged, 0 errors, 0 left"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| bad: Detailed"))
    # 8 and 4, each once with the point for the first place: 8.5 and 4.5.
    assert line.split(" | ")[1:] == ["6", "4.50", "8.50", "52.9 [52.9, 52.9]", "0 / 6 / 0", "+1.00 [+1.00, +1.00]", "0 % |"]
    rows = read_lines(tmp_path / "out" / JUDGEMENTS)
    assert {(row["order"], row["baseline_score"], row["score"]) for row in rows} == {("baseline first", 9, 4), ("baseline second", 8, 5)}
    # Three ask at a time, so the first to come is any of the first three.
    prompt = next(text for body in server.bodies if "Describe 0." in (text := body["messages"][0]["content"]))
    assert "truth 0" in prompt and "a hen" in prompt and "<image>" not in prompt
    assert all(body["temperature"] == 0 and body["max_tokens"] == 512 and body["model"] == "judge" for body in server.bodies)
    assert all(one["path"] == "/v1/chat/completions" and "Authorization" not in one for one in server.headers)
    header = json.loads((tmp_path / "out" / HEADER).read_text())["identity"]
    assert header["prompt"] == {"name": "pairwise-v1", "sha256": PROMPT_SHA256} and header["judge"] == "judge"
    with pytest.raises(RecordError):  # nothing for the rule-based tables here
        read_runs([tmp_path / "out"])


def test_the_prompt_is_the_pinned_one() -> None:
    """A changed wording needs a new PROMPT_NAME: figures of two wordings don't compare."""
    assert PROMPT_SHA256 == "db930034b1251025319a9dd6636e0d8f4af3e896a1cc95bd9fbc5beaab4d32b1"
    assert PROMPT.count("{first}") == PROMPT.count("{second}") == 1


def test_a_judge_that_only_likes_the_first_place_shows() -> None:
    def row(i: int, order: str, base: float, score: float) -> dict[str, Any]:
        about = {"sample_id": f"s{i}", "category": "x", "run": "r", "order": order}
        return about | {"status": "ok", "baseline_score": base, "score": score}

    rows = [row(i, o, *scores) for i in range(4) for o, scores in (("baseline first", (9, 3)), ("baseline second", (3, 9)))]
    rows.append(row(7, "baseline first", 10, 1))  # its other order has no verdict, so that it counts nowhere
    table = judge_table(rows, "b", ["r"])
    assert table.lines == [["r: x", "4", "6.00", "6.00", "100.0 [100.0, 100.0]", "0 / 0 / 4", "+6.00 [+6.00, +6.00]", "100 %"]]


def test_ratio_is_paired() -> None:
    from llava_collab.evaluation.statistics import ratio

    base = np.random.default_rng(0).uniform(1, 10, 50)
    result = ratio(0.8 * base, base)
    assert result.mean == pytest.approx(0.8) and result.half_width < 1e-12
    loose = ratio(0.8 * base[::-1], base)
    assert loose.mean == pytest.approx(0.8) and loose.half_width > 0.05


def test_an_answer_cannot_pretend_to_be_the_end(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    judged(runs, server, tmp_path / "out")
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    marks = {re.findall(r"\[Answer 1 (\w+)\]", prompt)[0] for prompt in prompts}
    assert len(marks) == 6  # of the sample and its answers, which can't hold their own hash
    assert all(prompt.count(next(m for m in marks if m in prompt)) == 6 for prompt in prompts)


# --- a server that fails ----------------------------------------------------------------------------------------------------------


def test_busy_then_good(server: Server) -> None:
    server.behave = lambda n, prompt: [(429, {"Retry-After": "0"}, {}), (503, {}, b"oops"), verdict("8 7")][n]
    reply = client(server).ask("q")
    assert (reply.text, reply.prompt_tokens, reply.lost, len(server.bodies)) == ("8 7", 100, 0, 3)


def test_retry_after_is_obeyed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_collab.collab.endpoint._LONGEST_WAIT", 60.0)
    server.behave = lambda n, prompt: (429, {"Retry-After": "3"}, {}) if n == 0 else verdict("8 7")
    one, waits = client(server), list[float]()
    monkeypatch.setattr(one.stop, "wait", lambda seconds: waits.append(seconds))
    assert one.ask("q").text == "8 7" and waits == [3.0]


def test_time_out_is_tried_again_and_counted(server: Server) -> None:
    over = threading.Event()

    def silent_at_first(n: int, prompt: str) -> Answer:
        if n == 0:
            over.wait(60)
        return verdict("8 7")

    server.behave = silent_at_first
    reply = client(server, timeout=2.0).ask("q")
    over.set()
    assert (reply.text, reply.lost, len(server.bodies)) == ("8 7", 1, 2)
    assert Budget(10, 10).cost(reply, worst=0.5) == pytest.approx(0.5 + 110 * 10 / 1e6)


def test_attempts_end_with_the_reason(server: Server) -> None:
    server.behave = lambda n, prompt: (500, {}, b"no memory")
    reply = client(server, attempts=2).ask("q")
    assert reply.error == "2 attempts, the last: HTTP 500: no memory" and len(server.bodies) == 2
    server.http.shutdown()
    server.http.server_close()
    assert "ConnectionRefused" in str(client(server, attempts=2).ask("q").error)


@pytest.mark.parametrize("payload", [b"<html>", {}, {"choices": []}, {"choices": [{"message": None}]}, [1], {"choices": 3}])
def test_what_is_no_completion_is_an_error(server: Server, payload: Any) -> None:
    server.behave = lambda n, prompt: (200, {}, payload)
    assert "not a chat completion" in str(client(server).ask("q").error)


def test_a_refused_question_is_its_own_error_and_a_refused_key_stops(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave = lambda n, prompt: (400, {}, b"too long")
    assert client(server).ask("q").error == "HTTP 400: too long" and len(server.bodies) == 1
    monkeypatch.setenv(KEY, SECRET)
    server.behave = lambda n, prompt: (401, {}, f"bad key {SECRET}".encode())
    with pytest.raises(EndpointError, match=rf"401: bad key \[{KEY}\]") as error:
        client(server).ask("q")
    assert SECRET not in str(error.value) and server.headers[-1]["Authorization"] == f"Bearer {SECRET}"
    other = Server()
    server.behave = lambda n, prompt: (307, {"Location": f"{other.url}/chat/completions"}, b"")
    with pytest.raises(EndpointError, match="307"):
        client(server).ask("q")
    assert not other.bodies  # the key did not go there
    other.http.shutdown()
    other.http.server_close()


def test_a_key_is_hidden_before_the_text_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    for status, length in ((400, 500), (200, 200)):
        text = "x" * (length - 8) + SECRET  # the cut falls into the key
        server.behave = lambda n, prompt, status=status, text=text: (status, {}, text.encode())
        error = str(client(server).ask("q").error)
        assert SECRET[:4] not in error and error.endswith("x" + f"[{KEY}]"[:8])


def test_the_key_goes_to_this_machine_past_the_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv(KEY, SECRET)
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        assert Client(url, "judge", attempts=1).ask("q").text == "5 5"
    assert len(server.bodies) == 2 and not proxy.bodies
    monkeypatch.delenv(KEY)
    assert Client("http://judge.invalid/v1", "judge", attempts=1).ask("q").text == "5 5" and len(proxy.bodies) == 1
    proxy.http.shutdown()
    proxy.http.server_close()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("localhost:8000", "base URL"),
        ("file:///etc/passwd", "base URL"),
        ("https://user:pw@host/v1", "no user"),
        ("https://host/v1?key=1", "no user"),
        ("http://host/v1", "unencrypted"),
    ],
)
def test_a_wrong_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(EndpointError, match=message):
        Client(endpoint, "judge")


def test_malformed_verdicts_are_errors_and_asked_again(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    server.behave = lambda n, prompt: verdict("\ud800 I like both" if n < 2 else "6 6")
    summary = judged(runs, server, tmp_path / "out")
    assert (summary.judged, summary.errors) == (10, 2)
    rows = read_lines(tmp_path / "out" / JUDGEMENTS)
    assert [(row["status"], row["score"], row["baseline_score"]) for row in rows[:2]] == [("error", None, None)] * 2
    assert "no verdict" in rows[0]["error"] and rows[0]["verdict"].endswith("I like both")
    summary = judged(runs, server, tmp_path / "out")
    assert (summary.judged, summary.errors, len(server.bodies)) == (12, 0, 14)
    rows = read_lines(tmp_path / "out" / JUDGEMENTS)
    assert len(rows) == 14 and all(row["status"] == "ok" for row in last(rows).values())


def test_a_judge_that_never_gives_a_verdict_is_stopped(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    server.behave = lambda n, prompt: verdict("no comment")
    with pytest.raises(JudgeError, match="10 questions in a row"):
        judged(runs, server, tmp_path / "out")
    assert len(server.bodies) == 10


# --- money, kills, and folders ----------------------------------------------------------------------------------------------------


def test_the_cost_limit_stops_before_it(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    prices: dict[str, Any] = {"price_in": 10.0, "price_out": 20.0, "attempts": 1, "max_tokens": 100}
    one = (100 * 10 + 10 * 20) / 1e6  # what the server counts
    summary = judged(runs, server, tmp_path / "out", cost_limit=0.0001, **prices)
    assert (summary.judged, summary.left, summary.spent, len(server.bodies)) == (0, 12, 0, 0)
    summary = judged(runs, server, tmp_path / "out", cost_limit=0.02, parallel=4, **prices)
    assert 0 < summary.judged < 12 and summary.left == 12 - summary.judged == 12 - len(server.bodies)
    assert summary.spent == pytest.approx(one * summary.judged) and summary.spent <= 0.02
    more = judged(runs, server, tmp_path / "out", cost_limit=0.02 + one, **prices)  # the first part's bill counts on
    assert more.judged == summary.judged + 1 or more.judged == summary.judged
    assert judged(runs, server, tmp_path / "out", cost_limit=1.0, **prices).judged == 12


def test_money_of_time_outs_never_passes_the_limit(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    def silent(n: int, prompt: str) -> Answer:
        time.sleep(0.3)
        return verdict("8 7")

    server.behave = silent
    prices: dict[str, Any] = {"price_in": 10.0, "price_out": 20.0, "attempts": 2, "max_tokens": 100, "timeout": 0.05}
    summary = judged(runs, server, tmp_path / "out", cost_limit=0.08, parallel=2, **prices)
    assert summary.errors >= 1 and summary.left > 0 and 0 < summary.spent <= 0.08


@pytest.mark.parametrize("budget", [{"limit": 1.0}, {"limit": float("nan"), "price_in": 1.0}, {"price_in": -1.0}])
def test_a_limit_that_cannot_hold_is_refused(budget: dict[str, float]) -> None:
    with pytest.raises(JudgeError):
        Budget(**budget)


def test_killed_and_gone_on_with(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    def slow(n: int, prompt: str) -> Answer:
        time.sleep(0.0 if n != 5 else 30.0)
        return verdict("8 7")

    server.behave = slow
    command = [sys.executable, "eval/judge.py", "--runs", *map(str, runs), "--endpoint", server.url, "--judge-model", "judge"]
    command += ["--out", str(tmp_path / "out"), "--parallel", "1", "--data-root", str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), KEY: SECRET, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(server.bodies) < 6 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = tmp_path / "out" / JUDGEMENTS
    assert len(read_lines(path)) == 5
    path.write_bytes(path.read_bytes() + b'{"sample_id": "s')  # cut off while writing
    server.behave = fair
    summary = judged(runs, server, tmp_path / "out")
    assert summary.judged == 12 and len(server.bodies) == 6 + 7  # five were kept, the sixth was under way
    assert SECRET not in "".join(file.read_text() for file in (tmp_path / "out").iterdir())


def test_a_second_judge_on_a_folder_is_refused(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    refused = []

    def meanwhile(n: int, prompt: str) -> Answer:
        if n == 3:
            try:
                judged(runs, server, tmp_path / "out")
            except RecordError as error:
                refused.append(str(error))
        return verdict("8 7")

    server.behave = meanwhile
    assert judged(runs, server, tmp_path / "out").judged == 12
    assert len(server.bodies) == 12 and "another process is writing here" in refused[0]


def test_other_judges_prompts_and_answers_are_refused(
    runs: tuple[Path, Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(runs, server, tmp_path / "out")
    asked = len(server.bodies)
    with pytest.raises(RecordError, match=r"parameters\.temperature"):
        judged(runs, server, tmp_path / "out", temperature=0.5)
    with pytest.raises(RecordError, match="questions_sha256"):
        judged(runs, server, tmp_path / "out", items_per_category=3)
    with monkeypatch.context() as patch:
        patch.setattr("llava_collab.evaluation.judge.PROMPT_SHA256", "0")
        with pytest.raises(RecordError, match=r"prompt\.sha256"):
            judged(runs, server, tmp_path / "out")
    text = (runs[1] / "records.jsonl").read_text()
    (runs[1] / "records.jsonl").write_text(text.replace("bad 3", "better 3"))
    with pytest.raises(RecordError, match="questions_sha256"):
        judged(runs, server, tmp_path / "out")
    assert len(server.bodies) == asked


def test_pictures_travel_as_data(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    (tmp_path / "data" / "2.png").unlink()
    summary = judged(runs, server, tmp_path / "out", with_images=True)
    assert (summary.judged, summary.errors, len(server.bodies)) == (10, 2, 10)  # without its picture a question is not asked
    text, picture = server.bodies[0]["messages"][0]["content"]
    assert "are attached" in text["text"] and picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1]))) as image:
        assert image.size == (768, 384)


def test_other_data_and_lonely_runs_are_refused(runs: tuple[Path, Path], server: Server, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="at least one other"):
        judged(runs[:1], server, tmp_path / "out")
    with pytest.raises(RecordError, match="no sample of these categories"):
        judged(runs, server, tmp_path / "out", categories=("Knowledge OCR",))
    path = tmp_path / "data" / "test.jsonl"
    path.write_text(path.read_text().replace("Describe 1.", "Describe 111."))
    with pytest.raises(RecordError, match="'s1' is another question"):
        judged(runs, server, tmp_path / "out")
    assert not server.bodies
