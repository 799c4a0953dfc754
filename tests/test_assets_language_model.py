"""The SmolLM2 tokenizer and the cut of vocabulary and layers, on a toy tokenizer and model made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llava_collab.assets import smollm2, vocabulary

MERGES = ["t h", "th e", "Ġ the", "a t", "c at", "Ġ cat", "s at", "Ġ c", "Ġ sat", "cat s", "Ġcat s", "i n", "in g"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def header() -> dict[str, Any]:
    """A GGUF header in small: as in the real one, some byte characters (here the control bytes) are not in the vocabulary."""
    characters = sorted(c for c in smollm2.utf8_byte_characters() if c not in "ĀāĂ")
    tokens = SPECIAL + characters + [merge.replace(" ", "") for merge in MERGES]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.block_count": 3,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 100000.0,
    }


TOKENIZER = smollm2.make_tokenizer(header())
SIZE = len(TOKENIZER) - 6


def cut(corpus: list[str], size: int = SIZE) -> tuple[list[int], Tokenizer]:
    keep = vocabulary.choose_tokens(TOKENIZER.backend_tokenizer, corpus, size)
    return keep, vocabulary.cut_tokenizer(TOKENIZER.backend_tokenizer, keep)


def test_every_byte_of_utf8_has_a_character_and_no_other_byte_has() -> None:
    assert len(smollm2.utf8_byte_characters()) == 256 - 13
    assert "Ġ" in smollm2.utf8_byte_characters() and "À" not in smollm2.utf8_byte_characters()


def test_the_tokenizer_splits_digits_merges_by_rank_and_ends_with_the_image_token() -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("the cats 12").input_ids) == ["the", "Ġcats", "Ġ", "1", "2"]
    assert TOKENIZER.convert_tokens_to_ids("<image>") == len(TOKENIZER) - 1
    ids = TOKENIZER("<|im_start|>cat<image><|im_end|>").input_ids
    assert ids[0] == 1 and ids[-2:] == [len(TOKENIZER) - 1, 2] == [TOKENIZER.image_token_id, TOKENIZER.eos_token_id]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_cut_and_full_tokenizer_give_back_any_text(text: str) -> None:
    _, small = cut(["the cat"])
    for tokenizer in (TOKENIZER.backend_tokenizer, small):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["the", " the", " cat", "cats", " sat", "ing", " cats", " th", "1", "é"])).map("".join))
def test_text_whose_tokens_are_all_kept_is_split_as_before(text: str) -> None:
    _, small = cut([" cats the sat", " the cat"])
    expected = TOKENIZER.backend_tokenizer.encode(text).tokens
    if set(expected) <= set(small.get_vocab()):
        assert small.encode(text).tokens == expected


def test_frequent_tokens_are_kept_with_all_that_they_are_merged_from() -> None:
    keep, small = cut([" cats"])
    assert len(keep) == SIZE == small.get_vocab_size() and keep == sorted(keep)
    assert {"Ġcats", "Ġcat", "cat", "at"} <= set(small.get_vocab())
    assert small.encode(" cats").tokens == ["Ġcats"]
    assert small.token_to_id("<image>") == SIZE - 1 and [small.id_to_token(i) for i in range(3)] == SPECIAL
    assert "ing" not in small.get_vocab()  # never seen, and the last to be merged


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_vocabulary_that_can_not_be_cut_so_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="special and byte tokens"):
        cut([], size)


def test_the_cut_model_is_the_full_one_up_to_its_last_layer() -> None:
    torch.manual_seed(0)
    full = LlamaForCausalLM(smollm2.make_config(header(), len(TOKENIZER))).eval()
    assert full.config.rms_norm_eps == 1e-5
    keep, bpe = cut([" the cat sat"], SIZE + 2)
    tokenizer: PreTrainedTokenizerFast = smollm2.wrap_tokenizer(bpe, 64)
    small = vocabulary.cut_model(full, 2, keep, tokenizer).eval()
    assert len(tokenizer) == len(keep) == small.config.vocab_size and small.config.num_hidden_layers == 2
    assert small.lm_head.weight is small.model.embed_tokens.weight
    ids_BT = tokenizer(" the cat sat", return_tensors="pt").input_ids
    old_BT = torch.tensor(keep)[ids_BT]
    assert old_BT.tolist() == TOKENIZER(" the cat sat", return_tensors="pt").input_ids.tolist()
    hidden_BTD = full.model(old_BT, output_hidden_states=True).hidden_states[2]
    expected_BTV = full.lm_head(full.model.norm(hidden_BTD))[..., keep]
    torch.testing.assert_close(small(ids_BT).logits, expected_BTV)
    with pytest.raises(ValueError, match="4 layers were asked for, the model has 3"):
        vocabulary.cut_model(full, 4, keep, tokenizer)
