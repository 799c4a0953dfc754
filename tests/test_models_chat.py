"""Sampling, streaming and chats: what comes out is what full forwards over the whole text, with the first turn's weights, would give."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from PIL import Image
from toy import BOTH, pad_batch, pixels, prompt, toy_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from llava_collab.chat import Chat, repl
from llava_collab.cli import main
from llava_collab.data.conversation import SampleError
from llava_collab.models.build import ModelSpec, build, extract_features
from llava_collab.models.hypernetwork import HyperNetwork
from llava_collab.models.tiny import tiny_tokenizer
from llava_collab.types import Request, Turn

ROWS = [prompt(6, images=1, seed=1), prompt(11, images=0, seed=2), prompt(4, images=2, seed=3)]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
A = tiny_tokenizer().convert_tokens_to_ids("a")
END = tiny_tokenizer().eos_token_id


def endless():
    """The toy with both experts, without an end-of-turn token, so that every sequence has the length that was asked for."""
    net = toy_model(**BOTH)
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
    return net


def by_hand(net, rows: list[torch.Tensor], images: torch.Tensor, steps: int, sample: bool) -> torch.Tensor:
    """[B, steps] new ids: one forward over everything a step, guidance from the prompt alone, no cache, none of `generate`."""
    batch = pad_batch(rows)
    ids, attended = batch["input_ids"], batch["attention_mask"]
    start = ids.shape[1]
    for _ in range(steps):
        position_ids = (attended.cumsum(1) - 1).clamp(min=0)
        guidance = attended.bool() & (torch.arange(ids.shape[1]) < start)
        logits = net(
            input_ids=ids, attention_mask=attended, position_ids=position_ids, pixel_values=images, guidance_mask=guidance, use_cache=False
        ).logits[:, -1]
        new = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        ids, attended = torch.cat([ids, new], 1), torch.cat([attended, torch.ones_like(new)], 1)
    return ids[:, start:]


@torch.no_grad()
def test_a_sampled_batch_is_what_its_seed_gives() -> None:
    net, images = endless(), pixels(3)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 6}

    def sampled(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return net.generate(**pad_batch(ROWS), pixel_values=images, **sampling)[:, max(map(len, ROWS)) :]

    torch.manual_seed(7)
    expected = by_hand(net, ROWS, images, 6, sample=True)
    assert torch.equal(sampled(7), expected) and torch.equal(sampled(7), expected)
    assert not torch.equal(sampled(8), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixel_values", "image_features"])
def test_several_samples_of_each_prompt_equal_a_batch_of_copies(kind: str) -> None:
    net, images = endless(), pixels(3)
    images = images if kind == "pixel_values" else extract_features(net, images)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(3)
    several = net.generate(**pad_batch([ROWS[0], ROWS[2]]), **{kind: images}, num_return_sequences=3, **sampling)
    torch.manual_seed(3)
    copied = torch.cat([images[:1]] * 3 + [images[1:]] * 3)
    copies = net.generate(**pad_batch([ROWS[0]] * 3 + [ROWS[2]] * 3), **{kind: copied}, **sampling)
    assert torch.equal(several.sequences, copies.sequences) and len(set(map(tuple, several.sequences.tolist()))) == 6
    torch.testing.assert_close(torch.stack(several.logits), torch.stack(copies.logits))  # a wrong image shows here first


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 4])
def test_generated_logits_and_beams_are_those_of_full_forwards(beams: int) -> None:
    net, images = endless(), pixels(3)
    out = net.generate(
        **pad_batch(ROWS), pixel_values=images, max_new_tokens=5, do_sample=False, num_beams=beams, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    start = max(map(len, ROWS))
    if beams == 1:
        assert torch.equal(out.sequences[:, start:], by_hand(net, ROWS, images, 5, sample=False))
        return
    full = torch.cat([pad_batch(ROWS)["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    guidance = full.bool() & (torch.arange(start + 5) < start)
    position_ids = (full.cumsum(1) - 1).clamp(min=0)
    logits = net(
        input_ids=out.sequences, attention_mask=full, position_ids=position_ids, pixel_values=images, guidance_mask=guidance
    ).logits  # fmt: skip
    scores = logits[:, start - 1 : -1].log_softmax(-1).gather(2, out.sequences[:, start:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, **CLOSE)  # a beam's score is its log-probability: nothing got mixed up


def test_two_threads_do_not_share_weights() -> None:
    """In lockstep: every step of one request falls between two steps of the other."""
    net, images = endless(), pixels(2)
    asks = [{**pad_batch([ROWS[0]]), "pixel_values": images[:1]}, {**pad_batch([ROWS[1]])}]
    alone = [net.generate(**ask, max_new_tokens=8, do_sample=False) for ask in asks]
    barrier = Barrier(2, timeout=60)

    def in_step(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        barrier.wait()
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate(ask: dict) -> torch.Tensor:
        return net.generate(**ask, max_new_tokens=8, do_sample=False, stopping_criteria=StoppingCriteriaList([in_step]))

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(generate, asks), alone, strict=True))


# --- chats: the tiny base, which has a processor ---


def picture(colour: str = "red", size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def tiny_model(**experts: dict):
    net, processor = build(ModelSpec(**(experts or BOTH)), seed=0)
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, HyperNetwork):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    if net.model.language_expert is None:  # else all that it says is line ends
        for layer in net.model.language_model.layers:
            torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    return net, processor


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def ask_again(tiny, turns: tuple[Turn, ...], images: list, tokens: int = 12) -> str:
    """The answer when the whole conversation is encoded anew."""
    net, processor = tiny
    batch = processor.encode_requests([Request("again", turns, tuple(images))])
    out = net.generate(**batch, do_sample=False, max_new_tokens=tokens)
    return processor.decode_answers(out[:, batch["input_ids"].shape[1] :], [tokens])[0][0]


class Say(LogitsProcessor):
    """Puts the given ids into the model's mouth."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids.pop(0)] = 0.0
        return forced


