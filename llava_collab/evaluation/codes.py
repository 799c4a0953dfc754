"""The codes that a trained HyperLLaVA's hypernetworks make of samples, and answering with other codes than a sample's own.

Shapes: S samples, B samples of a batch, N images, P image tokens, V tower width, T tokens, L expert layers, C code width, E visual experts.

What the dynamic part of an expert is worth shows when a sample gets the weights of another one, or of none: nothing else changes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llava_collab.collab.single import Single
from llava_collab.data.collate import Collator
from llava_collab.models.build import extract_features
from llava_collab.models.hypernetwork import ExpertWeights
from llava_collab.types import Answer, Request

if TYPE_CHECKING:
    from llava_collab.data.samples import Sample


@dataclass(frozen=True)
class Codes:
    """Of one sample: the language expert's code [L, C] (None without one), the visual experts' [N, E, C] (None without images)."""

    language: Tensor | None
    visual: Tensor | None


@torch.inference_mode()
def read_codes(model: Single, requests: Sequence[Request], batch_size: int) -> dict[str, Codes]:
    """Own codes of every request, by its id: one prefill of the prompt each."""
    network: Any = model.network
    found: dict[str, Codes] = {}
    guidance: list[Tensor] = []
    expert = network.model.language_expert
    handle = expert.register_forward_pre_hook(lambda _, args: guidance.append(args[0])) if expert is not None else None
    try:
        for start in tqdm(range(0, len(requests), batch_size), desc="codes", unit="batch"):
            chosen = requests[start : start + batch_size]
            batch = with_features(network, model.processor.encode_requests(chosen).to(network.device))
            visual_NEC = visual_codes(network, batch.get("image_features"))
            language_BLC = None
            if expert is not None:
                guidance.clear()
                network(**batch, logits_to_keep=1)
                language_BLC = expert.code(guidance[0])
            at = 0
            for row, request in enumerate(chosen):
                own_NEC = None if visual_NEC is None or not request.images else visual_NEC[at : at + len(request.images)].cpu()
                at += len(request.images)
                found[request.id] = Codes(None if language_BLC is None else language_BLC[row].cpu(), own_NEC)
    finally:
        if handle is not None:
            handle.remove()
    return found


def with_features(network: Any, batch: Any) -> Any:
    """The batch with tower outputs in place of pixels, so that the visual experts' weights can be given."""
    if "pixel_values" in batch:
        batch["image_features"] = extract_features(network, batch.pop("pixel_values"))
    return batch


def visual_codes(network: Any, features_NPV: Tensor | None) -> Tensor | None:
    """[N, E, C], or None without images or visual experts."""
    projector = network.model.multi_modal_projector
    if features_NPV is None or not projector.experts:
        return None
    guidance_NV = projector.guidance(features_NPV.to(projector.linear_1.weight.dtype))
    return torch.cat([expert.code(guidance_NV) for expert in projector.experts], dim=1)


def mean_codes(codes: Mapping[str, Codes]) -> Codes:
    """The mean over all samples, and over all their images."""
    language = [code.language for code in codes.values() if code.language is not None]
    visual = [code.visual for code in codes.values() if code.visual is not None]
    return Codes(torch.stack(language).mean(0) if language else None, torch.cat(visual).mean(0, keepdim=True) if visual else None)


def replaced(codes: Mapping[str, Codes], by: Codes) -> dict[str, Codes]:
    """Every sample with the same codes (every image with the first)."""

    def fitted(own: Codes) -> Codes:
        visual = None if own.visual is None or by.visual is None else by.visual[:1].expand_as(own.visual)
        return Codes(None if own.language is None else by.language, visual)

    return {name: fitted(own) for name, own in codes.items()}


def shuffled(
    codes: Mapping[str, Codes], samples: Sequence[Sample], key: Callable[[Sample], object], seed: int
) -> tuple[dict[str, Codes], int]:
    """Every sample with the codes of another one of the same `key` and number of images; how many found no other and keep theirs."""
    rng = random.Random(seed)  # noqa: S311 - an experiment's seed, not a secret
    groups: dict[object, list[str]] = defaultdict(list)
    for sample in samples:
        groups[key(sample), len(sample.images)].append(sample.id)
    result: dict[str, Codes] = {}
    for names in groups.values():
        names = rng.sample(names, len(names))
        result |= {name: codes[donor] for name, donor in zip(names, names[1:] + names[:1], strict=True)}
    return result, sum(len(names) == 1 for names in groups.values())


