"""Cut a byte-level BPE language model down to its lowest layers and its most useful tokens.

Which tokens stay: all special tokens and all single bytes, so that any UTF-8 text still has a code; then tokens in the order of how
often they occur in a corpus, ties and tokens that never occur by rank (a low rank was merged early, so is common in the text that the
original was trained on). A token enters only together with all tokens that its merges pass through. The kept merges are those that make
kept tokens, hence text whose full-tokenizer tokens are all kept is split exactly as before; other text falls into smaller kept pieces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def choose_tokens(tokenizer: Tokenizer, corpus: Iterable[str], size: int) -> list[int]:
    """Ids of the `size` tokens to keep, ascending (see the head of this file for the rule).

    Raises ValueError if `size` does not hold the special and byte tokens or exceeds the vocabulary.
    """
    counts = Counter(i for line in corpus for i in tokenizer.encode(line, add_special_tokens=False).ids)
    vocab = tokenizer.get_vocab()
    parents = {vocab[a + b]: (vocab[a], vocab[b]) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]}
    kept = {i for i in vocab.values() if i not in parents}  # special and byte tokens: nothing merges into them
    if not len(kept) <= size <= len(vocab):
        raise ValueError(f"a cut vocabulary holds {len(kept)} (special and byte tokens) to {len(vocab)} tokens, {size} were asked for")
    for token in sorted(parents, key=lambda i: (-counts[i], i)):
        path, todo = set(), [token]
        while todo:
            i = todo.pop()
            if i not in kept and i not in path:
                path.add(i)
                todo.extend(parents[i])
        if len(kept) + len(path) <= size:
            kept |= path
        if len(kept) == size:
            break
    return sorted(kept)


def cut_tokenizer(tokenizer: Tokenizer, keep: list[int]) -> Tokenizer:
    """The tokenizer with only the tokens `keep`, renumbered in the given order; merges that make other tokens are dropped."""
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    new_id = {tokenizer.id_to_token(old): new for new, old in enumerate(keep)}
    model = described["model"]
    model["vocab"] = {token: new_id[token] for token in model["vocab"] if token in new_id}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in new_id]
    for added in described["added_tokens"]:
        added["id"] = new_id[added["content"]]
    return Tokenizer.from_str(json.dumps(described))


def cut_model(model: LlamaForCausalLM, layers: int, keep: list[int], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A copy of the lowest `layers` layers with the embedding rows `keep`; the final norm stays, the embeddings stay tied.

    `tokenizer` is the cut one: the special ids of the configuration become its. The result needs training before it writes sense.
    Raises ValueError if the model has fewer layers.
    """
    if not 1 <= layers <= model.config.num_hidden_layers:
        raise ValueError(f"{layers} layers were asked for, the model has {model.config.num_hidden_layers}")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = model.config.to_dict() | {"num_hidden_layers": layers, "vocab_size": len(keep)} | special
    config = type(model.config).from_dict(settings)
    small = LlamaForCausalLM(config)
    small.to(dtype=model.dtype)  # pyright: ignore[reportCallIssue]
    state = {name: model.state_dict()[name] for name in small.state_dict()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][torch.tensor(keep)]
    small.load_state_dict(state)
    return small
