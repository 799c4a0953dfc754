"""Asks a chat model behind an OpenAI-compatible endpoint, and is patient: too many requests, server errors and time-outs are tried again.

The standard library's client, since the core brings no other that stays the same over its tested versions.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.images import shrunk

JUDGE_KEY, REMOTE_KEY = "JUDGE_API_KEY", "REMOTE_API_KEY"
"""Environment variables of API keys. Names of their own, so that another service's key is never sent to an endpoint by accident."""

IMAGE_SIDE = 768
"""Pictures are sent as JPEG of at most so many pixels a side."""

_LONGEST_WAIT = 60.0  # seconds between two attempts
_LARGEST_REPLY = 1 << 22  # bytes


class EndpointError(ValueError):
    """Nothing can be asked this way: wrong endpoint, key or model; the message names the cure."""


@dataclass(frozen=True)
class Reply:
    """What came back, or why nothing did. Tokens are None where the server did not count them.

    `lost` counts attempts that got no answer and may have been billed all the same (time-outs, broken connections).
    """

    text: str = ""
    model: str = ""
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    error: str | None = None
    lost: int = 0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Client:
    """One model at one endpoint (`https://host/v1`; `/chat/completions` is added). Raises EndpointError for one that can't be used."""

    endpoint: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 120.0
    """Seconds without a byte from the server."""
    attempts: int = 5
    backoff: float = 1.0
    """Seconds before the second attempt, doubled for each further one, unless the server says how long to wait."""
    key: str = JUDGE_KEY
    """Name of the environment variable that holds the API key, where one is needed."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end all waiting: a question that waits for its next attempt is given up."""

    def __post_init__(self) -> None:
        url = urllib.parse.urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise EndpointError(f"endpoint {self.endpoint}: has to be a base URL such as http://localhost:8000/v1")
        if url.username or url.password or url.query or url.fragment:
            raise EndpointError(
                f"endpoint: no user, password or query in the URL, it is written to the records; the key goes in {self.key}"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError(f"{self.key} holds characters that no key has; set it anew")
        if self._key and url.scheme == "http" and not _is_local(url.hostname):
            raise EndpointError(
                f"endpoint {self.endpoint}: {self.key} would travel unencrypted; use https, or unset {self.key} if none is needed"
            )

    @property
    def _key(self) -> str:
        return os.environ.get(self.key, "").strip()

    def ask(self, content: str | list[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> Reply:
        """One question (text, or text and image parts) after `earlier` messages, with retries.

        Raises EndpointError where every other question would fail too.
        """
        body = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        data = json.dumps(body | {"messages": [*earlier, {"role": "user", "content": content}]}).encode()
        lost, reason = 0, ""
        for attempt in range(self.attempts):
            wait = min(_LONGEST_WAIT, self.backoff * 2**attempt) * random.uniform(0.8, 1.2)  # noqa: S311 - spreads clients, no secret
            try:
                return self._reply(self._post(data), lost)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {self._said(error)}"
                if error.code in (401, 403, 404) or error.code < 400:
                    raise EndpointError(
                        f"{self.endpoint}: {reason}\nCheck the endpoint, the name of the model, and the key in {self.key}."
                    ) from error
                if error.code < 500 and error.code not in (408, 409, 429):
                    return Reply(error=reason, lost=lost)
                wait = _retry_after(error) or wait
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                reason = f"{type(cause).__name__}: {cause}"
                lost += not isinstance(cause, ConnectionRefusedError)
            if attempt + 1 < self.attempts and self.stop.wait(wait):
                return Reply(error=f"stopped before another attempt; the last: {reason}", lost=lost)
        return Reply(error=f"{self.attempts} attempts, the last: {reason}", lost=lost)

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.endpoint.rstrip('/')}/chat/completions", data, headers)
        # To this machine without the environment's proxy: it would read the key on a connection that is not encrypted.
        direct = [urllib.request.ProxyHandler({})] if _is_local(urllib.parse.urlsplit(self.endpoint).hostname or "") else []
        with urllib.request.build_opener(_NoRedirects, *direct).open(request, timeout=self.timeout) as response:
            return response.read(_LARGEST_REPLY)

    def _reply(self, content: bytes, lost: int) -> Reply:
        try:
            body = json.loads(content)
            text = body["choices"][0]["message"]["content"]
            usage = body.get("usage") or {}
            prompt, generated = (_count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens"))
            model = _clean(str(body.get("model", "")))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            return Reply(error=f"not a chat completion ({error}): {self._hidden(content)[:200]}", lost=lost + 1)
        if not isinstance(text, str):
            lost += prompt is None or generated is None
            return Reply("", model, prompt, generated, f"no text in the reply: {text!r}", lost)
        return Reply(_clean(text), model, prompt, generated, lost=lost)

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            return self._hidden(error.read(_LARGEST_REPLY))[:500]
        except (OSError, http.client.HTTPException):
            return "(no text)"

    def _hidden(self, content: bytes) -> str:
        """What a server said, as it may be shown and kept: some servers repeat the key in an error. To be cut after this, not before."""
        text = content.decode("utf-8", "replace").strip()
        return text.replace(self._key, f"[{self.key}]") if self._key else text


def image_part(image: Path | Any) -> dict[str, Any]:
    """A picture (a path, or a PIL image) as a part of a message's content. Raises SampleError where it can't be read."""
    picture = base64.b64encode(shrunk(image, IMAGE_SIDE, "JPEG")[0]).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}


def _count(tokens: Any) -> int | None:
    return tokens if isinstance(tokens, int) and tokens >= 0 else None


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can carry and a UTF-8 file can't."""
    return text.encode("utf-8", "replace").decode()


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait, if it says so in seconds."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(error.headers.get("Retry-After", ""))))
    except ValueError:
        return None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
