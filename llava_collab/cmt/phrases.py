"""How the questions are worded: per family, the phrases of every split but one, and those kept for `test-template` alone.

Prompts are short on purpose: the smallest supported language model has 135 M parameters and is trained on CPUs.
Slots: {a} and {b} are things with their article, {x} is a label or name without one.
"""

from __future__ import annotations

import random
from typing import Final

# family -> (known phrases, held-out phrases)
PHRASES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "exists": (("Is there {a} in the picture?", "Does the picture show {a}?", "Is {a} visible?"), ("Can you find {a} here?",)),
    "count": (("How many objects are there?", "Count the objects."), ("What is the number of objects in this image?",)),
    "kind": (
        ("What kind of thing is it: animal, food, plant, vehicle, tool or instrument?",),
        ("Choose the group of this object: animal, food, plant, vehicle, tool or instrument.",),
    ),
    "which": (("Which is in the picture, {a} or {b}?", "Does it show {a} or {b}?"), ("Pick the one you can see: {a} or {b}.",)),
    "name": (("What is it?", "What is shown in the picture?", "Name the object."), ("Which object do you see?",)),
    "caption_one": (("Write a caption.", "Caption the picture."), ("Give a short caption for this image.",)),
    "caption_two": (("Write a caption.", "Caption the picture."), ("Give a short caption for this image.",)),
    "caption_part": (("Caption the object {x}.", "What is {x}? Write a caption."), ("Give a short caption for the thing {x}.",)),
    "side": (("Is the object {a} or {b}?", "Is it {a} or {b}?"), ("Where is the object, {a} or {b}?",)),
    "relation": (("Is {a} {x} {b}?", "Where is {a}: {x} {b}?"), ("Tell me if {a} is {x} {b}.",)),
    "relation_yesno": (("Is it true that {a} is {x} {b}?", "{a} is {x} {b}: yes or no?"), ("Check: {a} is {x} {b}. Correct?",)),
    "neighbour": (("What is {x} {a}?", "Which object is {x} {a}?"), ("Name the thing that is {x} {a}.",)),
    "larger": (("Which is {x}, {a} or {b}?", "Which one looks {x}: {a} or {b}?"), ("Pick the {x} object: {a} or {b}.",)),
    "map_direction": (
        ("Which region is further {x}, the {a} or the {b} one?", "Which is further {x}: {a} or {b}?"),
        ("Pick the region that lies more to the {x}: {a} or {b}.",),
    ),
    "map_size": (("Which region is {x}, the {a} or the {b} one?", "Which is {x}: {a} or {b}?"), ("Pick the {x} region: {a} or {b}.",)),
    "inventory": (
        ("Describe the picture in detail.", "List every object with its size and place."),
        ("Explain in detail what is where in this image.",),
    ),
    "inventory_part": (("Describe the object at the {x}.", "What is at the {x}? Describe it."), ("Give details of the thing at the {x}.",)),
    "fact": (("Describe the photo in detail.", "Tell me about what the photo shows."), ("Explain what is seen here and known about it.",)),
    "photo_name": (("What does the photo show?", "Name what is in the photo."), ("Which thing or place is photographed here?",)),
    "story": (("Tell the story of the pictures.", "Tell a short story."), ("What happens in these pictures, in order?",)),
    "ending": (("{x} Finish the story.", "{x} How does it end?"), ("{x} Write the last sentence.",)),
    "card_read": (("Read the name on the card.", "What is written on the card?"), ("Which word or words does the card carry?",)),
    "card_flag": (("Which country has this flag?", "Name the country of this flag."), ("To which country does this flag belong?",)),
    "capital": (("What is the capital of this country?", "Name this country's capital."), ("Which capital city does this country have?",)),
    "continent": (
        ("Is this country in Africa, the Americas, Asia, Europe or Oceania?",),
        ("Pick the continent of this country: Africa, the Americas, Asia, Europe or Oceania.",),
    ),
    "element_name": (("Which element is this?", "Name the element."), ("What is the chemical element on this tile called?",)),
    "element_number": (("What is the atomic number of this element?", "Give its atomic number."), ("Which atomic number is it?",)),
    "element_symbol": (("Read the symbol.", "Which symbol is on the tile?"), ("Which letters stand in large print?",)),
    "sign": (("What does the sign say?", "Read the sign."), ("Which word is written here?",)),
    "chart_top": (("Which bar is the {x}?", "Which label has the {x} bar?"), ("Name the category with the {x} value.",)),
    "chart_value": (("What is the value of the {x} bar?", "Which number has the {x} bar?"), ("Read the number of the {x} bar.",)),
    "chart_compare": (("Is the {a} bar larger than the {b}?", "Does the {a} bar exceed the {b}?"), ("Is the {b} bar below the {a}?",)),
    "chart_count": (("How many bars are there?", "Count the bars."), ("What is the number of bars in the chart?",)),
    "receipt_price": (("How much is the {x}?", "What does the {x} cost?"), ("Read the price of the {x}.",)),
    "receipt_total": (("What is the total?", "How much is it in all?"), ("Read the sum to pay.",)),
    "receipt_top": (("Which item costs the {x}?", "What costs the {x}?"), ("Name the item with the {x} price tag.",)),
    "receipt_count": (("How many items were bought?", "Count the items."), ("What is the number of items on the receipt?",)),
}  # fmt: skip


def phrase(family: str, held_out: bool, rng: random.Random, **slots: str) -> tuple[str, str]:
    """(template id such as "exists/0" or, held out, "exists/h0"; the worded question with a capital at its start)."""
    options = PHRASES[family][held_out]
    index = rng.randrange(len(options))
    worded = options[index].format(**slots)
    return f"{family}/{'h' if held_out else ''}{index}", worded[0].upper() + worded[1:]


def with_article(name: str) -> str:
    """ "camel" -> "a camel", "owl" -> "an owl"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
