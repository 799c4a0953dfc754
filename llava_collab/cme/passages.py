"""Families about a passage: its topic, whether it is spam, what it feels, which subject it had, whether two come from one newsgroup."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from llava_collab.cme.items import SPLITS, Item, Passage, Sources, balanced, by_label, cut, key_of, lettered
from llava_collab.data.chance import unit_interval

POST_WORDS, PAIR_WORDS, MAIL_WORDS, SUBJECT_WORDS = 120, 80, 100, 90
TITLE_WORDS = 20
HARD_SHARE = 0.25
"""Of the spams, for the family that sets them against hard ham; the others are set against easy ham."""
_SPAM = ("spam", "not spam")
_REPLY = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*(?:\[\d+\])?:|\s*\[[^\]]*\])+", re.IGNORECASE)


def topic(name: str, sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """The label of a post or story, out of all labels of its set; rare labels as often as common ones, while they last."""
    groups = by_label(sources.passages(name, split))
    choices = tuple(sorted(by_label(sources.passages(name, "train")).keys() | by_label(sources.passages(name, "test")).keys()))
    slots = {"choices": ", ".join(choices)}
    return [
        Item((passage.label,), (passage.key,), cut(passage.text, POST_WORDS), choices, slots)
        for passage in balanced(rng, groups, even=False)
    ]


def spam(hard: bool, sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Spam or not, half and half: against easy ham, or against ham that looks like spam (newsletters, offers that were asked for)."""
    mails = by_label(sources.passages("spam", split))
    groups = {
        "spam": [mail for mail in mails.get("spam", ()) if (unit_interval(f"hard|{mail.key}") < HARD_SHARE) == hard],
        "not spam": sources.passages("hard-ham", split) if hard else mails.get("ham", []),
    }
    return [_closed(mail, "not spam" if mail.label == "ham" else "spam", _SPAM, _letter(mail)) for mail in balanced(rng, groups, even=True)]


def sentiment(name: str, sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Positive or negative, half and half, as at least four of five raters have it."""
    found = balanced(rng, by_label(sources.passages(name, split)), even=True)
    return [_closed(one, one.label, ("positive", "negative"), cut(one.text, POST_WORDS)) for one in found]


def same_newsgroup(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Two posts, of one newsgroup or of two, half and half; each post is in one pair."""
    posts = {label: rng.sample(found, len(found)) for label, found in sorted(by_label(sources.passages("20ng", split)).items())}
    items = []
    while len(posts) > 1:
        alike = len(items) % 2 == 0
        first = rng.choice([label for label, left in posts.items() if len(left) > alike] or [""])
        if not first:
            break
        second = first if alike else rng.choice([label for label in posts if label != first])
        pair = posts[first].pop(), posts[second].pop()
        shown = "\n\n".join(f"Post {number}: {cut(post.text, PAIR_WORDS)}" for number, post in enumerate(pair, start=1))
        answer = "same" if alike else "different"
        items.append(Item((answer,), tuple(post.key for post in pair), shown, ("same", "different")))
        posts = {label: left for label, left in posts.items() if left}
    return items[: len(items) // 2 * 2]


def subject(sources: Sources, split: str, rng: random.Random) -> list[Item]:
    """Which of four subjects a mail had. One mail a subject; the wrong ones are those of other mails of the split."""
    earlier = SPLITS[SPLITS.index(split) + 1 :]  # a subject goes on through many mails: test keeps its own, then decision
    taken = {_subject_key(name) for other in earlier for name in _by_subject(sources, other)}
    mails = {name: mail for name, mail in _by_subject(sources, split).items() if _subject_key(name) not in taken}
    names = rng.sample(sorted(mails), len(mails))
    items = []
    for number, name in enumerate(names if len(names) > 3 else ()):
        options = rng.sample([other for other in names if other != name], 3)
        options.insert(number % 4, name)
        shown = f"Mail: {cut(mails[name].text.split(chr(10), 1)[1], SUBJECT_WORDS)}\n\n{lettered(options)}"
        items.append(Item(("ABCD"[number % 4],), (mails[name].key, _subject_key(name)), shown, tuple(options)))
    return items


def _by_subject(sources: Sources, split: str) -> Mapping[str, Passage]:
    """Subject (two words or more, without "Re:" and the list's name) -> the first mail that has it, of easy ham."""
    found: dict[str, tuple[str, Passage]] = {}
    for mail in sources.passages("spam", split):
        name = _REPLY.sub("", mail.text.split("\n", 1)[0]).strip()
        if mail.label == "ham" and len(name.split()) > 1:
            found.setdefault(_subject_key(name), (name, mail))
    return dict(found.values())


def _subject_key(name: str) -> str:
    return f"subject:{key_of(name)}"


def _letter(mail: Passage) -> str:
    title, body = mail.text.split("\n", 1)
    return f"Subject: {cut(title, TITLE_WORDS)}\n{cut(body, MAIL_WORDS)}"


def _closed(passage: Passage, answer: str, choices: tuple[str, ...], shown: str) -> Item:
    return Item((answer,), (passage.key,), shown, choices)
