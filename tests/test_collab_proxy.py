"""Proxy-tuning: without steering it is the base, steered it is the sum of logits, and what it can't do it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from llava_collab.collab.compose import Route, Shunt
from llava_collab.collab.gates import Confidence
from llava_collab.collab.proxy import Proxy
from llava_collab.collab.router import PooledState, Router
from llava_collab.collab.single import ChatProcessor, Single, open_single
from llava_collab.data.conversation import TEMPLATES
from llava_collab.models.build import ModelSpec, build
from llava_collab.models.tiny import tiny_decoder, tiny_tokenizer
from llava_collab.types import Request, TokenModel, Turn, Usage

CHOICES = ("red", "left", "a cat")


def text_model(seed: int, name: str) -> Single:
    torch.manual_seed(seed)
    config = tiny_decoder()
    config.initializer_range = 0.3  # so that answers differ
    network = LlamaForCausalLM(config)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    return Single(network, ChatProcessor(tokenizer), name)


def vision_model(seed: int, name: str) -> Single:
    network, processor = build(
        ModelSpec(visual_expert={"bottleneck": 4, "code_width": 4}, language_expert={"bottleneck": 4, "code_width": 4}), seed
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Single(network, processor, name)


def requests(images: bool) -> list[Request]:
    picture = Image.new("RGB", (40, 30), "orange")
    marks, pictures = ("<image>\n", (picture,)) if images else ("", ())
    texts = ("What is it?", "Where is the red square, left or right?", "?")
    return [Request(f"r{k}", (Turn("user", marks + text),), pictures, 12, CHOICES) for k, text in enumerate(texts)]


@pytest.fixture(params=["text", "vision"])
def three(request: pytest.FixtureRequest) -> tuple[list[Single], list[Request]]:
    make = vision_model if request.param == "vision" else text_model
    return [make(seed, f"{request.param}-{seed}") for seed in range(3)], requests(request.param == "vision")


def same(one: Single, other: Single, asked: list[Request]) -> None:
    assert [(a.text, a.likelihood) for a in one.generate(asked)] == [(a.text, a.likelihood) for a in other.generate(asked)]
    assert [a.scores for a in one.score(asked)] == [a.scores for a in other.score(asked)]
    for ours, theirs in zip(one.answer_logits(asked[0], CHOICES).pairs, other.answer_logits(asked[0], CHOICES).pairs, strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_without_steering_it_is_the_base_bit_for_bit(three: tuple[list[Single], list[Request]]) -> None:
    (base, expert, anti), asked = three
    same(Proxy(base, expert, anti, alpha=0.0), base, asked)
    same(Proxy(base, expert, expert, alpha=1.0), base, asked)
    texts = [a.text for a in Proxy(base, expert, anti, alpha=1.0).generate(asked)]
    assert texts != [a.text for a in base.generate(asked)], "steering does something"


def test_steered_by_what_it_is_it_becomes_the_expert(three: tuple[list[Single], list[Request]]) -> None:
    """s_base + (s_expert - s_base) = s_expert: the followers see what the models themselves would, padding and caches included."""
    (base, expert, _), asked = three
    steered, alone = Proxy(base, expert, base).generate(asked), expert.generate(asked)
    assert [a.text for a in steered] == [a.text for a in alone]
    for one, other in zip(steered, alone, strict=True):
        assert one.likelihood == pytest.approx(other.likelihood, rel=1e-3)
    for one, other in zip(Proxy(base, expert, base).score(asked), expert.score(asked), strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-3, abs=1e-6)


def test_batches_answer_as_single_requests(three: tuple[list[Single], list[Request]]) -> None:
    (base, expert, anti), asked = three
    proxy = Proxy(base, expert, anti, 1.0)
    assert [a.text for a in proxy.generate(asked)] == [proxy.generate([one])[0].text for one in asked]


def test_drawn_answers_depend_on_draw_and_requests_alone(three: tuple[list[Single], list[Request]]) -> None:
    (plain, *_), asked = three
    drawn = [Single(plain.network, plain.processor, "drawn", temperature=t, draw=d) for t, d in ((1.0, 0), (1.0, 1), (1e-4, 0))]
    torch.manual_seed(1)
    first, other, cold = (model.generate(asked) for model in drawn)
    state = torch.random.get_rng_state()
    assert [answer.text for answer in drawn[0].generate(asked)] == [answer.text for answer in first]
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers are used up
    assert [answer.text for answer in other] != [answer.text for answer in first]
    greedy = plain.generate(asked)
    assert [answer.text for answer in cold] == [answer.text for answer in greedy]
    for drawn_one, likeliest in zip(cold, greedy, strict=True):  # likelihoods are of the tokens drawn, before the temperature
        assert drawn_one.likelihood == pytest.approx(likeliest.likelihood, rel=1e-4)
    assert all(answer.likelihood is not None and 0 < answer.likelihood < 1 for answer in first)


def test_bills_name_all_three(three: tuple[list[Single], list[Request]]) -> None:
    models, asked = three
    for answer in (Proxy(*models).generate(asked)[0], Proxy(*models).score(asked)[0]):
        assert answer.by == tuple(model.name for model in models) and answer.usage.calls == 3
        tokens = answer.parts[0].usage.prompt_tokens + answer.parts[0].usage.generated_tokens
        assert answer.usage.flops == pytest.approx(sum(2.0 * model.parameters * tokens for model in models))
    assert isinstance(Proxy(*models), TokenModel)
    bad = Request("bad", (Turn("user", "<image> <image> ?"),), ("nowhere.png",), 12)
    beside = Proxy(*models).generate([asked[0], bad])
    assert beside[1].error and beside[0].usage.calls == 3  # what fails costs the others nothing


def test_each_part_is_billed_for_what_it_read(three: tuple[list[Single], list[Request]]) -> None:
    """One of the three is asked by another template, so that its prompts have other lengths."""
    models, asked = three
    owner = models[2].processor if hasattr(models[2].processor, "chat_template") else models[2].processor.tokenizer
    owner.chat_template = "look at it " + TEMPLATES["chatml"]
    for verb in ("generate", "score"):
        alone = [[answer.usage.prompt_tokens for answer in getattr(model, verb)(asked)] for model in models]
        steered = getattr(Proxy(*models), verb)(asked)
        assert [[answer.parts[k].usage.prompt_tokens for answer in steered] for k in range(3)] == alone and alone[0] != alone[2]
        assert all(answer.usage.prompt_tokens == sum(tokens) for answer, *tokens in zip(steered, *alone, strict=True))
    owner.chat_template = TEMPLATES["vicuna_v1"]
    if models[0].name.startswith("text"):  # whose answers end with the tokenizer's own end, whatever the template
        return
    with pytest.raises(ValueError, match="end an answer otherwise"):
        Proxy(*models).score(asked)


def test_unequal_vocabularies_and_beams_are_refused() -> None:
    base, expert, anti = (text_model(seed, f"text-{seed}") for seed in range(3))
    expert.processor.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="text-0 and text-1 have to share a vocabulary.*'<extra>'"):
        Proxy(base, expert, anti)
    proxy = Proxy(base, anti, anti)
    asked = requests(images=False)
    batch = proxy.processor.encode_requests(asked)
    with pytest.raises(ValueError, match="can't do beam search"):
        proxy.network.generate(**batch, num_beams=2, do_sample=False, max_new_tokens=3, logits_processor=list(proxy._steering(asked)))


def test_scores_are_those_of_the_loop_that_a_reader_would_write(three: tuple[list[Single], list[Request]]) -> None:
    (model, *_), asked = three
    for request in asked:
        logs = []
        for choice in request.choices:
            prompt = model.processor.encode_requests([request])
            tokenizer = model.processor.tokenizer
            own = [*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids_1T = torch.cat([prompt["input_ids"], torch.tensor([own])], 1)
            more: dict[str, Any] = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask", "guidance_mask")}
            if "guidance_mask" in prompt:
                more["guidance_mask"] = torch.cat([prompt["guidance_mask"], torch.zeros(1, len(own), dtype=torch.bool)], 1)
            with torch.inference_mode():
                logp_TV = model.network(input_ids=ids_1T, **more).logits[0].log_softmax(-1)
            start = prompt["input_ids"].shape[1] - 1
            logs.append(sum(float(logp_TV[start + k, token]) for k, token in enumerate(own)))
        expected = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
        assert model.score([request])[0].scores == pytest.approx(expected, rel=1e-4)


def test_an_empty_list_of_choices_is_an_error() -> None:
    model = text_model(0, "text")
    with pytest.raises(ValueError, match="'r' has no choices"):
        model.score([Request("r", (Turn("user", "What?"),))])
    with pytest.raises(ValueError, match="names a choice twice"):
        model.score([Request("r", (Turn("user", "What?"),), choices=("a", "a"))])


def test_any_model_of_transformers_opens(tmp_path: Path) -> None:
    text = text_model(0, "text")
    text.network.save_pretrained(tmp_path / "text")
    text.processor.tokenizer.save_pretrained(tmp_path / "text")
    same(open_single(str(tmp_path / "text"), "again"), text, requests(images=False))
    vision = vision_model(0, "vision")
    vision.network.save_pretrained(tmp_path / "vision")
    vision.processor.save_pretrained(tmp_path / "vision")
    same(open_single(str(tmp_path / "vision"), "again"), vision, requests(images=True))
    answer = open_single(str(tmp_path / "text"), "text").generate(requests(images=True)[:1])[0]
    assert "reads text only" in str(answer.error)


def test_threads_get_the_answers_and_bills_of_one_caller(three: tuple[list[Single], list[Request]]) -> None:
    """Real networks under a shunt whose large model is a route between a proxy of all three and one of them, 32 requests at once."""
    (small, expert, base), asked = three
    features = PooledState(small)
    router = Router(features, torch.linspace(-9, 9, features.size), 0.0)
    large = Route(expert, Proxy(base, expert, small, 0.7), router, 0.5, "route")
    everyone = [replace(asked[k % 3], id=f"r{k}", turns=(Turn("user", f"{asked[k % 3].text} {k}"),)) for k in range(32)]
    sure = sorted(answer.likelihood or 0.0 for answer in small.generate(everyone))
    composite = Shunt(small, large, Confidence(), sure[16], "shunt")
    alone = [composite.generate([request])[0] for request in everyone]
    with ThreadPoolExecutor(32) as pool:
        together = [answers[0] for answers in pool.map(lambda request: composite.generate([request]), everyone)]
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.by, one.confidence) == (other.text, other.by, other.confidence)
        assert replace(one.usage, seconds=0.0) == replace(other.usage, seconds=0.0)
        assert other.usage == sum((part.usage for part in other.parts), Usage())
    assert len({answer.by for answer in alone}) == 3  # the small model alone, and both ways of the route