def saying(*ids: int) -> dict:
    return {"logits_processor": LogitsProcessorList([Say(list(ids))])}


TALK: list[tuple[str, list[Image.Image]]] = [
    ("What are these?", [picture("red"), picture("blue", (9, 31))]),
    ("Is there a cat?", []),
    ("And this <image> one?", [picture("green")]),
    ("Which is left?", []),
]


def test_a_chat_equals_encoding_the_whole_conversation_anew(tiny) -> None:
    chat, shown = Chat(*tiny, max_new_tokens=12), []
    for text, images in TALK:
        before = chat.history
        answer = "".join(chat.say(text, images))
        shown += images
        assert chat.history[:-2] == before and chat.history[-1] == Turn("assistant", answer)
        assert answer and answer == ask_again(tiny, chat.history[:-1], shown)
    first = chat.history[:2]
    chat.reset()
    assert chat.history == () and "".join(chat.say(*TALK[0])) == first[1].text and chat.history == first


@pytest.mark.parametrize("settings", [
    {"generator": "factorised", "activation": "swiglu"},
    {"guidance": "last_prompt_token", "layers": "all", "guidance_layer": 0},
    None,
])  # fmt: skip
def test_a_chat_is_exact_for_other_experts_too_and_without(settings: dict | None) -> None:
    both = tiny_model(**BOTH | {"language_expert": settings and BOTH["language_expert"] | settings})
    chat = Chat(*both, max_new_tokens=6)
    for text in ("Is it red?", "Is it left?"):
        assert "".join(chat.say(text)) == ask_again(both, chat.history[:-1], [], 6) != ""


