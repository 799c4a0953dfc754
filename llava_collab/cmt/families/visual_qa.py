"""Visual QA: is there, how many, what kind, which of two, what is it. Right and wrong names are drawn from the same distribution."""

from __future__ import annotations

import random

from llava_collab.cmt import scenes
from llava_collab.cmt.items import Group, Pool, Question
from llava_collab.cmt.phrases import with_article
from llava_collab.cmt.scenes import Scene

LEADS = {"exists": 0.2, "which": 0.18, "count": 0.17, "kind": 0.25, "name": 0.2}
KINDS = ("animal", "food", "plant", "vehicle", "tool", "instrument")
_NUMBERS = ("one", "two", "three", "four")


def make(pool: Pool, rng: random.Random, count: int) -> Group:
    """A scene for the leading question; further ones only where they stay balanced: a count not where one thing is certain,
    a kind not where animals prevail."""
    lead = rng.choices(tuple(LEADS), weights=tuple(LEADS.values()))[0]
    if lead == "kind":
        kinds = [kind for kind in KINDS if any(thing.group == kind for thing in pool.things)]
        scene = scenes.single(pool, rng, pool.things_apart(rng, 1, group=rng.choice(kinds))[0])
    else:
        objects = 1 if lead == "name" else rng.randint(1, 4)
        things = pool.things_apart(rng, objects)
        scene = scenes.single(pool, rng, things[0]) if objects == 1 and lead != "count" else scenes.grid(pool, rng, things)
    present = rng.random() < 0.5
    extras = ["name", "exists", "which"] if lead in ("kind", "name") else ["count", "exists", "which"]
    extras = [family for family in extras if family != lead]
    questions = []
    for family in [lead, *extras][:count]:
        questions.append(_question(pool, rng, scene, family, present))
        present = present != (family == "exists")  # the next yes/no question about this picture has the other answer
    return Group((scene.image,), tuple(questions), (scene.truth,))


def _question(pool: Pool, rng: random.Random, scene: Scene, family: str, present: bool) -> Question:
    target = rng.choice(scene.placed).thing
    if family == "exists":
        asked = target if present else pool.things_apart(rng, 1, avoid=scene.senses)[0]
        question = pool.ask(rng, family, a=with_article(asked.name))
        return Question(question, ("yes" if present else "no",), scene.names, choices=("yes", "no"))
    if family == "which":
        options = [target, pool.things_apart(rng, 1, avoid=scene.senses)[0]]
        rng.shuffle(options)
        first, second = (option.name for option in options)
        question = pool.ask(rng, family, a=with_article(first), b=with_article(second))
        return Question(question, (target.name, with_article(target.name)), scene.names, choices=(first, second))
    if family == "count":
        number = len(scene.placed)
        return Question(pool.ask(rng, family), (str(number), _NUMBERS[number - 1]), scene.names, choices=("1", "2", "3", "4"))
    if family == "kind":
        return Question(pool.ask(rng, family), (target.group,), scene.names, choices=KINDS)
    return Question(pool.ask(rng, family), (target.name, with_article(target.name)), scene.names)
