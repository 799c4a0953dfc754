"""Turns -> token ids, labels and guidance mask, built in one pass so that the three can't disagree.

The chat template is rendered for growing prefixes of the conversation. Each new piece of text is tokenized on its own, in the
context in which it stands, so the ids of a generation prompt are exactly a prefix of the training ids, and which tokens are
supervised is known, never searched for. LLaVA searches ("tokenization mismatch ... (ignored)" is what happens when it misses).

Templates follow LLaVA (Liu et al. 2023, `conversation.py` and `train.py` of haotian-liu/LLaVA at c121f04).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_collab.types import Turn

IMAGE_MARK = "<image>"
IGNORE_INDEX = -100

VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

TEMPLATES: dict[str, str] = {
    # Stage 1 (LLaVA's preprocess_plain): the images, then caption + newline; what the human asked is dropped. As in LLaVA no eos
    # is taught: the supervised newline is where a caption ends, so a stage 1 model is stopped there, not by eos.
    "plain": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<image>' * (message['content'].split('<image>') | length - 1) }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    ),
    # Stage 2 (LLaVA's conv_vicuna_v1: sep " ", sep2 "</s>", which is the eos token of Vicuna).
    "vicuna_v1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
        "{% else %}" + VICUNA_SYSTEM + " {% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == 'assistant' %}"
        "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}

_ESCAPE = 0xF0000  # plane 15 is for private use: the k-th special token, where a user typed it, travels as the character _ESCAPE + k


class SampleError(ValueError):
    """One sample is bad; the others are not. `reason` is a short code to count by, the message names the cure; `file`: the bad picture."""

    def __init__(self, sample_id: str, reason: str, message: str, file: str = "") -> None:
        super().__init__(sample_id, reason, message, file)  # all of it in args: the error survives the trip out of a loader's worker
        self.sample_id = sample_id
        self.reason = reason
        self.message = message
        self.file = file

    def __str__(self) -> str:
        return f"sample {self.sample_id or '?'}: {self.message} [{self.reason}]"


@dataclass(frozen=True)
class EncodedText:
    """One conversation as tokens; the three lists have the same length.

    `labels` is IGNORE_INDEX but for assistant text and its end-of-turn token. `guidance_mask` is True for the tokens before the
    first supervised one: what a hypernetwork may look at without seeing an answer.
    """

    input_ids: list[int]
    labels: list[int]
    guidance_mask: list[bool]


def check_turns(turns: Sequence[Turn], *, sample_id: str = "", add_generation_prompt: bool = False) -> None:
    """Roles, order, marks and answers of a conversation: [system] user assistant user assistant ... .

    Raises `SampleError`: unknown_role, starts_with_assistant, turn_order, ends_with_user, ends_with_assistant, image_place, empty_answer.
    """
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            raise SampleError(sample_id, "unknown_role", f"role {turn.role!r} is none of system, user (human), assistant (gpt)")
        if turn.role != "user" and IMAGE_MARK in turn.text:
            raise SampleError(sample_id, "image_place", f"{IMAGE_MARK} in a {turn.role} turn; images can only stand in user turns")
        if turn.role == "assistant" and not turn.text.strip():
            raise SampleError(sample_id, "empty_answer", "an assistant turn is empty")
    spoken = [turn.role for turn in turns[1 if turns and turns[0].role == "system" else 0 :]]
    if not spoken:
        raise SampleError(sample_id, "turn_order", "the conversation has no turns")
    if spoken[0] == "assistant":
        raise SampleError(sample_id, "starts_with_assistant", "the assistant speaks first; drop that turn or give it a question")
    if spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise SampleError(sample_id, "turn_order", f"roles must alternate user, assistant (system only first), got {spoken}")
    if add_generation_prompt and spoken[-1] != "user":
        raise SampleError(sample_id, "ends_with_assistant", "nothing to answer: a prompt has to end with the user's turn")
    if not add_generation_prompt and spoken[-1] != "assistant":
        raise SampleError(sample_id, "ends_with_user", "the last user turn has no answer to learn from")


def check_image_count(turns: Sequence[Turn], n_images: int, *, sample_id: str = "") -> None:
    """Raises `SampleError` (image_count) unless the user turns hold exactly one mark for each image."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != n_images:
        raise SampleError(sample_id, "image_count", f"{marks} {IMAGE_MARK} marks but {n_images} images; each image needs one mark")