def test_logits_of_a_chat_equal_teacher_forcing(tiny) -> None:
    """Over three turns, the tokens' logits while they were spoken and in one training forward over the whole conversation."""
    net, processor = tiny
    words = [processor.tokenizer.encode(w, add_special_tokens=False) for w in ("red", "yes", "the left one")]
    heard: list[torch.Tensor] = []
    hook = net.lm_head.register_forward_hook(lambda _m, _i, out: heard.append(out[0, -1].clone()))
    spoken = []
    chat = Chat(net, processor, max_new_tokens=8)
    for (text, images), ids in zip(TALK, words, strict=False):
        ids = [*ids, END]
        chat.generation |= saying(*ids)
        heard.clear()
        "".join(chat.say(text, images))
        spoken.append((ids, torch.stack(heard[-len(ids) :])))
    hook.remove()
    full = processor.encode(chat.history, [image for _, images in TALK for image in images])
    logits_TV = net(
        input_ids=full["input_ids"][None], guidance_mask=full["guidance_mask"][None], pixel_values=full["pixel_values"]
    ).logits[0]  # fmt: skip
    supervised = (full["labels"][1:] != -100).nonzero()[:, 0]
    assert full["labels"][supervised + 1].tolist() == [i for ids, _ in spoken for i in ids]
    torch.testing.assert_close(torch.cat([logits for _, logits in spoken]), logits_TV[supervised], **CLOSE)


def test_the_first_turn_writes_the_weights_and_the_cache_saves_the_rest(tiny) -> None:
    net, processor = tiny
    written: list[int] = []
    hook = net.model.language_expert.register_forward_hook(lambda _m, inputs, _o: written.append(1) if inputs[0] is not None else None)
    chat = Chat(net, processor, max_new_tokens=4, **saying(*[A] * 12))
    bills = []
    for text, images in TALK[:3]:
        "".join(chat.say(text, images))
        bills.append(chat.usage)
    hook.remove()
    assert len(written) == 1
    prompts = [len(processor.encode_text(chat.history[: 2 * k + 1], n_images=n, add_generation_prompt=True).input_ids)
               for k, n in enumerate((2, 2, 3))]  # fmt: skip
    assert bills[0].prompt_tokens == prompts[0] and bills[0].images == 2 and bills[1].images == 0
    for k in (1, 2):  # what is new: the last turn's last token, its end, and the question
        assert bills[k].prompt_tokens == prompts[k] - prompts[k - 1] - 3
    assert all(bill.generated_tokens == 4 and bill.flops > 0 and bill.calls == 1 for bill in bills)


def test_an_answer_that_tokenizes_otherwise_than_it_was_spoken(tiny) -> None:
    net, processor = tiny
    apart = [processor.tokenizer.convert_tokens_to_ids(c) for c in "red"]
    assert processor.tokenizer.encode("red", add_special_tokens=False) != apart
    chat = Chat(net, processor, max_new_tokens=12, **saying(*apart, END))
    assert list(chat.say(*TALK[0])) == ["r", "e", "d"]
    del chat.generation["logits_processor"]
    assert "".join(chat.say("Sure?")) == ask_again(tiny, chat.history[:-1], TALK[0][1])


def test_a_character_comes_whole_and_blanks_around_an_answer_never(tiny) -> None:
    net, processor = tiny
    ids = processor.tokenizer.encode("  \u00e9t\u00e9 \u4e2d ", add_special_tokens=False)
    assert len(ids) > 8
    chat = Chat(net, processor, **saying(*ids, END))
    assert list(chat.say("Say it")) == ["\u00e9", "t", "\u00e9", " \u4e2d"]
    broken = Chat(net, processor, max_new_tokens=len(ids) - 2, **saying(*ids))
    assert "".join(broken.say("Say it")) == processor.decode_answers(torch.tensor([ids[:-2]]), [99])[0][0]


def test_sampling_in_a_chat_is_that_of_generate(tiny) -> None:
    net, processor = tiny
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2}
    request = Request("q", (Turn("user", "Is it red?"),))
    torch.manual_seed(5)
    batch = processor.encode_requests([request])
    out = net.generate(**batch, max_new_tokens=10, **sampling)[:, batch["input_ids"].shape[1] :]
    torch.manual_seed(5)
    chat = Chat(net, processor, max_new_tokens=10, **sampling)
    assert "".join(chat.say("Is it red?")) == processor.decode_answers(out, [10])[0][0]


