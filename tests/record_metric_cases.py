"""Record what the reference implementations of the metrics give on generated cases: tests/evaluation_*_cases.json.

    python tests/record_metric_cases.py --vqa VQA --chair Hallucination --pattern pattern --lmms-eval lmms-eval

Run it where cases are added, in an environment that has pycocoevalcap (with Java), scikit-learn, anls-star and rouge-score as well. The
folders are checkouts of GT-Vision-Lab/VQA, LisaAnne/Hallucination, clips/pattern and EvolvingLMMs-Lab/lmms-eval; their code is loaded
from there, no line of it is in this project. Inputs are generated with a seed, from phrases written for this purpose.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import tyro

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Args:
    """Regenerate the recorded cases of the metrics' cross-check."""

    vqa: Path
    """Checkout of the official VQA evaluation code."""

    chair: Path
    """Checkout of the CHAIR authors' code."""

    pattern: Path
    """Checkout of Pattern, whose singular CHAIR uses."""

    lmms_eval: Path
    """Checkout of lmms-eval."""


def load(path: Path, prepare: Callable[[str], str] = str) -> Any:
    """The module in a file, after `prepare` of its source. Print statements of Python 2 become nothing."""
    source = re.sub(r"^(\s*)print .*$", r"\1pass", prepare(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        file.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def write(name: str, source: str, **cases: Iterable[Any]) -> None:
    """One case a line, so that changes can be read."""
    groups = []
    for key, rows in cases.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        groups.append(f"{json.dumps(key)}:[\n{lines}\n]")
    path = HERE / f"evaluation_{name}_cases.json"
    path.write_text("{" + f'"source":{json.dumps(source)},\n' + ",\n".join(groups) + "}\n", encoding="utf-8")
    print(path.name, {key: len(list(rows)) for key, rows in cases.items()}, f"{path.stat().st_size / 1000:.0f} kB")


# Short answers ------------------------------------------------------------------------------------------------------------------------

ANSWERS = (
    "red;dark red;dog;cats;fire truck;t-shirt;tennis racket;left;right side;kitchen;yes;no;none;zero;one;two;ten;3;7;1,000;12,345;3.5;50%;"
    "$5;can't tell;cant tell;dont know;he's;hes;wouldn'tve;wouldntve;oclock;10 o'clock;U.S.A.;St. Mary;café;naïve;猫;½;the;an;A;B;(C);"
    "a;its;let's;somebody'd;mother-in-law;black/white;rock & roll;#1;10:30;2019"
).split(";")
SPACING = (" ", " ", " ", ", ", "-", "/", "  ", "\n", "\t", ". ", " - ", "; ", "; the ", " and a ")
WRAPPED = ("{}", "{}", "{}.", "The {}", "a {}", "{}!", '"{}"', "({})", " {} ", "{}?", "It's {}", "{},", "[{}]", "{} .", "_{}_", "{}…")
TRAPS = (
    "The cat.;a dog and a bird;No!;yes.;1,000 people;1,000, or so;3.5.;v1.2.;red / blue;thats it;'Stop';left, right;left,right;ten\tcats\n"
    "and one dog;50%;;the;theyre two;well-done;who's there?;whos there?;a  b   c;couldve been;shell;5-6 people;don’t;it’s a dog;...;?!;.;-;"
    "a an the;wait" + "." * 40 + "what.;one.two;a.b.c;3. 5;.5;5.;you'dve;youd've;'ow'sat;yall'll;y'allll;İstanbul;ß;１０"
).split(";")


def answer(rng: random.Random) -> str:
    """An answer in one of the ways in which people and models write it."""
    words = [rng.choice(ANSWERS) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    text = rng.choice(WRAPPED).format("".join(word + rng.choice(SPACING) for word in words[:-1]) + words[-1])
    return rng.choice((str, str, str, str.upper, str.title))(text)


def record_vqa(args: Args) -> None:
    rng = random.Random(1)
    module = load(args.vqa / "PythonEvaluationTools" / "vqaEvaluation" / "vqaEval.py")
    judge = module.VQAEval(SimpleNamespace(getQuesIds=lambda: []), None, n=10)

    def normalise(text: str) -> str:
        return judge.processDigitArticle(judge.processPunctuation(text.replace("\n", " ").replace("\t", " ").strip()))

    def accuracy(output: str, people: list[str]) -> float:
        answers = [{"answer": text, "answer_id": number} for number, text in enumerate(people)]
        judge.vqa = SimpleNamespace(qa={0: {"answers": answers, "question_type": "", "answer_type": ""}})
        judge.vqaRes = SimpleNamespace(qa={0: {"answer": output}})
        with redirect_stdout(io.StringIO()):  # its progress bar
            judge.evaluate([0])
        return judge.evalQA[0]

    texts = list(dict.fromkeys([*TRAPS, *ANSWERS, *(answer(rng) for _ in range(260))]))
    pairs = [(rng.choice(WRAPPED).format(a), rng.choice((a, a, rng.choice(ANSWERS)))) for a in rng.choices(ANSWERS, k=250)]
    soft = []
    for _ in range(300):
        base = rng.sample(ANSWERS, 3)
        spread = rng.choice(((1, 0, 0), (9, 1, 0), (7, 2, 1), (5, 3, 2), (1, 1, 1)))
        count = rng.choice((10,) * 12 + (5, 3, 2))
        people = [rng.choice((str, str, str, rng.choice(WRAPPED).format))(a) for a in rng.choices(base, spread, k=count)]
        if spread == (1, 0, 0):
            people = [people[0]] * count
        output = rng.choice(WRAPPED).format(rng.choice((*base, base[0], rng.choice(ANSWERS))))
        soft.append((output, Counter(people), round(accuracy(output, people), 6)))
    write(
        "vqa",
        "GT-Vision-Lab/VQA, vqaEval.py: processPunctuation and processDigitArticle, equality of their results, evaluate",
        normalised=[(text, normalise(text)) for text in texts],
        same=[(a, b, normalise(a) == normalise(b)) for a, b in pairs],
        soft=soft,
    )


def record_anls() -> None:
    from anls_star import anls_score

    rng = random.Random(2)
    words = (
        "Total;total;RM 12.30;12.30;No. 5;Jalan Bukit;;a;ab;  spaced   out ;Straße 7;東京都;INVOICE NO: 1183;25/12/2018;É;a b c d e".split(
            ";"
        )
    )
    cases = []
    for _ in range(320):
        options = [rng.choice(words) for _ in range(rng.randint(1, 3))]
        output = list(rng.choice(options) * rng.choice((1, 1, 1, 2, 40)))
        for _ in range(rng.choice((0, 0, 1, 2, 3, 6))):
            at = rng.randint(0, len(output))
            output[at : at + rng.randint(0, 1)] = rng.choice(("", "x", " ", "7", "É", "."))
        text = rng.choice((str, str.upper, str.strip))("".join(output))
        cases.append((text, options, round(anls_score(gt=tuple(options), pred=text), 9)))
    write("anls", "anls-star: anls_score, the best of several answers", cases=cases)


def number(rng: random.Random, value: float) -> str:
    """A number in one of the ways in which charts and models write it."""
    text = f"{value:.{rng.choice((0, 1, 2, 4))}f}"
    thousands, scientific = f"{value:,.2f}", f"{value:.3e}"
    return rng.choice(
        (text,) * 8 + (thousands, f"{text}%", f"${text}", f"{text}.", f" {text}", text.replace("-", "−"), scientific, f"+{text}")
    )


def record_relaxed(args: Args) -> None:
    rng = random.Random(3)
    correct = load(args.lmms_eval / "lmms_eval" / "tasks" / "chartqa" / "utils.py").relaxed_correctness
    texts = "Yes;no;Brazil;South Korea;2012-2014;nan;inf;1_000;twelve;;5 years;-;%;12,34".split(";")
    pairs = [
        (a, b) for a in ("95", "105", "94.9", "5", "5%", "0.05", "0", "0.0", "0.01", "0%", "") for b in ("100", "5", "5%", "0", "0.0", "0%")
    ]
    pairs += [(f"{tenths * factor:.5g}", str(tenths / 10)) for tenths in range(1, 40) for factor in (0.105, 0.095)]
    for _ in range(380):
        target = rng.choice((0.0, 5, 12, 100, -40, 0.37, 1234.5, 2015, 2_000_000, rng.uniform(0, 90)))
        close = target * (1 + rng.choice((0, 0, 0.01, -0.03, 0.049, -0.049, 0.05, -0.05, 0.0501, 0.06, 0.2, -2, -1.95)))
        pairs.append((number(rng, close), number(rng, target)))
    for _ in range(80):
        target = rng.choice(texts)
        pairs.append((rng.choice((target, target.upper(), f"{target}.", rng.choice(texts), "5")), rng.choice((target, target, "5"))))
    pairs = list(dict.fromkeys(pairs))
    write("relaxed", "lmms-eval, tasks/chartqa/utils.py: relaxed_correctness", cases=[(a, b, bool(correct(a, b))) for a, b in pairs])


def record_yes_no() -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    rng = random.Random(4)
    cases = []
    for _ in range(220):
        truth = rng.choices("yn", (rng.choice((0, 1, 1, 3)), 1), k=rng.randint(1, 24))
        said = [rng.choices((t, "n" if t == "y" else "y", "?"), (6, 2, 1))[0] for t in truth]
        figures = accuracy_score(truth, said), balanced_accuracy_score(truth, said), said.count("y") / len(said)
        cases.append(("".join(truth), "".join(said), *(round(figure, 9) for figure in figures)))
    write("yes_no", "scikit-learn: accuracy_score, balanced_accuracy_score; the share of y. y yes, n no, ? neither", cases=cases)


# Longer texts -------------------------------------------------------------------------------------------------------------------------

PLAIN = 240
SUBJECTS = (
    "a dog;two dogs;the cat;a man;a woman in a red coat;three children;a black-and-white cow;an old truck;a boat;the boy's kite;a bird"
).split(";")
VERBS = "runs;is running;sits;stands;jumps;plays;doesn't move;can't fly;is sleeping;waits;looks at a ball;rides a bike;holds 2 cups".split(
    ";"
)
PLACES = (
    "on the grass;in deep snow;on a lake;near the old house;under a tree;at the beach;beside a fence;in the street;on a table;at 3:30;"
    "on the left side of the road;in front of a brown building"
).split(";")
MARKED = (
    "{}.",
    "{}!",
    "{}...",
    "{} (or so)",
    "“{}”",
    '"{}"',
    "Well, {}",
    "{}; it's late",
    "{} - I'm sure?!",
    "{}, 1/2 full",
    "{}: 5% off",
    "{} & more",
    "{} é 猫",
    "I cannot see: {}",
    "{}, 1,000.5 times",
    "It’s {}",
)
TOKENS = (
    "A cat's toy isn't here.;The dogs' bowls are empty.;I cannot see it.;He is gonna go, gotta run.;"
    "It costs $5.99 or 5% more.;At 3:30 p.m. the U.S. flag flies.;Mr. Smith and Dr. Jones.;A 1/2 full glass, 3-year-old boy.;"
    "Rock 'n' roll & jazz.;#1 fan @ the game.;Well... it is -- so to speak - fine.;"
    "“Quoted” ‘single’ text — with dashes – here…;A café with naïve décor, 猫が座る.;1,000,000 people, 3.14 pies, 1,5.;"
    "e.g. apples, i.e. fruit, etc.;red/green and/or blue;(in brackets) [square] {curly};email me@x.com or http://a.b/c;"
    "10am 5pm 7th 20s 1990's;the '90s;DON'T CAN'T I'm you're they've he'll she'd let's;'tis 'twas;y'all;o'clock ma'am;"
    "well-known state-of-the-art;-5 degrees +3;A+ grade;c#;100% sure?!;No. 5;vs. St. Louis;J. K. Rowling;U.S.A. is. USA.;"
    "end.Start nospace;hello,world;5.;.5 0.5 5,000.25;555-1234 555-1234;£5 and €6;½ cup;A. B. C.;emoji 🐶 dog;zero\u200bwidth;"
    "tab\there  double;n't;isnt dont;Jr. Inc.;d'you c'mon 'em;gimme lemme wanna;<b>bold</b>;:);AT&T;Jan. 5th, 2015.;3d 4x4 1st;"
    "ü ñ ß É;twenty-one hot-dog stands;two  .;. . .;;dog's. cat's,;'s start;2+2=4"
).split(";")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in (SUBJECTS, VERBS, PLACES))


def reworded(rng: random.Random, text: str) -> str:
    """A caption near another: words lost, swapped, repeated or replaced; now and then nothing, or a loop."""
    words = text.split()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(words))
        words[at : at + rng.randint(0, 2)] = rng.choice((["a"], ["big", "dog"], [words[at]] * 2, words[at : at + 2][::-1], ["red"]))
    return " ".join(words * rng.choice((1,) * 18 + (2, 12)))


def captions(rng: random.Random) -> list[tuple[str, list[str]]]:
    """Candidates and their references: the first `PLAIN` of words alone, then 60 with marks, then traps."""
    items = []
    for index in range(PLAIN + 60):
        references = [sentence(rng).replace("doesn't", "does not").replace("can't", "can not") for _ in range(rng.randint(1, 3))]
        if index < PLAIN:
            references = [re.sub(r"[^\w\s]", " ", text) for text in references]
        candidate = reworded(rng, rng.choice(references))
        if index >= PLAIN:
            candidate, *references = (rng.choice(MARKED).format(text) for text in (candidate, *references))
            candidate = rng.choice((candidate, candidate.capitalize(), candidate.upper()))
        items.append((candidate, references))
    items += [("", ["a dog runs"]), ("...", ["a dog runs"]), ("a", ["a dog runs", "a"]), ("a dog", ["the"]), ("dog " * 200, ["a dog runs"])]
    return items


def record_captions() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(5)
    items = captions(rng)
    texts = list(dict.fromkeys([*TOKENS, *(rng.choice(MARKED).format(sentence(rng)) for _ in range(190))]))
    every = list(dict.fromkeys([*texts, *(text for candidate, references in items for text in (candidate, *references))]))
    lines = PTBTokenizer().tokenize({text: [{"caption": text}] for text in every})
    tokens = {text: lines[text][0] for text in every}
    outputs = {i: [tokens[candidate]] for i, (candidate, _) in enumerate(items)}
    references = {i: [tokens[text] for text in texts] for i, (_, texts) in enumerate(items)}

    train = CiderScorer()  # the "training captions" are the candidates of all items
    test = CiderScorer()
    for i in outputs:
        train += (outputs[i][0], outputs[i])
        test += (outputs[i][0], references[i])
    train.compute_doc_freq()
    test.document_frequency = train.document_frequency
    cider = test.compute_cider()
    program = Meteor()
    _, meteor = program.compute_score(references, outputs)
    corpus, _ = program.compute_score(*({i: texts[i] for i in range(PLAIN)} for texts in (references, outputs)))
    rouge_score = RougeScorer(["rougeL"])
    rows = []
    for i, (candidate, texts_of) in enumerate(items):
        rouge = rouge_score.score_multi(texts_of, candidate)["rougeL"]
        figures = (cider[i], meteor[i], rouge.fmeasure, Rouge().calc_score(outputs[i], references[i]))
        rows.append((candidate, texts_of, *(round(float(figure), 9) for figure in figures)))
    windows = [[(start + step) % len(items) for step in range(4)] for start in range(len(items))]
    bleu = [
        Bleu(4).compute_score({i: references[i] for i in window}, {i: outputs[i] for i in window}, verbose=0)[0][3] for window in windows
    ]
    write(
        "caption",
        "pycocoevalcap 1.2 on PTB tokens (CIDEr-D with frequencies of the candidates; METEOR; ROUGE-L; BLEU-4 of each item and the three "
        "behind it) and rouge-score; an item is candidate, references, CIDEr-D, METEOR, ROUGE-L of rouge-score, ROUGE-L of COCO",
        tokens=[(text, tokens[text]) for text in texts],
        items=rows,
        bleu=[round(value, 9) for value in bleu],
        meteor_of_plain=[PLAIN, round(corpus, 9)],
    )


OBJECTS = (
    "dog;cat;bird;horse;truck;bus;boat;bench;umbrella;cake;bowl;box;train;toilet;sheep;bear;pizza;knife;person;traffic light;fire hydrant;"
    "hot dog;teddy bear;wine glass;cell phone"
).split(";")


def plural(name: str) -> str:
    odd = {"knife": "knives", "person": "people", "sheep": "sheep"}
    return odd.get(name) or name + ("es" if name.endswith(("s", "x", "ch")) else "s")


def record_chair(args: Args) -> None:
    import nltk
    from nltk.tokenize import NLTKWordTokenizer

    # What CHAIR imports and this machine lacks: Pattern (its verbs left out, which singularize does not need) and NLTK's sentence model.
    sys.modules |= {name: ModuleType(name) for name in ("pattern", "pattern.text", "pattern.en", "misc")}
    for name in "Verbs INFINITIVE PRESENT PAST FUTURE FIRST SECOND THIRD SINGULAR PLURAL SG PL PROGRESSIVE PARTICIPLE".split():
        setattr(sys.modules["pattern.text"], name, name)
    inflect = args.pattern / "pattern" / "text" / "en" / "inflect.py"
    vars(sys.modules["pattern.en"])["singularize"] = load(inflect, lambda text: text.split("#### VERB CONJUGATION")[0]).singularize
    vars(sys.modules["misc"])["os"] = os
    words = NLTKWordTokenizer()
    nltk.word_tokenize = lambda text: [word for part in re.split(r"(?<=[.!?])\s+", text) for word in words.tokenize(part)]
    module = load(args.chair / "utils" / "chair.py")

    rng = random.Random(6)
    endings = (".", " and {}.", ", {} and {}.", " with {} beside {}. It's nice", "; {}, {}, {}!") * 5 + (" on a baby {} at a train track.",)
    cases = []
    for _ in range(260):
        named = rng.choices(rng.sample(OBJECTS, 4), k=4)
        said = [rng.choice((f"a {name}", f"the red {name}", f"two {plural(name)}", f"{plural(name).capitalize()}")) for name in named]
        text = rng.choice(
            ("{}", "Here is {}", "There are {}", "A hot day, dog days: {}", "nothing", "So hot, dogs and {}")[: rng.choice((5, 5, 6))]
        ).format(said[0])
        cases.append((text + rng.choice(endings).format(*said[1:]), sorted(rng.sample(named, 2) + rng.sample(OBJECTS, 2))))
    cases += [("", ["dog"]), ("...", ["dog"]), ("nothing", []), ("dog " * 60 + "cat", ["dog"])]
    metrics = dict.fromkeys(("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L"), 0)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("data").mkdir()
        Path("data", "synonyms.txt").write_text("\n".join(OBJECTS), encoding="utf-8")
        judge = module.CHAIR(range(len(cases)), "")
        judge.imid_to_objects = {number: set(present) for number, (_, present) in enumerate(cases)}
        captions = {str(number): {"image_id": number, "caption": text} | metrics for number, (text, _) in enumerate(cases)}
        Path("captions.json").write_text(json.dumps({"overall": metrics, "imgToEval": captions}), encoding="utf-8")
        found = {row["image_id"]: row for row in judge.compute_chair("captions.json")["sentences"]}
    rows = []
    for i, (text, present) in enumerate(cases):
        scores = found[i]["metrics"]
        rows.append((text, present, found[i]["mscoco_generated_words"], scores["CHAIRs"], round(scores["CHAIRi"], 9)))
    write(
        "chair",
        "LisaAnne/Hallucination, chair.py, without synonyms; a case is text, objects there, objects named, CHAIR-s, CHAIR-i",
        objects=OBJECTS,
        cases=rows,
    )


def main(args: Args) -> None:
    record_vqa(args)
    record_anls()
    record_relaxed(args)
    record_yes_no()
    record_chair(args)
    record_captions()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
