"""How far `llava-collab estimate` is from what training really takes, at two sizes: estimate over measurement, 1 is exact.

    python benchmarks/estimate_error.py            writes benchmarks/results/estimate_error.json

Two random models train a few steps by the parts that train/train.py is made of, in a process each: `tiny` (0.2 M parameters) and a Llama
of 10 M. Measured: FLOPs by torch's FlopCounterMode over a step; memory as the growth of the process's peak resident set from before the
model is built, after a throw-away step of one sample, with glibc told to give freed memory back at once (left alone it holds a fifth more
at these sizes: slack that no estimate of live tensors has); bytes kept for the backward pass by saved-tensor hooks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llava_collab.evaluation.environment import write_results
from llava_collab.models.tiny import tiny_tokenizer
from llava_collab.training.components import parameter_groups
from llava_collab.training.estimate import estimate
from llava_collab.training.opening import open_student
from llava_collab.training.recipe import Recipe
from llava_collab.training.recipe_file import parse_command

ROOT = Path(__file__).resolve().parent.parent
STEPS, TOKENS = 2, 256
NO_SLACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
MICRO_BATCH = {"tiny": 32, "llama-10m": 4}


def recipe(size: str, base: Path) -> Recipe:
    """The tiny instruction recipe on a base of that size, micro-batches large enough to be seen beside the process itself."""
    command = [str(ROOT / "train" / "recipes" / "tiny-instruct.yaml"), "--run.micro-batch-size", str(MICRO_BATCH[size])]
    command += ["--data.max-length", str(TOKENS)]
    return parse_command([*command, *(["--model.language-model", str(base)] if size != "tiny" else [])], "")


def make_base(folder: Path) -> None:
    """A random Llama of about 10 M parameters, as a folder that a recipe can name."""
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 5, "num_key_value_heads": 5}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=8, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(size: str, base: Path) -> dict[str, float]:
    """FLOPs a sample and step, bytes kept for the backward pass, growth of the peak resident set, of real steps."""
    torch.set_num_threads(1)
    first = recipe("tiny", base)
    warm = open_student(first, None, torch.device("cpu")).model
    warm(**batch(warm, 1), use_cache=False).loss.backward()  # what torch loads at its first step is not the model's
    chosen = recipe(size, base)
    before = peak_bytes()
    student = open_student(chosen, None, torch.device("cpu"))
    model = student.model
    optimizer = torch.optim.AdamW(parameter_groups(student.trainable, chosen.optim), fused=True)
    inputs = batch(model, chosen.run.micro_batch_size)
    kept: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for step in range(STEPS):
        model(**inputs, supervised_logits_only=True, use_cache=False).loss.backward()
        optimizer.step()
        if step < STEPS - 1:  # the gradients of the last step stay, as between micro-batches
            optimizer.zero_grad(set_to_none=True)
    model(**inputs, supervised_logits_only=True, use_cache=False).loss.backward()
    resident = peak_bytes() - before
    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, supervised_logits_only=True, use_cache=False).loss
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        loss.backward()
    return {"FLOPs": flops.get_total_flops() / chosen.run.micro_batch_size, "kept for backward": saved, "memory": resident}


def batch(model: Any, samples: int) -> dict[str, Tensor]:
    """A micro-batch of full length: an image and text in each sample, one padded position."""
    ids_BT = torch.full((samples, TOKENS), 20)
    ids_BT[:, :16] = model.config.image_token_id
    labels_BT = ids_BT.masked_fill(ids_BT == model.config.image_token_id, -100)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -1], labels_BT[0, -1] = 0, -100
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT, "pixel_values": torch.zeros(samples, 3, 32, 32)}


def peak_bytes() -> int:
    """Peak resident set of this process (Linux counts in KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure both sizes, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=list(MICRO_BATCH), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.base)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "llama-10m"
        make_base(base)
        for size in MICRO_BATCH:
            child = [sys.executable, __file__, "--measure", size, "--base", str(base)]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | NO_SLACK)
            measured = json.loads(done.stdout.splitlines()[-1])
            plan = estimate(recipe(size, base))
            planned = {"FLOPs": plan.step_flops, "kept for backward": plan.activation_bytes, "memory": plan.total_bytes}
            for name, value in planned.items():
                print(f"{size:<10} {name:<18} estimate {value:,.0f}  measured {measured[name]:,.0f}  ratio {value / measured[name]:.3f}")
                error = round(abs(value / measured[name] - 1), 4)
                row = {"name": f"{size}: {name}, |estimate / measured - 1|", "value": error, "unit": "share", "better": "lower"}
                rows.append(row | {"estimate": value, "measured": measured[name]})
    write_results(ROOT / "benchmarks" / "results" / "estimate_error.json", rows, target=0.1)


if __name__ == "__main__":
    main()