def test_two_chats_in_turn_do_not_share_anything(tiny) -> None:
    talks = [[("What is it?", [picture("red")]), ("Is it left?", [])], [("Is there a dog?", []), ("And here?", [picture("blue")])]]
    alone = []
    for talk in talks:
        chat = Chat(*tiny, max_new_tokens=8)
        alone.append(["".join(chat.say(*turn)) for turn in talk])
    chats, said = [Chat(*tiny, max_new_tokens=8) for _ in talks], [[], []]
    for turns in zip(*talks, strict=True):
        running = [chat.say(*turn) for chat, turn in zip(chats, turns, strict=True)]
        pieces: list[list[str]] = [[], []]
        while any(running):
            for k, speaker in enumerate(running):  # one piece of each in turn
                piece = next(speaker, None) if speaker else None
                pieces[k] += [piece] if piece else []
                running[k] = speaker if piece else None
        for k in range(2):
            said[k].append("".join(pieces[k]))
    assert said == alone and alone[0] != alone[1]


def test_an_answer_that_is_broken_off_stays_as_far_as_it_was_said(tiny) -> None:
    chat = Chat(*tiny, max_new_tokens=12, **saying(A))
    answer = chat.say("What is it?", [picture("red")])
    assert next(answer) == "a" and chat.history == ()
    for other in (lambda: next(chat.say("You there?")), chat.reset):
        with pytest.raises(RuntimeError, match="still being spoken"):
            other()
    answer.close()
    assert chat.history == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a"))
    del chat.generation["logits_processor"]
    assert "".join(chat.say("Well?")) == ask_again(tiny, chat.history[:-1], [picture("red")])


def test_a_turn_without_an_answer_leaves_no_trace(tiny) -> None:
    """Not even its image's states in the cache: the next image stands in the same place, among the same tokens."""
    chat = Chat(*tiny, max_new_tokens=12, **saying(A, END, END))
    "".join(chat.say("What is it?", [picture("red")]))
    before = chat.history
    assert list(chat.say("And this?", [picture("blue")])) == [] and chat.history == before
    del chat.generation["logits_processor"]
    images = [picture("red"), picture("green")]
    assert "".join(chat.say("And this?", images[1:])) == ask_again(tiny, chat.history[:-1], images)
    assert "".join(chat.say("Well?")) == ask_again(tiny, chat.history[:-1], images)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("part", ["a block", "the head"])
def test_a_failing_step_costs_the_cache_but_not_the_conversation(tiny, part: str, step: int) -> None:
    """While the cache is being filled, and after it; while the question is read (step 1), and in the middle of the answer."""
    net, processor = tiny
    chat = Chat(net, processor, max_new_tokens=12)
    "".join(chat.say(*TALK[0]))
    before, steps = chat.history, []

    def stop(*_: object) -> None:
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt

    chat.generation |= saying(A, A, A)
    hook = (net.model.language_model.layers[1] if part == "a block" else net.lm_head).register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        "".join(chat.say("And this?", [picture("green")]))
    hook.remove()
    spoken = (Turn("user", "<image>\nAnd this?"), Turn("assistant", "a"))
    assert chat.history == (before if step == 1 else (*before, *spoken))
    del chat.generation["logits_processor"]
    shown = TALK[0][1] + ([] if step == 1 else [picture("green")])
    assert "".join(chat.say("Again?")) == ask_again(tiny, chat.history[:-1], shown)


def test_what_a_chat_refuses_leaves_it_as_it_was(tiny, tmp_path: Path) -> None:
    chat = Chat(*tiny, max_new_tokens=4, **saying(*[A] * 8))
    "".join(chat.say("Hello"))
    before = chat.history
    with pytest.raises(SampleError, match=r"turn 2: 2 .*marks for 1 images"):
        next(chat.say("<image> or <image>?", [picture()]))
    with pytest.raises(SampleError, match="none.png"):
        next(chat.say("What?", [tmp_path / "none.png"]))
    with pytest.raises(ValueError, match=r"turn 2: .* grown to \d+ tokens, the model's context holds 2048"):
        next(chat.say("word " * 2100))
    assert chat.history == before
    "".join(chat.say("Still there?"))
    assert len(chat.history) == 4 and chat.usage.prompt_tokens < 40


