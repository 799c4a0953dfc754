"""Models and data for benchmarks, made on the spot: random weights of given sizes, conversations mixed as in LLaVA-1.5's training.

The mix is that of its 665 K samples (Liu et al. 2023, arXiv 2310.03744, table 7: the sizes of its sources, as remembered and not checked,
here put into four kinds). The paper gives no lengths: text lengths are lognormal by kind, our assumption (`KINDS`). They are to 576 image
tokens as in LLaVA-1.5 and scale with the image's tokens where a smaller model has fewer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_collab.models.build import ModelSpec
from llava_collab.models.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Sizes:
    """What is made. The defaults are for a CPU."""

    width: int = 64
    """Channels of the decoder; the feed-forward part has 43/16 of it, as in LLaMA-7B."""
    layers: int = 4
    """Blocks of the decoder."""
    vocabulary: int = 384
    """Tokens of the decoder: a few more than the tokenizer's 380."""
    tower_width: int = 64
    """Channels of the tower."""
    tower_layers: int = 2
    """Blocks of the tower."""
    image_side: int = 8
    """Tokens of a picture, along one side; texts made on the spot are to 24 x 24 tokens as in LLaVA-1.5."""
    patch: int = 8
    """Pixels of such a token, along one side."""
    max_length: int = 256
    """Longest sample, in tokens."""

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return self.image_side**2


LIKE_7B = Sizes(width=4096, layers=8, vocabulary=32000, tower_width=1024, tower_layers=24, image_side=24, patch=14, max_length=2048)
"""A decoder of LLaMA-7B's width with a quarter of its blocks, behind a tower of the shape of CLIP-L/336."""


@dataclass(frozen=True)
class Kind:
    """Conversations of one kind."""

    thousands: int
    """Samples of LLaVA-1.5's mix, in thousands (its table 7)."""
    picture: bool
    tokens: int
    """Median of the text's length, beside 576 image tokens; assumed, as is all below."""
    spread: float
    """Standard deviation of the length's logarithm."""
    answered: float
    """Part of the text that is answers."""
    turns: int
    """Questions, each with its answer; fewer where the text is too short for them."""


KINDS = (
    Kind(310, True, 70, 0.6, 0.2, 4),  # short answers: VQAv2 83, GQA 72, OKVQA 9, OCR-VQA 80, A-OKVQA 66
    Kind(158, True, 250, 0.5, 0.8, 2),  # LLaVA's own conversations, descriptions, reasoning
    Kind(156, True, 150, 0.6, 0.5, 4),  # captions and regions: TextCaps 22, RefCOCO 48, Visual Genome 86
    Kind(40, False, 800, 0.7, 0.7, 4),  # text alone: ShareGPT
)
WORDS = "a above and below blue cat circle dog green in is left no of on one or photo picture red right square the there three tree".split()
TEMPLATE, MARGIN = 18, 32  # tokens that a question and its answer cost beside their words, about; what may be missing from that


def make_base(sizes: Sizes, folder: Path, decoder: str | None = None, tower: str | None = None) -> ModelSpec:
    """Bases by name, folder or hub id; where none is given, one of these sizes with random weights, in `folder`."""
    if decoder is None:
        tokenizer: Any = tiny_tokenizer()
        heads = max(4, sizes.width // 128)
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.width * 43 // 16,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=sizes.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        decoder = str(folder / "decoder")
        LlamaForCausalLM(config).save_pretrained(decoder)
        tokenizer.save_pretrained(decoder)
    if tower is None:
        side = sizes.image_side * sizes.patch
        shape = CLIPVisionConfig(
            hidden_size=sizes.tower_width,
            intermediate_size=4 * sizes.tower_width,
            num_hidden_layers=sizes.tower_layers,
            num_attention_heads=max(2, sizes.tower_width // 64),
            image_size=side,
            patch_size=sizes.patch,
        )
        tower = str(folder / "tower")
        CLIPVisionModel(shape).save_pretrained(tower)
        CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False).save_pretrained(tower)
    return ModelSpec(decoder, tower, template="chatml")


def make_data(sizes: Sizes, folder: Path, samples: int) -> Path:
    """A LLaVA JSONL file in `folder` with pictures beside it; always the same for the same sizes."""
    rng = random.Random(0)  # noqa: S311 - lengths, not secrets
    pictures = _make_pictures(sizes, folder)
    rows = [conversation(kind, sizes, rng) for kind in mixture(samples)]
    for number, row in enumerate(rows):
        row |= {"id": str(number)} | ({"image": pictures[number % len(pictures)]} if "image" in row else {})
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def mixture(count: int) -> list[Kind]:
    """`count` kinds in the parts that they have in the mix."""
    ends = np.cumsum([kind.thousands for kind in KINDS]) / sum(kind.thousands for kind in KINDS)
    return [KINDS[int(np.searchsorted(ends, (number + 0.5) / count))] for number in range(count)]


def conversation(kind: Kind, sizes: Sizes, rng: random.Random) -> dict[str, Any]:
    """A record without its id; `image` is there where it has one."""
    scale, own = sizes.image_tokens / 576, sizes.image_tokens if kind.picture else 0
    tokens = min(int(scale * kind.tokens * rng.lognormvariate(0, kind.spread)), sizes.max_length - own - MARGIN)
    turns = max(1, min(kind.turns, tokens // (2 * TEMPLATE)))
    words = max(2, tokens // turns - TEMPLATE)
    answered = max(1, round(kind.answered * words))
    said = []
    for turn in range(turns):
        mark = "<image>\n" if kind.picture and turn == 0 else ""
        said.append({"from": "human", "value": mark + " ".join(rng.choices(WORDS, k=max(1, words - answered)))})
        said.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=answered))})
    return {"conversations": said} | ({"image": None} if kind.picture else {})


def _make_pictures(sizes: Sizes, folder: Path, count: int = 32) -> list[str]:
    """Smooth random JPEGs, a little larger than what the tower looks at."""
    noise, side = np.random.default_rng(0), sizes.image_side * sizes.patch
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((side * 3 // 2, side * 9 // 8), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return [f"{number}.jpg" for number in range(count)]
