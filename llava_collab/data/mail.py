"""An e-mail as it lies on a server -> the words that its reader sees."""

from __future__ import annotations

import binascii
import email
import html
import re
from email.message import Message

LONGEST_WORD = 30
LEAST_WORDS = 10
LEAST_LETTERS = 0.6
_LOOKED_AT = 1000
_UNSEEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-z!][^>]*>", re.DOTALL | re.IGNORECASE)
_DECODERS = {"base64": binascii.a2b_base64, "quoted-printable": binascii.a2b_qp}


def readable(raw: str) -> str | None:
    """ "subject\\nbody" of a mail, each in one line; None where there is no text of ten words in ASCII letters, or its subject is encoded.

    The body is the first plain part, else the first HTML part. Tags are left out of both (spam calls HTML plain), and with them addresses
    in angle brackets; so are words of more than 30 letters (links, encoded files).
    """
    message = email.message_from_string(raw)
    parts = {part.get_content_type(): part for part in reversed(list(message.walk()))}  # the first of each type
    part = parts.get("text/plain") or parts.get("text/html")
    subject = str(message.get("subject", ""))
    if part is None or "=?" in subject:
        return None
    body = html.unescape(_UNSEEN.sub(" ", _decoded(part)))
    words = [word for word in body.split() if len(word) <= LONGEST_WORD]
    text = " ".join(words)
    start = text[:_LOOKED_AT]  # other alphabets, files and lists of figures show here
    if len(words) < LEAST_WORDS or sum(one.isascii() and (one.isalpha() or one == " ") for one in start) < LEAST_LETTERS * len(start):
        return None
    return f"{' '.join(subject.split())}\n{text}"


def _decoded(part: Message) -> str:
    """The part's text. The package has decoded all that is not in a transfer encoding; a broken encoding is left as it is."""
    payload = str(part.get_payload())
    decode = _DECODERS.get(str(part.get("content-transfer-encoding", "")).strip().lower())
    if decode is None:
        return payload
    try:
        return decode(payload.encode()).decode(part.get_content_charset() or "latin-1", errors="replace")
    except (binascii.Error, LookupError):  # LookupError: a character set that Python does not know
        return payload
