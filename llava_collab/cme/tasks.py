"""The tasks (categories) of CME-open and the families that each is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

from llava_collab.cme import facts, passages, words
from llava_collab.cme.items import Item, Sources

Make = Callable[[Sources, str, random.Random], list[Item]]

TASKS: Mapping[str, Mapping[str, Make]] = {
    "Newsgroup Topic": {"newsgroup": partial(passages.topic, "20ng")},
    "News Topic": {"r8": partial(passages.topic, "r8"), "r52": partial(passages.topic, "r52")},
    "Spam": {"spam_easy": partial(passages.spam, False), "spam_hard": partial(passages.spam, True)},
    "Sentiment": {"movie": partial(passages.sentiment, "movie-reviews"), "product": partial(passages.sentiment, "product-reviews")},
    "Same Newsgroup": {"same_newsgroup": passages.same_newsgroup},
    "Subject Choice": {"subject": passages.subject},
    "Definition Choice": {"definition": words.definition},
    "Kind Of": {"kind_of": words.kind_of},
    "Synonym or Antonym": {"relation": words.relation},
    "Short Facts": {"capital": facts.capital, "continent": facts.continent, "border": facts.border},
}
"""Task -> family -> maker. A maker gives all items that a split can have, balanced, in the order in which they are taken."""