class Recoded(Single):
    """A `Model` whose samples run with the weights that `codes` decode to, or whose guidance is pooled over a part of the prompt.

    `part`: "image" or "question" tokens of the prompt only, for the language expert; own codes where neither is given.
    """

    def __init__(self, base: Single, name: str, codes: Mapping[str, Codes] | None = None, part: str | None = None) -> None:
        super().__init__(base.network, base.processor, name)
        self.codes, self.part = codes, part

    def _answer(self, requests: Sequence[Request], batch: Any) -> list[Answer]:
        with torch.inference_mode():
            return super()._answer(requests, self.prepared(requests, batch.to(self.network.device)))

    def prepared(self, requests: Sequence[Request], batch: Any) -> Any:
        """The batch with what this condition changes. Shapes as in `HyperLlavaForConditionalGeneration.forward`."""
        network: Any = self.network
        if self.part is not None:
            image_BT = batch["input_ids"] == network.config.image_token_id
            batch["guidance_mask"] = batch["guidance_mask"] & (image_BT if self.part == "image" else ~image_BT)
        if self.codes is None:
            return batch
        own = [self.codes[request.id] for request in requests]
        expert, projector = network.model.language_expert, network.model.multi_modal_projector
        if expert is not None:
            code_BLC = torch.stack([code.language for code in own if code.language is not None]).to(network.device)
            batch["expert_weights"] = tuple(expert.decode(code_BLC))
        batch = with_features(network, batch)
        if projector.experts and "image_features" in batch:
            code_NEC = torch.cat([code.visual for code in own if code.visual is not None]).to(network.device)
            batch["visual_expert_weights"] = tuple(tuple(one.decode(code_NEC[:, e : e + 1])) for e, one in enumerate(projector.experts))
        return batch

    @torch.inference_mode()
    def losses(self, samples: Sequence[Sample]) -> list[float]:
        """Cross-entropy of each sample's reference answer, in nats a supervised token."""
        network: Any = self.network
        encoded = [self.processor.encode(sample.turns, sample.images, sample_id=sample.id) for sample in samples]
        batch = Collator(self.processor.tokenizer.pad_token_id or 0)(encoded).to(network.device)
        labels_BT = batch.pop("labels")
        for name in ("sample_ids", "categories"):
            batch.pop(name, None)
        logits_BTV = network(**self.prepared([sample.request() for sample in samples], batch)).logits[:, :-1].float()
        next_BT = labels_BT[:, 1:]
        losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), next_BT, reduction="none", ignore_index=-100)
        return (losses_BT.sum(1) / (next_BT != -100).sum(1)).tolist()


@torch.inference_mode()
def variances(model: Single, views: Sequence[Sequence[Any]], prompts: Sequence[Request]) -> dict[str, list[dict[str, float]]]:
    """Per expert and layer: variance of the generated weights between samples, and within a sample over views of its image.

    `views`: several versions of each sample's image (at least two); `prompts`: the requests, of one image each. Both variances are
    summed over all weights of a layer and divided by the squared norm of the mean weights; `between` is freed of the noise of `within`.
    """
    network: Any = model.network
    codes: dict[str, list[Tensor]] = defaultdict(list)
    for number in range(len(views[0])):
        requests = [Request(p.id, p.turns, (images[number],), p.max_new_tokens) for p, images in zip(prompts, views, strict=True)]
        found = read_codes(model, requests, batch_size=16)
        for name in ("language", "visual"):
            own = [getattr(found[request.id], name) for request in requests]
            if own[0] is not None:
                codes[name].append(torch.stack([code if name == "language" else code[0] for code in own]))
    result: dict[str, list[dict[str, float]]] = {}
    for name, parts in codes.items():
        code_SALC = torch.stack(parts, dim=1)
        experts = [network.model.language_expert] if name == "language" else network.model.multi_modal_projector.experts
        result[name] = []
        for layer in range(code_SALC.shape[2]):
            expert = experts[0] if name == "language" else experts[layer]
            index = layer if name == "language" else 0
            result[name].append(_spread(_weights(expert, code_SALC[:, :, layer], index)))
    return result


def _weights(expert: Any, code_SAC: Tensor, layer: int) -> Tensor:
    """All numbers [S, A, W] of one layer that the codes decode to."""
    code_BLC = code_SAC.flatten(0, 1).to(expert.base.device).unsqueeze(1).expand(-1, expert.layers, -1)
    whole = expert.materialise(expert(None, ExpertWeights(*expert.decode(code_BLC))))
    return torch.cat([weight[:, layer].flatten(1).float().cpu() for weight in whole], dim=1).unflatten(0, code_SAC.shape[:2])


def _spread(weights_SAW: Tensor) -> dict[str, float]:
    means_SW = weights_SAW.mean(1)
    within = weights_SAW.var(1).mean(0).sum()
    between = means_SW.var(0).sum() - within / weights_SAW.shape[1]
    norm = means_SW.mean(0).square().sum().clamp(min=1e-30)
    return {"between": float((between / norm).clamp(min=0)), "within": float(within / norm)}
