"""A conversation with one model: `Chat` streams its answers, `repl` is the same in a terminal.

The policy is that of training: the language expert's weights are written by the first turn's prompt and stay for the later turns.
So a chat always gives what encoding the whole conversation anew would give. The key-value cache only saves work: where the kept ids
stop being a prefix of the conversation's (an answer whose text tokenizes otherwise than it was generated), it is cut back to there.

Shapes: T tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from .adapters.routing import RoutingContext
from .data.conversation import IMAGE_MARK, EncodedText
from .data.images import load_image
from .types import Turn, Usage


class Chat:
    """One conversation, of one thread; several may share a model, as nothing of a conversation is kept on it.

    `generation` are `generate`'s options (`do_sample=True, temperature=0.7`; greedy by default). Beams are not possible: their best
    text is only known at the end. `usage` is the bill of the last answer; tokens whose states were kept are not on it.
    """

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int = 256, **generation: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self.max_new_tokens = max_new_tokens
        self.generation = {"do_sample": False} | generation
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._stop_ids = {*ends, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
        self._parameters = sum(p.numel() for p in model.parameters())
        self._speaking = False
        self.reset()

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns so far. One that got no answer (an error, or only an end-of-turn token) leaves no trace; a broken-off one stays."""
        return tuple(self._turns)

    def reset(self) -> None:
        """Forget the conversation; the next turn is a first turn, which writes new expert weights."""
        self._refuse_while_speaking()
        self._turns: list[Turn] = []
        self._images: list[Path | Image.Image] = []
        self.usage = Usage()
        self._start_cache()

    def say(self, text: str, images: Sequence[Path | Image.Image] = ()) -> Generator[str, None, None]:
        """Pieces of the answer as they come; joined they are the answer. Nothing happens before the first piece is asked for.

        `images` are new in this turn, in the first or any later one; their `<image>` marks are put in front if `text` has none.
        Whoever stops iterating stops the model. Raises SampleError (a ValueError) for a text or an image that can't be right,
        ValueError for a conversation that the model's context can't hold (the conversation is then as before), and RuntimeError
        while another answer of this chat is being spoken.
        """
        self._refuse_while_speaking()
        self._speaking = True
        try:
            yield from self._say(text, images)
        finally:
            self._speaking = False

    def _say(self, text: str, images: Sequence[Path | Image.Image]) -> Generator[str, None, None]:
        marks = "" if IMAGE_MARK in text else f"{IMAGE_MARK}\n" * len(images)
        turns, pictures = [*self._turns, Turn("user", marks + text)], [*self._images, *images]
        name = f"chat, turn {len(turns) // 2 + 1}"
        prompt = self.processor.encode_text(turns, n_images=len(pictures), add_generation_prompt=True, sample_id=name)
        room = self.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt.input_ids))
        if room < 1:
            raise ValueError(
                f"{name}: the conversation has grown to {len(prompt.input_ids)} tokens, the model's context holds {self.context} with "
                "the answer; reset it, or ask more briefly"
            )
        if prompt.input_ids[-1] == self.model.config.image_token_id:
            raise ValueError("this model's chat template ends a question with its image, as in stage 1: it captions, it can't converse")
        self.usage, start = Usage(), time.perf_counter()
        read, answer_ids, said, done = self._prefill(prompt, pictures), [], "", False
        try:
            while not done:
                answer_ids.append(self._next_id([*prompt.input_ids, *answer_ids]))
                done = answer_ids[-1] in self._stop_ids or len(answer_ids) == room
                text = self.processor.decode_answers(torch.tensor([answer_ids]), [room])[0][0]
                if not done:
                    text = text.rstrip("\ufffd").rstrip()  # half a character waits for its other half
                if len(text) > len(said):
                    piece, said = text[len(said) :], text
                    yield piece
        finally:
            if said:
                self._turns, self._images = [*turns, Turn("assistant", said)], pictures
            else:
                self._start_cache()  # it holds states of a turn, perhaps of an image, that never was
            flops = 2.0 * self._parameters * (read + len(answer_ids))
            self.usage = Usage(1, len(images), read, len(answer_ids), flops, time.perf_counter() - start)

    def _start_cache(self) -> None:
        self._ids: list[int] = []  # those whose states the cache holds; none: the cache is not to be used
        self._cache = DynamicCache()  # without the config: sliding-window layers too keep all, so that it can be cut back
        self._weights: Any = None
        self._routing = RoutingContext(pending=True)

    @torch.inference_mode()
    def _prefill(self, prompt: EncodedText, pictures: Sequence[Path | Image.Image]) -> int:
        """Bring the cache to all of the prompt but its last id; returns how many tokens the model had to read."""
        ids, device = prompt.input_ids, self.model.device
        same = takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self._ids, strict=False))
        kept = sum(1 for _ in same)
        if kept < sum(prompt.guidance_mask):  # weights are written by the whole of the first turn's prompt
            kept = 0
        seen = ids[:kept].count(self.model.config.image_token_id) // self.processor.tokens_per_image
        opened = [load_image(x, "chat") if isinstance(x, str | Path) else x.convert("RGB") for x in pictures[seen:]]
        pixels = {"pixel_values": self.processor.pixel_values(opened).to(device)} if opened else {}
        if kept == 0:
            self._start_cache()
            pixels["guidance_mask"] = torch.tensor([prompt.guidance_mask], device=device)
        held, self._ids = len(self._ids), []  # should the call be interrupted, the cache is half-filled
        if held > kept:
            self._cache.crop(kept - held)
        new_1T = torch.tensor([ids[kept:]], device=device)
        with self._routing:
            out = self.model(
                input_ids=new_1T, past_key_values=self._cache, expert_weights=self._weights, use_cache=True, logits_to_keep=1, **pixels
            )
        self._weights = out.expert_weights
        self._cache.crop(-1)  # `generate` wants a token to start from
        self._ids = ids[:-1]
        return len(ids) - kept

    @torch.inference_mode()
    def _next_id(self, ids: list[int]) -> int:
        """One step of `generate`: all of its options hold, and no thread is needed to stream."""
        self._ids, ids_1T = [], torch.tensor([ids], device=self.model.device)
        with self._routing:
            out_1T = self.model.generate(
                input_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                past_key_values=self._cache,
                expert_weights=self._weights,
                **self.generation | {"max_new_tokens": 1, "num_beams": 1, "use_cache": True},
            )
        self._ids = ids
        return int(out_1T[0, -1])

    def _refuse_while_speaking(self) -> None:
        if self._speaking:
            raise RuntimeError("an answer of this chat is still being spoken: read it to its end, or close() its iterator")


