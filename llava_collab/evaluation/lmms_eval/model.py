"""The model class that lmms-eval loads (`--model llava_collab`): its requests in, answers of our `Single` out, greedy and in batches.

    lmms-eval --model llava_collab --model_args pretrained=runs/x/model --tasks cmt_open --include_path eval/lmms_eval --batch_size 16

Where lmms-eval is installed without us knowing (scripts/lmms_eval_check.sh makes such an environment), nothing of the library imports it
but this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from llava_collab.collab.asking import ask
from llava_collab.collab.single import Single
from llava_collab.evaluation.evaluator import batches
from llava_collab.evaluation.lmms_eval.messages import read_messages
from llava_collab.types import Model, Request

DTYPES = ("stored", "float32", "bfloat16", "float16")
MAX_NEW_TOKENS = 1024
"""Where a task names no limit; that of lmms-eval's own LLaVA."""


class LlavaCollab(lmms):
    """A model folder of ours (or stock LLaVA's) as lmms-eval's chat model."""

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "auto", dtype: str = "stored", max_errors: int | str = 0
    ) -> None:
        """`pretrained`: model folder. `dtype`: one of DTYPES. `max_errors`: how many requests may fail; lmms-eval has no word for
        "no answer" and scores it as a wrong one, so it is none by default. Raises ValueError for another `dtype`, and what `load` raises.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype}: has to be one of {', '.join(DTYPES)}")

        import torch

        from llava_collab.models.build import load, pick_device

        network: Any
        network, processor = load(pretrained, dtype=None if dtype == "stored" else getattr(torch, dtype))
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self.device = self.accelerator.device if device == "auto" else pick_device(device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model: Model = Single(network.to(self.device), processor, Path(pretrained).name)
        self.batch_size, self.max_errors = int(batch_size), int(max_errors)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One `GenerationResult` a request, in order. Raises RuntimeError where more than `max_errors` have no answer."""
        asked = [self._read(str(number), *request.args) for number, request in enumerate(requests)]
        results: dict[int, Any] = {}
        errors: list[str] = []
        with tqdm(total=len(asked), unit="item", desc="llava_collab", disable=self._rank != 0) as bar:
            for batch in batches([request for request, _ in asked], self.batch_size):
                for number, answer in zip((int(request.id) for request in batch), ask(self.model, batch), strict=True):
                    errors += [f"{requests[number].args[4]}, document {requests[number].args[3]}: {answer.error}"] * bool(answer.error)
                    usage = TokenCounts(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.generated_tokens)
                    results[number] = GenerationResult(text=_cut(answer.text, asked[number][1]), token_counts=usage)
                bar.update(len(batch))
        if len(errors) > self.max_errors:
            raise RuntimeError(f"{len(errors)} of {len(asked)} requests have no answer (max_errors={self.max_errors}): {errors[0]}")
        return [results[number] for number in range(len(asked))]

    def _read(
        self, number: str, _: str, messages: Any, options: Mapping[str, Any], doc: int, task: str, split: str
    ) -> tuple[Request, list[str]]:
        """The request and its stop strings."""
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ValueError(f"{task} asks for sampling or beams ({dict(options)}); answers are greedy here, set its generation_kwargs")
        turns, images = read_messages(messages(self.task_dict[task][split][doc]))
        until = options.get("until") or []
        request = Request(number, turns, tuple(images), int(options.get("max_new_tokens", MAX_NEW_TOKENS)))
        return request, [until] if isinstance(until, str) else list(until)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not spoken here."""
        raise NotImplementedError("this model answers tasks of one round (output_type: generate_until)")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not spoken here."""
        raise NotImplementedError("this model answers by text (output_type: generate_until), it gives no likelihoods")


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))].rstrip() if until else text
