"""Remote models: what is sent, what is billed, and what a dead, slow or odd endpoint costs."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from PIL import Image
from test_collab_compose import SURE, Known
from test_evaluation_judge import Server, verdict

from llava_collab.collab.compose import Ensemble, Shunt
from llava_collab.collab.endpoint import REMOTE_KEY, Client, EndpointError
from llava_collab.collab.gates import Confidence, Random
from llava_collab.collab.remote import Remote
from llava_collab.types import Request, ScoringModel, Turn


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in (REMOTE_KEY, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server()
    yield served
    served.http.shutdown()


def remote(url: str, **more: object) -> Remote:
    return Remote(Client(url, "big", key=REMOTE_KEY, timeout=0.5, attempts=2, backoff=0.01), "remote", 2.0, 8.0, **more)  # type: ignore[arg-type]


def ask(name: str, **more: object) -> Request:
    return Request(name, (Turn("user", f"Which colour has {name}?"),), **more)  # type: ignore[arg-type]


def test_requests_travel_whole_and_tokens_are_priced(server: Server, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REMOTE_KEY, "sk-1")
    server.behave = lambda n, prompt: verdict("blue", prompt=50, generated=5)
    picture = tmp_path / "a.png"  # type: ignore[operator]
    Image.new("RGB", (8, 8), "blue").save(picture)
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "<image>\nWhich colour?"))
    answer = remote(server.url).generate([Request("r", turns, (picture,), 7, ("red", "blue"))])[0]
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"] and body["max_tokens"] == 7
    image, text, options = body["messages"][3]["content"]
    assert (
        image["image_url"]["url"].startswith("data:image/jpeg;base64,")
        and text["text"] == "Which colour?"
        and "red, blue" in options["text"]
    )
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    assert (answer.text, answer.usage.prompt_tokens, answer.usage.generated_tokens) == ("blue", 50, 5)
    assert answer.usage.price == pytest.approx((50 * 2 + 5 * 8) / 1e6) and answer.usage.calls == 1


def test_a_dead_endpoint_is_an_error_of_each_answer_and_degrades_where_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dead = remote(f"http://127.0.0.1:{port}/v1")
    answers = dead.generate([ask("a"), ask("b")])
    assert all("2 attempts, the last: ConnectionRefused" in str(answer.error) for answer in answers)
    small = Known("small", SURE)
    asked = [ask(name, choices=("red", "green", "blue")) for name in "abcd"]
    kept = Shunt(small, dead, Random(0), 2.0, "shunt", degrade=True).generate(asked)
    assert all(answer.error is None and answer.model == "small" and "remote failed" in answer.note for answer in kept)
    assert all(answer.by == ("small", "remote") for answer in kept)
    lost = Shunt(small, dead, Random(0), 2.0, "shunt").generate(asked)
    assert all(answer.error is not None for answer in lost)


def test_a_slow_endpoint_is_given_up_in_time(server: Server) -> None:
    def slow(n: int, prompt: str) -> object:
        time.sleep(3.0)
        return verdict("late")

    server.behave = slow  # type: ignore[assignment]
    start = time.perf_counter()
    answer = remote(server.url).generate([ask("a")])[0]
    assert time.perf_counter() - start < 2.9 and "attempts" in str(answer.error) and "may have been billed" in answer.note


def test_a_wrong_key_stops_at_once(server: Server) -> None:
    server.behave = lambda n, prompt: (401, {}, {"error": "who are you"})
    with pytest.raises(EndpointError, match="401"):
        remote(server.url).generate([ask("a")])


def test_many_requests_at_once_keep_their_order(server: Server) -> None:
    def echo(n: int, prompt: str) -> object:
        time.sleep(0.02 if n % 3 else 0.1)
        return verdict(prompt.split()[-1])

    server.behave = echo  # type: ignore[assignment]
    asked = [Request(str(k), (Turn("user", f"say {k}"),)) for k in range(32)]
    assert [answer.text for answer in remote(server.url, parallel=32).generate(asked)] == [str(k) for k in range(32)]


def test_it_names_choices_and_gives_no_probabilities(server: Server) -> None:
    """So it can be the large model of a classification; a gate that would read its scores says that there are none."""
    server.behave = lambda n, prompt: verdict(
        {"a": "Green.", "b": "red or blue", "c": "none", "d": "It is Nat-gas.", "e": "<"}[prompt.split("?")[0][-1]]
    )  # type: ignore[assignment]
    model, choices = remote(server.url), ("red", "green", "blue")
    assert isinstance(model, ScoringModel)
    fine, several, none = model.score([ask(name, choices=choices) for name in "abc"])
    assert fine.text == "green" and fine.scores is None and fine.error is None
    assert "names 2 of the choices" in several.note and "names 0" in none.note and none.usage.calls == 1
    assert none.text == "none" and none.error is None  # a wrong answer that was paid for, and is kept
    gases = model.score([ask("d", choices=("gas", "nat-gas", "<")), ask("e", choices=("gas", "nat-gas", "<"))])
    assert [answer.text for answer in gases] == ["nat-gas", "<"]
    small = Known("small", SURE)
    assert Shunt(small, model, Confidence(), 2.0).score([ask("a", choices=choices)])[0].text == "green"
    assert Ensemble((small, model, model)).score([ask("a", choices=choices)])[0].text == "green"
    with pytest.raises(ValueError, match="remote gave none"):
        Shunt(model, small, Confidence(), 2.0).score([ask("a", choices=choices)])
    with pytest.raises(ValueError, match="no choices"):
        model.score([ask("a")])


def test_pictures_in_memory_travel_too(server: Server) -> None:
    seen: list[object] = []
    server.behave = lambda n, prompt: seen.append(prompt) or verdict("a square")  # type: ignore[assignment, func-returns-value]
    request = Request("p", (Turn("user", "look: <image> what?"),), (Image.new("L", (8, 8)),))
    assert remote(server.url).generate([request])[0].text == "a square"
