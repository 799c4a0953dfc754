"""Ids, labels and guidance mask: what is supervised, what a hypernetwork may see, and that prompts match LLaVA's strings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_collab.data.conversation import IGNORE_INDEX, TEMPLATES, EncodedText, SampleError, check_image_count, encode_turns
from llava_collab.types import Turn

CORPUS = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle and two dogs. system user assistant",
]
P = 3  # tokens per image


def fast(backend: Tokenizer, bos: str | None, eos: str) -> Any:
    extra = [AddedToken(t, special=True, normalized=False) for t in ("<image>", "<|im_start|>", "<|im_end|>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token="<unk>", additional_special_tokens=extra
    )


def legacy_llama(prepend: str = "normalizer") -> Any:
    """A Llama/Vicuna tokenizer in small: byte fallback, and a prepended space for every stretch ("normalizer") or the first only."""
    seed = Tokenizer(models.BPE(unk_token="<unk>"))
    seed.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    seed.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    state = json.loads(seed.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    backend = Tokenizer(models.BPE(vocab=state["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, "<s>", "</s>")


def byte_level(eos: str = "<|im_end|>") -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"]))
    return fast(backend, None, eos)


TOKENIZERS: dict[str, Any] = {"legacy": legacy_llama(), "metaspace_first": legacy_llama("first"), "byte_level": byte_level()}


def encode(tokenizer: Any, turns: list[Turn], template: str, **kwargs: Any) -> EncodedText:
    return encode_turns(tokenizer, turns, chat_template=TEMPLATES[template], tokens_per_image=P, **kwargs)


def chat(*texts: str, system: str | None = None) -> list[Turn]:
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return ([Turn("system", system)] if system is not None else []) + turns


def supervised(tokenizer: Any, encoded: EncodedText) -> str:
    return tokenizer.decode([i for i in encoded.labels if i != IGNORE_INDEX])


# Prompts as haotian-liu/LLaVA builds them (conversation.py: conv_vicuna_v1.get_prompt(); train.py: preprocess_plain).
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
GOLDEN = {
    "vicuna_v1": f"<s>{SYSTEM} USER: <image>\nHi? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes.</s>",
    "plain": "<s><image>A dog.\n<image>Yes.\n",
    "chatml": "<|im_start|>user\n<image>\nHi?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_write_the_published_strings(template: str) -> None:
    second = "<image>" if template == "plain" else "Sure?"
    messages = [{"role": t.role, "content": t.text} for t in chat("<image>\nHi?", "A dog.", second, "Yes.")]
    text = TOKENIZERS["legacy"].apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False)
    assert text == GOLDEN[template]


def test_vicuna_generation_header_and_own_system_prompt() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    text = TOKENIZERS["legacy"].apply_chat_template(
        messages, chat_template=TEMPLATES["vicuna_v1"], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s>Be brief. USER: Hi? ASSISTANT:"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole_string(name: str, template: str) -> None:
    """LLaVA tokenizes the whole prompt at once; piece by piece must not add or lose the spaces of sentencepiece tokenizers."""
    tokenizer = TOKENIZERS[name]
    turns = chat("<image>\nHi <image> there", "A dog.", "<image>" if template == "plain" else "Sure?", "Two dogs.")
    messages = [{"role": t.role, "content": t.text} for t in turns]
    whole = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    expected = [i for token in tokenizer.encode(whole, add_special_tokens=False) for i in [token] * (P if token == image_id else 1)]
    assert encode(tokenizer, turns, template).input_ids == expected


def test_llava_15_prompt_keeps_its_lone_spaces_around_the_image() -> None:
    """The known ids of llava-1.5 hold a lone space token before and after the image ("USER: <image>\\n..."); so do ours."""
    tokenizer = TOKENIZERS["legacy"]
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, chat("<image>\nHi?", "A dog."), "vicuna_v1").input_ids)
    first = tokens.index("<image>")
    assert tokens[first - 1] == "▁" and tokens[first + P : first + P + 2] == ["▁", "<0x0A>"]


WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Co")), min_size=1, max_size=12)
ANSWER = WORDS.filter(lambda text: bool(text.strip()) and "<" not in text)
QUESTION = st.one_of(WORDS, st.sampled_from(["</s>", "<image> a <image>", "<|im_end|>\n<|im_start|>assistant\n", "<unk>", " x "]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=3),
    system=st.one_of(st.none(), st.just("Be brief.")),
    name=st.sampled_from(sorted(TOKENIZERS)),
    template=st.sampled_from(sorted(TEMPLATES)),
)
def test_labels_and_masks_of_any_conversation(pairs: list[tuple[str, str]], system: str | None, name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]
    flat = [text for pair in pairs for text in pair]
    turns = chat("<image>\n" + flat[0], *flat[1:], system=system)
    encoded = encode(tokenizer, turns, template)
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.guidance_mask)

    end = {"plain": "\n", "chatml": "<|im_end|>", "vicuna_v1": tokenizer.eos_token}[template]
    space = " " if template == "vicuna_v1" or (template == "plain" and name == "legacy") else ""
    assert supervised(tokenizer, encoded).replace(" ", "") == "".join(f"{space}{a}{end}" for _, a in pairs).replace(" ", "")
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))

    first = next(k for k, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoded.guidance_mask == [k < first for k in range(len(encoded.labels))]
    marks = sum(t.text.count("<image>") for t in turns)
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == marks * P

    offset = 0 if system is None else 1
    for k in range(1, len(pairs) + 1):  # every prompt along the way is a prefix of the training ids, masks too
        prompt = encode(tokenizer, turns[: offset + 2 * k - 1], template, add_generation_prompt=True)
        n = len(prompt.input_ids)
        assert prompt.input_ids == encoded.input_ids[:n]
        assert prompt.guidance_mask == encoded.guidance_mask[:n]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_a_user_types_stay_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    typed = encode(tokenizer, chat("a</s>b<|im_end|>c", "A dog."), "chatml")
    honest = encode(tokenizer, chat("abc", "A dog."), "chatml")
    for token in ("</s>", "<|im_end|>", "<|im_start|>"):
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert typed.input_ids.count(token_id) == honest.input_ids.count(token_id)
    assert "a</s>b<|im_end|>c" in tokenizer.decode(typed.input_ids)


def test_image_token_may_be_another_than_the_mark() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    encoded = encode(tokenizer, chat("<image>\nHi <|im_start|>?", "A dog."), "vicuna_v1", image_token="<|im_start|>")
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == P  # the one that the user typed stays text
    assert tokenizer.convert_tokens_to_ids("<image>") not in encoded.input_ids


def test_end_of_turn_other_than_eos_is_supervised() -> None:
    """chatml with a tokenizer whose eos is another token: <|im_end|> still ends the answer, the newline after it is not taught."""
    tokenizer = byte_level(eos="</s>")
    assert supervised(tokenizer, encode(tokenizer, chat("Hi?", "A dog."), "chatml")) == "A dog.<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (chat("Hi?", ""), "empty_answer"),
        (chat("Hi?", "  \n"), "empty_answer"),
        ([Turn("assistant", "Hi."), Turn("user", "Hi?"), Turn("assistant", "A dog.")], "starts_with_assistant"),
        ([Turn("user", "Hi?"), Turn("user", "Hi?"), Turn("assistant", "A dog.")], "turn_order"),
        ([Turn("user", "Hi?"), Turn("assistant", "Hi."), Turn("system", "Late.")], "turn_order"),
        ([], "turn_order"),
        ([Turn("system", "Alone.")], "turn_order"),
        (chat("Hi?"), "ends_with_user"),
        (chat("Hi?", "<image>"), "image_place"),
        ([Turn("robot", "Hi?"), Turn("assistant", "A dog.")], "unknown_role"),  # type: ignore[arg-type]
        (chat("\U000f0000", "A dog."), "special_token"),
    ],
)
def test_bad_conversations_are_named(turns: list[Turn], reason: str) -> None:
    with pytest.raises(SampleError, match="sample s-7") as caught:
        encode(TOKENIZERS["byte_level"], turns, "chatml", sample_id="s-7")
    assert caught.value.reason == reason


def test_prompt_has_to_end_with_the_user() -> None:
    with pytest.raises(SampleError) as caught:
        encode(TOKENIZERS["byte_level"], chat("Hi?", "A dog."), "chatml", add_generation_prompt=True)
    assert caught.value.reason == "ends_with_assistant"


def test_too_long_names_length_and_limit_and_cuts_nothing() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    turns = chat("<image>\nHi?", "A dog.")
    n = len(encode(tokenizer, turns, "chatml").input_ids)
    assert len(encode(tokenizer, turns, "chatml", max_length=n).input_ids) == n
    with pytest.raises(SampleError, match=rf"{n} tokens, but max_length is {n - 1}") as caught:
        encode(tokenizer, turns, "chatml", max_length=n - 1)
    assert caught.value.reason == "too_long"
    with pytest.raises(SampleError, match="max_length is 5"):
        encode(tokenizer, turns[:1], "chatml", max_length=5, add_generation_prompt=True)


def test_no_supervised_token_is_an_error() -> None:
    silent = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else eos_token }}{% endfor %}"
    with pytest.raises(SampleError) as caught:
        encode_turns(TOKENIZERS["byte_level"], chat("Hi?", "A dog."), chat_template=silent, tokens_per_image=P)
    assert caught.value.reason == "no_supervision"


def test_plain_without_image_or_bos_has_no_prompt() -> None:
    with pytest.raises(SampleError) as caught:
        encode(TOKENIZERS["byte_level"], chat("Hi?", "A dog."), "plain")
    assert caught.value.reason == "empty_prompt"


def test_template_that_rewrites_the_past_is_refused() -> None:
    forgetful = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    with pytest.raises(SampleError, match="rewrites earlier text") as caught:
        encode_turns(TOKENIZERS["byte_level"], chat("a", "b", "c", "d"), chat_template=forgetful, tokens_per_image=P)
    assert caught.value.reason == "template_prefix"


def test_faults_of_tokenizer_or_template_are_no_sample_errors() -> None:
    """They would hit every sample, so nothing may skip and count them."""
    endless = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="never learn to stop") as caught:
        encode_turns(TOKENIZERS["byte_level"], chat("Hi?", "A dog."), chat_template=endless, tokens_per_image=P)
    assert not isinstance(caught.value, SampleError)
    with pytest.raises(ValueError, match="one token of the tokenizer") as caught:
        encode(TOKENIZERS["byte_level"], chat("Hi?", "A dog."), "chatml", image_token="<picture>")
    assert not isinstance(caught.value, SampleError)


def test_image_count() -> None:
    check_image_count(chat("<image> <image>", "A dog."), 2)
    with pytest.raises(SampleError, match="2 <image> marks but 1 images") as caught:
        check_image_count(chat("<image> <image>", "A dog."), 1)
    assert caught.value.reason == "image_count"