def test_the_context_limits_the_answer(tiny) -> None:
    net, processor = tiny
    size = len(processor.encode_text([Turn("user", "Hello")], n_images=0, add_generation_prompt=True).input_ids)
    chat = Chat(net, processor, max_new_tokens=50, **saying(*[A] * 50))
    chat.context = size + 3
    "".join(chat.say("Hello"))
    assert chat.usage.generated_tokens == 3


def test_a_captioner_can_not_chat() -> None:
    net, processor = build(ModelSpec(template="plain", **BOTH), seed=0)
    with pytest.raises(ValueError, match="it captions"):
        next(Chat(net, processor).say("What?", [picture()]))


def test_streamers_of_transformers_stream_what_is_generated(tiny, capsys: pytest.CaptureFixture) -> None:
    net, processor = tiny
    batch = processor.encode_requests([Request("q", (Turn("user", "<image>\nWhat is it?"),), (picture(),))])
    words = processor.tokenizer.encode("one red cat and two dogs", add_special_tokens=False)
    ask = {**batch, "max_new_tokens": len(words), "do_sample": False}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = Thread(target=net.generate, kwargs=ask | {"streamer": streamer} | saying(*words))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == "one red cat and two dogs" and len(pieces) > 3
    out = net.generate(**ask, streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True))
    text = processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"
    assert torch.equal(out, net.generate(**ask))


# --- the terminal ---


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    for part in tiny:
        part.save_pretrained(path / "model")
    for colour in ("red", "blue"):
        picture(colour).save(path / f"{colour}.png")
    return path


def test_two_lines_through_a_pipe(tiny, folder: Path) -> None:
    chat = Chat(*tiny, max_new_tokens=6)
    expected = "".join("".join(chat.say(*turn)) + "\n" for turn in (("What is it?", [folder / "red.png"]), ("Is it left?",)))
    command = [sys.executable, "-m", "llava_collab.cli", "chat", str(folder / "model"), "--image", str(folder / "red.png")]
    done = subprocess.run(
        [*command, "--max-new-tokens", "6"], input="What is it?\nIs it left?\n", capture_output=True, encoding="utf-8", timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    bills = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert "/reset" in done.stderr and len(bills) == 2 and all("+ 6 tokens" in bill for bill in bills)


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_commands_of_the_terminal(tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    chat, other = Chat(*tiny, max_new_tokens=5), Chat(*tiny, max_new_tokens=5)
    red, blue = folder / "red.png", folder / "blue.png"
    type_in(monkeypatch, "What?", "", f"/image {blue}", "And this?", "/reset", "What?", "/exit", "never read")
    assert repl(chat, [red]) == 0
    expected = ["".join(other.say("What?", [red])), "".join(other.say("And this?", [blue]))]
    assert capsys.readouterr().out == "".join(text + "\n" for text in (*expected, expected[0]))
    assert chat.history == other.history[:2]


def test_a_bad_line_is_told_and_the_terminal_goes_on(tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    type_in(monkeypatch, "/image none.png", "/rest", "What <image>?", "Hello")
    chat = Chat(*tiny, max_new_tokens=3)
    assert repl(chat) == 1
    told = capsys.readouterr().err
    assert "none.png" in told and "no command /rest" in told and "1 `<image>` marks for 0 images" in told and len(chat.history) == 2


def test_control_c_stops_an_answer_and_keeps_what_was_said(tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Stop(LogitsProcessor):
        def __init__(self) -> None:
            self.steps = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt
            scores[:, A] = 1e9
            return scores

    type_in(monkeypatch, "Hello", "And?")
    chat = Chat(*tiny, max_new_tokens=4, logits_processor=LogitsProcessorList([Stop()]))
    assert repl(chat) == 0
    assert capsys.readouterr().out == "aa ...\naaaa\n" and chat.history[1] == Turn("assistant", "aa")


def test_a_missing_image_ends_the_command_before_the_first_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["chat", str(folder / "model"), "--image", "none.png"])
    assert stop.value.code == 2 and "none.png" in capsys.readouterr().err
