"""English text out of the asset packages, to count which tokens a small vocabulary should hold."""

from __future__ import annotations

import gzip
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from llava_collab.assets.store import unpacked

# The packages hold hardly any questions, so words that only people who ask use would be missing without these.
INSTRUCTIONS = (
    "What is in this picture? Which of these animals is it? Who or what is shown here? Where is the bird? Why? How many apples are",
    "there?",
    "Is there a bicycle in the image? Are there two dogs? Does the photo show a car? Can you see it? Answer yes or no. Yes. No. Yes,",
    "there is.",
    "Describe this image in detail. Describe the photograph. Write a caption for the picture. Give a short description. Explain",
    "briefly.",
    "Tell a short story about these pictures. Once upon a time there was a little penguin who walked through the forest and met a",
    "friend.",
    "First, then, next, after that, finally, at last. One day in the morning. The next day. In the evening they went home happily.",
    "The end.",
    "Is the cat to the left or to the right of the tree? Above, below, behind, in front of, between, next to, near, far from, inside,",
    "on top.",
    "Which region lies north of it? East, south, west, northeast, northwest, southeast, southwest. Nearest, farthest, larger,",
    "smaller, neighbours.",
    "Top left, top right, bottom left, bottom right, center. The biggest and the smallest object. First, second, third, fourth from",
    "the left.",
    "Read the text in the image. What does the sign say? What is written on the card? What is the capital of this country? What",
    "currency?",
    "Which chemical element has this symbol? What is its atomic number? Hydrogen, oxygen, carbon, nitrogen, iron, gold, silver, copper.",
    "Look at the chart. Which month has the highest value? What is the sum, the difference, the average, the maximum, the minimum,",
    "the total?",
    "January February March April May June July August September October November December Monday Tuesday Wednesday Thursday Friday",
    "Saturday Sunday",
    "Invoice, receipt, ticket, timetable, poster: date, time, price, quantity, item, amount, tax, subtotal, cash, customer, number,",
    "departure.",
    "zero one two three four five six seven eight nine ten eleven twelve. One Two Three Four Five Six Seven Eight Nine Ten",
    "red orange yellow green blue purple pink brown black white gray. Red Orange Yellow Green Blue Purple Pink Brown Black White Gray",
    "Answer with one word. Answer with a single word or phrase. Choose one of the options: A, B, C, D. Reply with a number. Use one",
    "sentence.",
)
MANUAL = ("ADVANCED-STAMPS-HOWTO", "EXTENDING", "FAQ", "OPTIONS", "README")


def corpus_lines() -> Iterator[str]:
    """Instructions, stamp captions, a drawing program's manual, descriptions of laboratory tools and terms, country facts."""
    yield from INSTRUCTIONS * 20  # more often than any rare word of the packages
    stamps = unpacked("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.txt")):
        yield path.read_text(encoding="utf-8").split("\n", 1)[0]
    manual = unpacked("tuxpaint-data") / "usr/share/doc/tuxpaint-data/en"
    for name in MANUAL:
        yield from gzip.decompress((manual / f"{name}.txt.gz").read_bytes()).decode("utf-8").splitlines()
    for name in ("tools", "knowledge"):
        tree = ElementTree.parse(unpacked("kalzium-data") / f"usr/share/kalzium/data/{name}.xml")
        yield from (text.strip() for text in tree.getroot().itertext() if text.strip())
    for country in json.loads((unpacked("world-countries") / "countries.json").read_text(encoding="utf-8")):
        currencies = (currency["name"] for currency in country["currencies"].values())
        names = (country["name"]["common"], country["region"], country["subregion"], *country["capital"])
        yield ", ".join((*names, *country["languages"].values(), *currencies))
