"""Text normalisation that scores rest on: short answers (VQA), captions (COCO), numbers, yes/no answers and phrases.

Every function is pure and offline, so that a score can be recomputed from a record file anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {
    word: str(number)
    for number, words in enumerate(
        [("zero", "none"), ("one",), ("two",), ("three",), ("four",), ("five",), ("six",), ("seven",), ("eight",), ("nine",), ("ten",)]
    )
    for word in words
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official table: single words by ending, and forms of several apostrophes, each with one apostrophe lost. Ambiguous words (its, were,
# well, ill, shed, id) are not in it.
_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'s": "he how somebody someone that there what when where who why",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
}
_SEVERAL = (
    "couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've y'all'd've y'all'll you'd've 'ow's'at"
)
_CONTRACTED = [stem + ending for ending, stems in _STEMS.items() for stem in stems.split()] + _SEVERAL.split()
_CONTRACTED += ["ma'am", "o'clock", "'twas", "y'all"]
CONTRACTIONS = {word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, mark in enumerate(word) if mark == "'"}

_PLURALS = (
    "men:man people:person children:child feet:foot teeth:tooth geese:goose mice:mouse knives:knife wives:wife leaves:leaf loaves:loaf "
    "wolves:wolf shelves:shelf calves:calf halves:half scarves:scarf thieves:thief hooves:hoof oxen:ox shoe:shoe shoes:shoe"
)
_IRREGULAR = {many: one for many, one in (pair.split(":") for pair in _PLURALS.split())}
_COMMON = {"ie": "y", "oe": "o", "use": "us", "men": "man"}  # cookie(s), tomato(es), bus(es), woman and women
_POLARITY = {"yes": True, "true": True, "no": False, "false": False}
_NUMBER = re.compile(r"[$€£¥]?\s*([-+−]?)[$€£¥]?\s*(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?\s*%?")
# Tokens as the Penn Treebank has them: clitics on their own; abbreviations, numbers with inner marks, and words joined by hyphens or
# slashes whole. Marks beyond Latin-1 (emoji, zero-width marks) are no tokens.
_CAPTION_PIECE = re.compile(
    r"""n't\b | '(?:s|re|ve|ll|d|m)\b | o'clock\b | ma'am\b
    | (?:[^\W\d_]\.){2,} | [a-hj-z]\.(?!\w) | (?:mr|mrs|ms|dr|prof|st|mt|jr|sr|vs|etc|inc|ltd)\.
    | [+-]?(?:\d+(?:[.,:]\d+)+ | \d+/\d+ | \.\d+) | (?<!\w)[+-]\d+
    | \w+?(?=n't\b) | \w+(?:[-/]\w+)* | [!-~¡-ÿ]""",
    re.VERBOSE,
)
_CAPTION_JOINED = re.compile(r"\b(can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|wan)(?=na\b)|got(?=ta\b))")
_CAPTION_DROPPED = frozenset("'`.?!,:;-\"()[]{}")


def normalise_answer(text: str) -> str:
    """The normaliser of the VQA challenge (VQA v2 evaluation code): punctuation, lower case, number words, articles, contractions.

    A mark next to a space, or any mark where the text holds a number such as `1,000`, vanishes; other marks become a space. Full stops
    vanish unless a digit follows. Contractions that lost one apostrophe get it back (`dont` -> `don't`). A typographic apostrophe counts as
    a plain one, which the official code does not do.
    """
    text = text.replace("\n", " ").replace("\t", " ").replace("’", "'").strip()
    grouped = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = grouped or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    words = [NUMBER_WORDS.get(word, word) for word in re.sub(r"\.(?!\d)", "", cleaned).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def caption_tokens(text: str) -> list[str]:
    """Lower-case tokens of a caption, without punctuation: a small stand-in for the Java PTBTokenizer of COCO's evaluation.

    Agrees with it on captions as people write them. Known differences: PTBTokenizer keeps brackets as `-lrb-` and `-rrb-` and runs like
    `?!`, which are dropped here; it rewrites some signs (a euro becomes a dollar), knows more abbreviations, and keeps addresses and tags.
    """
    text = _CAPTION_JOINED.sub(r"\1 ", text.lower().replace("’", "'"))
    return [piece for piece in _CAPTION_PIECE.findall(text) if piece not in _CAPTION_DROPPED]


def parse_number(text: str) -> float | None:
    """The number that the whole text states, or None: `1,234.5`, `-3`, `$2.50`, `5%` (= 5: the sign is a unit, not a factor), `7.`."""
    match = _NUMBER.fullmatch(text.strip().removesuffix("."))
    if match is None or not (match[2] or match[3]):
        return None
    value = float((match[2] or "0").replace(",", "") + (match[3] or ""))
    return -value if match[1] in ("-", "−") else value


def polarity(text: str) -> bool | None:
    """True for yes/true, False for no/false, judged by the first word; None for anything else."""
    words = re.findall(r"[a-z]+", text.lower())
    return _POLARITY.get(words[0]) if words else None


def words_of(text: str) -> list[str]:
    """Lower-case words (letters and digits, inner apostrophes and hyphens kept)."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("’", "'"))


def singular(word: str) -> str:
    """A rough singular, used on both sides of a comparison: `boxes` -> `box`, `knives` -> `knife`, `glass` stays.

    Not always a word: where English can't be undone by rule both forms go to a third (`cookie`, `cookies` -> `cooky`).
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending, common in _COMMON.items():
        if len(word) > 3 and word.endswith(ending) and not word.endswith(("ouse", "ause")):
            return word.removesuffix(ending) + common
    return word


def phrase_key(text: str) -> tuple[str, ...]:
    """Words of a phrase as they are compared: singular, without articles, number words as digits."""
    return tuple(singular(NUMBER_WORDS.get(word, word)) for word in words_of(text) if word not in ARTICLES)


def find_phrases(text: str, phrases: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The phrases (as `phrase_key`s) that occur in the text; the longest wins where two overlap (`fire truck` is not also `truck`)."""
    words = phrase_key(text)
    by_first: dict[str, list[tuple[str, ...]]] = {}
    for phrase in sorted(set(phrases), key=len, reverse=True):
        if phrase:
            by_first.setdefault(phrase[0], []).append(phrase)
    found: list[tuple[str, ...]] = []
    at = 0
    while at < len(words):
        hit = next((phrase for phrase in by_first.get(words[at], ()) if words[at : at + len(phrase)] == phrase), None)
        if hit is not None:
            found.append(hit)
        at += len(hit) if hit else 1
    return found