def encode_turns(
    tokenizer: Any,
    turns: Sequence[Turn],
    *,
    chat_template: str,
    tokens_per_image: int,
    image_token: str = IMAGE_MARK,
    max_length: int | None = None,
    add_generation_prompt: bool = False,
    sample_id: str = "",
) -> EncodedText:
    """Ids, labels and guidance mask of a conversation (training), or of a prompt (`add_generation_prompt`), in one pass.

    `chat_template` is Jinja text: one of `TEMPLATES`, or a tokenizer's own. Each `<image>` of a user turn becomes
    `tokens_per_image` copies of `image_token`. Special tokens that a *text* spells out stay text, so a user can't end a turn.
    Nothing is ever cut: a conversation longer than `max_length` is an error, as half an image or half an answer teaches wrongly.

    Raises `SampleError` where this sample is at fault (see `check_turns`; also too_long, no_supervision, empty_prompt,
    template_prefix, special_token) and plain `ValueError` where the tokenizer or template is, whatever the sample.
    """
    check_turns(turns, sample_id=sample_id, add_generation_prompt=add_generation_prompt)
    writer = _Writer(tokenizer, image_token, tokens_per_image, sample_id)
    messages = [{"role": turn.role, "content": writer.escape(turn.text)} for turn in turns]
    is_plain = chat_template == TEMPLATES["plain"]
    rendered, ids, labels = "", [], []
    guidance_length: int | None = None
    for i, turn in enumerate(turns):
        if turn.role == "system":
            continue  # comes out with the user turn that follows: many templates refuse a system turn alone
        prompting = turn.role == "user"
        text = tokenizer.apply_chat_template(
            messages[: i + 1], chat_template=chat_template, tokenize=False, add_generation_prompt=prompting
        )
        if not text.startswith(rendered):
            raise SampleError(
                sample_id, "template_prefix", f"the chat template rewrites earlier text when turn {i + 1} is added; "
                "ids of a prompt would not be a prefix of the training ids. Use another template",
            )  # fmt: skip
        piece_ids = writer.tokens(text[len(rendered) :])
        end = 0 if prompting else _supervised_length(piece_ids, tokenizer, is_plain, sample_id)
        if not prompting and guidance_length is None:
            guidance_length = len(ids)
        ids += piece_ids
        labels += piece_ids[:end] + [IGNORE_INDEX] * (len(piece_ids) - end)
        rendered = text
    guidance_length = len(ids) if guidance_length is None else guidance_length
    if guidance_length == 0:
        raise SampleError(sample_id, "empty_prompt", "nothing stands before the answer (the plain template needs an image)")
    if max_length is not None and len(ids) > max_length:
        raise SampleError(sample_id, "too_long", f"{len(ids)} tokens, but max_length is {max_length}; raise it or shorten the sample")
    return EncodedText(ids, labels, [k < guidance_length for k in range(len(ids))])


