"""A toy LLaVA in the layout of haotian-liu/LLaVA, from the key names it documents, and its forward pass written out as a reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IMAGE_TOKEN_INDEX = -200  # LLaVA's mark in input_ids
VISION = "model.vision_tower.vision_tower.vision_model."


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: <unk>, <s> and </s>, no padding token and no image token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256)


@dataclass
class Toy:
    """The three networks of a LLaVA-1.5, apart."""

    llama: LlamaForCausalLM
    clip: CLIPVisionModel
    projector: nn.Sequential
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def make(cls) -> Toy:
        torch.manual_seed(0)
        tokenizer = llama_tokenizer()
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_theta=5000.0,
        )
        vision = CLIPVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16
        )
        projector = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))
        return cls(LlamaForCausalLM(text).eval(), CLIPVisionModel(vision).eval(), projector.eval(), tokenizer)

    @torch.no_grad()
    def logits(self, ids_T: Tensor, pixels_1CHW: Tensor) -> Tensor:
        """[T - 1 + P, V]: `prepare_inputs_labels_for_multimodal` of one sample with one image, then Llama."""
        features_1PV = self.clip(pixels_1CHW, output_hidden_states=True).hidden_states[-2][:, 1:]
        image_PD = self.projector(features_1PV)[0]
        at = int((ids_T == IMAGE_TOKEN_INDEX).nonzero())
        embed = self.llama.model.embed_tokens
        embeds_1TD = torch.cat([embed(ids_T[:at]), image_PD, embed(ids_T[at + 1 :])])[None]
        return self.llama(inputs_embeds=embeds_1TD).logits[0]

    def tensors(self, tower: bool) -> dict[str, Tensor]:
        """Under the original's names; the vision tower inside or not."""
        named = dict(self.llama.state_dict()) | self.projector_tensors()
        return named | ({VISION + name: tensor for name, tensor in self.clip.state_dict().items()} if tower else {})

    def projector_tensors(self, prefix: str = "model.") -> dict[str, Tensor]:
        return {f"{prefix}mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}

    def save_clip(self, folder: Path) -> Path:
        self.clip.save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder

    def save_language_model(self, folder: Path) -> Path:
        self.llama.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def save_config(self, folder: Path, clip: Path, **changes: object) -> Path:
        """config.json as llava-v1.5's, with other sizes."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        kept += ("max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range", "bos_token_id", "eos_token_id")
        config = {key: getattr(self.llama.config, key) for key in kept} | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_vision_tower": str(clip),
            "mm_hidden_size": 24,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "pad_token_id": 0,
            "rope_theta": 5000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.31.0",
        }
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    def save_full(self, folder: Path, clip: Path, tower: bool = True, **changes: object) -> Path:
        """Two pytorch_model shards with an index, and what old checkpoints also hold: inv_freq buffers, the stage 1 projector."""
        self.save_config(folder, clip, **changes)
        self.tokenizer.save_pretrained(folder)
        named = self.tensors(tower) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        names = sorted(named)
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in shards.items():
            torch.save({name: named[name].clone() for name in held}, folder / file)
        where = {name: file for file, held in shards.items() for name in held}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        torch.save({name: torch.zeros_like(tensor) for name, tensor in self.projector_tensors().items()}, folder / "mm_projector.bin")
        return folder
