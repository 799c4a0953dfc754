"""Toy models and batches for the model tests: real transformers decoders of every supported kind at 64 dimensions."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from llava_collab.models import HyperLlavaConfig, HyperLlavaForConditionalGeneration

IMAGE_TOKEN, PAD, EOS, VOCAB, PATCHES = 3, 0, 2, 120, 16
DECODERS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
BOTH = {"visual_expert": {"bottleneck": 4, "code_width": 8}, "language_expert": {"bottleneck": 4, "code_width": 8}}


def toy_config(decoder: str = "llama", **experts: dict | None) -> HyperLlavaConfig:
    """A LLaVA of 4 layers and 32-pixel images (16 tokens each)."""
    extra = {"sliding_window": None} if decoder == "mistral" else {}
    text = DECODERS[decoder](
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        **extra,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=32
    )
    return HyperLlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES, **experts)


def toy_model(decoder: str = "llama", trained: bool = True, **experts: dict | None) -> HyperLlavaForConditionalGeneration:
    """A toy in eval mode; `trained` gives its hypernetworks non-zero weights, so that the experts really do something."""
    torch.manual_seed(0)
    model = HyperLlavaForConditionalGeneration(toy_config(decoder, **experts)).eval()
    if trained:
        for expert in (*model.model.multi_modal_projector.experts, model.model.language_expert):
            for name, parameter in expert.named_parameters() if expert is not None else ():
                if not name.startswith("encoder"):
                    torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompt(length: int, images: int = 1, seed: int = 0) -> torch.Tensor:
    """1-D ids: bos, the images' placeholder runs, then random text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, VOCAB, (length,), generator=generator)
    return torch.cat([torch.tensor([1]), torch.full((images * PATCHES,), IMAGE_TOKEN), text])


def pixels(images: int, seed: int = 0) -> torch.Tensor:
    """[N, 3, 32, 32]"""
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def pad_batch(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """ids and attention mask [B, T], padded on `side`."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