COMMANDS = "/image FILE shows an image with the next question, /reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def repl(chat: Chat, images: Sequence[Path] = ()) -> int:
    """Read questions from stdin, stream answers to stdout, their bills to stderr; `images` go with a conversation's first question.

    Works on a pipe too: one question or command a line. Returns 0, or 1 if a question or command failed. Raises SampleError for
    `images` that can't be opened.
    """
    for image in images:
        load_image(image, "chat")
    print(COMMANDS, file=sys.stderr)
    waiting, status = list(images), 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return status
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return status
        try:
            if command == "/reset":
                chat.reset()
                waiting = list(images)
            elif command == "/image":
                load_image(argument.strip(), "chat")
                waiting.append(Path(argument.strip()))
            elif line.startswith("/"):
                raise ValueError(f"no command {command}; {COMMANDS}")
            elif line:
                shown, waiting = waiting, []
                _answer(chat, line, shown)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            status = 1


def _answer(chat: Chat, line: str, images: Sequence[Path]) -> None:
    with closing(chat.say(line, images)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
    print(flush=True)
    used = chat.usage
    print(
        f"[{used.prompt_tokens} + {used.generated_tokens} tokens, {used.flops / 1e9:.1f} GFLOP, {used.seconds:.2f} s]",
        file=sys.stderr,
        flush=True,
    )