def _supervised_length(ids: list[int], tokenizer: Any, is_plain: bool, sample_id: str) -> int:
    """How many tokens of an assistant's piece are supervised: its text up to and with the first end-of-turn token."""
    if is_plain:
        end, text_length = len(ids), len(ids)
    elif tokenizer.eos_token_id in ids:
        end = ids.index(tokenizer.eos_token_id) + 1
        text_length = end - 1
    else:  # some templates end a turn with another special token than eos; texts hold none, so the first one is it
        special = _special_tokens(tokenizer)
        end = next((k + 1 for k, token in enumerate(ids) if token in special.values()), 0)
        if end == 0:
            raise ValueError(
                "the chat template ends the assistant's turn without a special token of this tokenizer, so a model could never "
                "learn to stop; make the end-of-turn string (for chatml: <|im_end|>) a special token, or use another template"
            )
        text_length = end - 1
    if text_length == 0:
        raise SampleError(sample_id, "no_supervision", "an answer has no tokens to learn from")
    return end


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """All control tokens: the named ones and those only marked as special in the vocabulary (SmolLM2 has a dozen of these)."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return named | {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


class _Writer:
    """Tokenizes one rendered text piece by piece, each piece in its context.

    Why context: sentencepiece-like tokenizers put a space before whatever they are given (always, or only at the start of the
    text), which must not happen in the middle of a text. So each stretch is tokenized behind an anchor, and the anchor's own
    tokens are taken off: the special token that truly precedes it, or else a character that never merges with it.
    """

    def __init__(self, tokenizer: Any, image_token: str, tokens_per_image: int, sample_id: str) -> None:
        self.tokenizer = tokenizer
        self.sample_id = sample_id
        image_id = tokenizer.convert_tokens_to_ids(image_token)
        if image_id is None or tokenizer.encode(image_token, add_special_tokens=False) != [image_id]:
            raise ValueError(
                f"{image_token!r} has to be one token of the tokenizer; add it with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}}) and resize the embeddings"
            )
        self.image_token = image_token
        self.image_ids = [image_id] * tokens_per_image
        special = _special_tokens(tokenizer)
        self.special = [token for token in special if token != IMAGE_MARK]
        self.special_ids = set(special.values()) - {tokenizer.unk_token_id}
        self.special_pattern = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")
        self.split_pattern = re.compile(f"({re.escape(IMAGE_MARK)}|[{chr(_ESCAPE)}-{chr(_ESCAPE + len(self.special))}])")
        self.before: str | None = None  # the special token just written, "" after ordinary text, None at the very start

    def escape(self, text: str) -> str:
        """The text with special tokens that it spells out replaced by private characters (so that templates don't write them)."""
        if any(_ESCAPE <= ord(c) <= _ESCAPE + len(self.special) for c in text):
            raise SampleError(self.sample_id, "special_token", "the text holds private-use characters (plane 15); remove them")
        return self.special_pattern.sub(lambda match: chr(_ESCAPE + self.special.index(match.group())), text)

    def tokens(self, piece: str) -> list[int]:
        """The ids of the next piece of the rendered text."""
        ids: list[int] = []
        for part in self.split_pattern.split(piece):
            if part == IMAGE_MARK:
                ids += self.image_ids
                self.before = self.image_token
            elif len(part) == 1 and _ESCAPE <= ord(part) <= _ESCAPE + len(self.special):
                ids += self._spelled_out(self.special[ord(part) - _ESCAPE])
                self.before = ""
            elif part:
                ids += self._in_context(part)
                self.before = next((token for token in self.special if part.endswith(token)), "")
        return ids

    def _in_context(self, text: str) -> list[int]:
        if self.before is None:
            return self.tokenizer.encode(text, add_special_tokens=False)
        anchors = [self.before] if self.before else (["a", "\n"] if text[0].isspace() else ["\n", "a"])
        for anchor in anchors:
            ids = self._behind(anchor, text)
            if ids is not None:
                return ids
        raise ValueError(f"the tokenizer merges {text[:20]!r} with whatever precedes it ({anchors}); it can't be used turn by turn")

    def _behind(self, anchor: str, text: str, **options: bool) -> list[int] | None:
        """Ids of `text` behind `anchor`, or None where the two merge."""
        head = self.tokenizer.encode(anchor, add_special_tokens=False, **options)
        ids = self.tokenizer.encode(anchor + text, add_special_tokens=False, **options)
        return ids[len(head) :] if ids[: len(head)] == head else None

    def _spelled_out(self, text: str) -> list[int]:
        ids = self._behind("\n", text, split_special_tokens=True)
        if ids is None or self.special_ids.intersection(ids):
            raise SampleError(self.sample_id, "special_token", f"a text holds {text!r}, which this tokenizer can't write as plain text")
        return ids
