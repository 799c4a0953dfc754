"""What the questions of CMT-open claim: splits as pure functions, truth of the scenes, balance of the answers."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_cmt_sources import make_assets

from llava_collab.cmt import catalogue, scenes, splits
from llava_collab.cmt.draw import LEAST_TEXT
from llava_collab.cmt.families import BY_NAME
from llava_collab.cmt.families import spatial as spatial_module
from llava_collab.cmt.items import pool_of
from llava_collab.cmt.oracle import Unsolved, solve
from llava_collab.cmt.phrases import phrases, with_article
from llava_collab.cmt.sources import read_world
from llava_collab.cmt.splits import group_rng


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return read_world(make_assets(tmp_path_factory.mktemp("assets")))


@pytest.fixture(scope="module")
def questions(world):
    """Some hundreds of test questions of the two categories that are scored by exact answers."""
    pool = pool_of(world, "test")
    return {
        name: [question for g in range(600) for question in BY_NAME[name].make(pool, group_rng(name, "test", g), 1).questions]
        for name in ("Visual QA", "Spatial Inference", "Text-Rich Images QA")
    }


@pytest.fixture(scope="module")
def every_question(world):
    """Category -> [(question, truths of its pictures)], from the split with the most wordings to go wrong and from train."""
    found = {name: [] for name in BY_NAME}
    for split in ("train", "test-template"):
        pool = pool_of(world, split)
        for name, category in BY_NAME.items():
            for number in range(120):
                group = category.make(pool, group_rng(name, split, number), 1)
                found[name] += [(question, [group.truths[i] for i in question.images]) for question in group.questions]
    return found


def test_seeds_depend_on_category_split_and_group_only():
    draws = {
        group_rng(category, split, group).random()
        for category in ("Visual QA", "Knowledge OCR")
        for split in ("train", "test")
        for group in (0, 1)
    }
    assert len(draws) == 8 and group_rng("Visual QA", "test", 1).random() in draws
    with pytest.raises(ValueError, match="dev"):
        group_rng("Visual QA", "dev", 0)


def test_known_share_and_salts():
    names = [name for _, name in catalogue.stamps().values()]
    unseen = {name for name in names if not splits.is_known("object", catalogue.sense_of(name))}
    assert 0.12 < len(unseen) / len(set(names)) < 0.28
    assert splits.is_known("object", "camel") and not splits.is_known("object", "turkey")
    groups = {group for group, name in catalogue.stamps().values() if name in unseen}
    assert groups == {group for group, _ in catalogue.stamps().values()}, "each group needs unseen things"


def test_every_place_of_the_stories_is_on_both_sides():
    places = {name: place for name, place in catalogue.BACKGROUNDS.items() if place}
    train = {place for name, place in places.items() if splits.is_train_background(name)}
    test = {place for name, place in places.items() if not splits.is_train_background(name)}
    assert train == test == set(places.values())


def test_split_rules():
    assert [split for split in splits.SPLITS if not splits.uses_known_things(split)] == ["test-object"]
    assert [split for split in splits.SPLITS if splits.uses_train_backgrounds(split)] == ["train", "val"]
    assert [split for split in splits.SPLITS if splits.uses_held_out_phrases(split)] == ["test-template"]


def test_every_family_has_ten_wordings_in_two_disjoint_sets():
    for family, worded in phrases().items():
        known, held_out = worded["known"], worded["held_out"]
        assert len(known) >= 7 and len(held_out) >= 3 and len({*known, *held_out}) == len(known) + len(held_out), family
        assert all(len(text.split()) <= 20 for text in known + held_out), family
        slots = [frozenset(re.findall(r"{(\w)}", text)) for text in known + held_out]
        assert len(set(slots)) == 1, f"{family}: a wording without one of the slots asks something else"


def test_every_category_has_three_families_or_more(every_question):
    assert all(len({question.family for question, _ in found}) >= 3 for found in every_question.values())


def test_the_oracle_answers_every_family_from_the_truth_alone(every_question):
    """Independent rules lead from slots and truth to the stored answer, for every family there is."""
    assert {question.family for found in every_question.values() for question, _ in found} == set(phrases())
    for found in every_question.values():
        for question, truths in found:
            answer = solve(question.family, question.asked.slots, truths)
            assert answer.lower() in {text.lower() for text in question.answers}, (question.asked, question.answers, answer)
            if question.family.startswith("chart"):
                with pytest.raises(Unsolved):
                    solve(question.family, question.asked.slots, [{"rows": []}] if question.family != "chart_count" else [{}])


def test_print_has_a_stated_size(every_question):
    sizes = [size for found in every_question.values() for _, truths in found for truth in truths for _, size in _print(truth)]
    assert len(sizes) > 500 and min(sizes) >= LEAST_TEXT


def _print(truth):
    return truth["text"] if isinstance(truth.get("text"), list) else []


def test_article():
    assert (with_article("camel"), with_article("owl")) == ("a camel", "an owl")


def test_grid_truth(world):
    """Boxes lie in the picture and do not overlap, and the named corner is where the pixels changed."""
    pool = pool_of(world, "test")
    for seed in range(40):
        rng = group_rng("Visual QA", "val", seed)
        scene = scenes.grid(pool, rng, pool.things_apart(rng, 4))
        assert len({placed.corner for placed in scene.placed}) == 4
        for placed in scene.placed:
            x0, y0, x1, y1 = placed.box
            assert 0 <= x0 < x1 <= 224 and 0 <= y0 < y1 <= 224
            assert (placed.centre[0] < 112) == (placed.column == "left") and (placed.centre[1] < 112) == (placed.row == "top")
            others = [other.box for other in scene.placed if other is not placed]
            assert all(x1 <= b[0] or b[2] <= x0 or y1 <= b[1] or b[3] <= y0 for b in others)


def test_balance_of_closed_answers(questions):
    def shares(category, family):
        counts = Counter(question.answers[0] for question in questions[category] if question.family == family)
        total = sum(counts.values())
        assert total > 40, family
        return {answer: count / total for answer, count in counts.items()}

    assert abs(shares("Visual QA", "exists")["yes"] - 0.5) < 0.12
    assert max(shares("Visual QA", "count").values()) < 0.40
    assert max(shares("Visual QA", "kind").values()) < 0.32
    assert max(shares("Visual QA", "name").values()) < 0.08
    assert abs(shares("Spatial Inference", "relation_yesno")["yes"] - 0.5) < 0.14
    assert max(shares("Spatial Inference", "relation").values()) < 0.40
    assert abs(shares("Text-Rich Images QA", "chart_compare")["yes"] - 0.5) < 0.14


def test_first_named_option_is_right_half_of_the_time(questions):
    for category, family in (("Visual QA", "which"), ("Spatial Inference", "larger"), ("Spatial Inference", "map_direction")):
        first = [question.choices[0] in question.answers for question in questions[category] if question.family == family]
        assert abs(np.mean(first) - 0.5) < 0.16, family


def test_absent_things_are_really_absent(questions):
    for question in questions["Visual QA"]:
        if question.family == "exists":
            named = any(
                f" {with_article(name)} " in f" {question.prompt.replace('?', ' ')} ".replace("A ", "a ") for name in question.objects
            )
            assert named == (question.answers[0] == "yes")
        if question.family == "which":
            assert len(set(question.choices) & set(question.objects)) == 1


def test_map_question_agrees_with_the_drawn_pixels(world):
    pool = pool_of(world, "test")
    checked = 0
    for group in range(200):
        made = BY_NAME["Spatial Inference"].make(pool, group_rng("Spatial Inference", "test", group), 1)
        question = made.questions[0]
        if question.family != "map_direction":
            continue
        pixels = np.asarray(made.images[0])
        middle = {name: np.argwhere((pixels == spatial_module.COLOURS[name]).all(-1)).mean(0) for name in question.choices}
        word = next(word for word in ("north", "south", "east", "west") if word in question.prompt)
        axis, sign = {"north": (0, -1), "south": (0, 1), "east": (1, 1), "west": (1, -1)}[word]
        assert max(middle, key=lambda name: sign * middle[name][axis]) == question.answers[0]
        checked += 1
    assert checked > 10


def test_dark_cutout_on_dark_ground_gets_a_rim():
    from llava_collab.cmt.draw import paste_visibly

    ground = Image.new("RGB", (100, 100), (30, 30, 30))
    paste_visibly(ground, Image.new("RGBA", (40, 40), (20, 20, 20, 255)), (30, 30))
    assert ground.getpixel((50, 50)) == (20, 20, 20) and min(ground.getpixel((27, 50))) > 120
    light = Image.new("RGB", (100, 100), (230, 230, 230))
    paste_visibly(light, Image.new("RGBA", (40, 40), (20, 20, 20, 255)), (30, 30))
    assert light.getpixel((27, 50)) == (230, 230, 230)


def test_photograph_of_an_unseen_thing_is_unseen_too(world):
    from dataclasses import replace

    photos = (*world.photos, replace(world.photos[0], key="x/turkey", name="Turkey"), replace(world.photos[0], key="x/camel", name="Camel"))
    pools = {split: {photo.name for photo in pool_of(replace(world, photos=photos), split).photos} for split in ("train", "test-object")}
    assert "Camel" in pools["train"] and "Turkey" in pools["test-object"] and not pools["train"] & pools["test-object"]


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_group_has_as_many_questions_as_asked_for(world, name):
    pool, category = pool_of(world, "train"), BY_NAME[name]
    for group in range(25):
        made = category.make(pool, group_rng(name, "train", group), category.per_group)
        assert len(made.questions) == category.per_group
        assert {index for question in made.questions for index in question.images} <= set(range(len(made.images)))
