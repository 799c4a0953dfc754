"""What makes decoding fast, held by counts and addresses instead of clocks: no copies, no casts, no waits, one compiled graph."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import BOTH, EOS, PAD, pixels, prompt, toy_model
from transformers import CompileConfig, StaticCache

from llava_collab.models.experts import keep_beside

FACTORISED = {"language_expert": {"bottleneck": 4, "code_width": 8, "generator": "factorised"}}
LANGUAGE = {"language_expert": {"bottleneck": 4, "code_width": 8}}
VIEWS = {"transpose", "t", "view", "_unsafe_view", "unbind", "select", "slice", "unsqueeze", "expand", "alias", "detach"}


class Operations(TorchDispatchMode):
    """Counts what is run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def in_bf16(**experts: dict | None):
    """As a bf16 folder is opened: generators stay fp32."""
    net = toy_model(trained=bool(experts), **experts).bfloat16()
    if net.model.language_expert is not None:
        net.model.language_expert.float()
    return net


@torch.no_grad()
def decoding_step(net) -> Counter[str]:
    ids = torch.stack([prompt(6, images=0, seed=seed) for seed in range(3)])
    out = net(input_ids=ids, use_cache=True)
    with Operations() as seen:
        net(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True, expert_weights=getattr(out, "expert_weights", None))
    return seen.counts


def test_a_decoding_step_costs_three_kernels_an_expert_block() -> None:
    """Down, activation, up with the residual; no cast and no copy of a weight that was written at prefill."""
    more, stock = decoding_step(in_bf16(**LANGUAGE)), decoding_step(in_bf16())
    assert not stock - more
    assert {name: count for name, count in (more - stock).items() if name not in VIEWS} == {"bmm": 2, "silu": 2, "baddbmm_": 2}


def test_a_prefill_casts_what_it_generated_once() -> None:
    net, ids = in_bf16(**LANGUAGE), prompt(6, images=0)[None]
    down, up = net(input_ids=ids).expert_weights
    assert down.dtype == up.dtype == torch.bfloat16
    exact = net.float()(input_ids=ids).expert_weights
    assert exact[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert net(input_ids=ids).expert_weights[0].dtype == torch.bfloat16


@pytest.mark.parametrize("experts", [LANGUAGE, FACTORISED])
def test_adding_in_place_is_adding(experts: dict) -> None:
    """In half precision the evaluated model adds the expert in place, the trained one apart: they differ by rounding alone."""
    net, ids = in_bf16(**experts), torch.stack([prompt(9, images=0, seed=seed) for seed in range(3)])
    with torch.no_grad():
        evaluated = net.eval()(input_ids=ids, output_hidden_states=True)
        trained = net.train()(input_ids=ids, output_hidden_states=True)
        zeros = net.eval()(input_ids=ids, expert_weights=tuple(torch.zeros_like(w) for w in evaluated.expert_weights))
    for a, b in zip(evaluated.hidden_states, trained.hidden_states, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * float(b.float().abs().max()))
    assert not torch.equal(zeros.logits, evaluated.logits)


@pytest.mark.parametrize("experts", [BOTH, FACTORISED, BOTH | {"adapter": {"rank": 2}}], ids=["shared", "factorised", "adapted"])
def test_decoding_compiles_to_one_graph_that_serves_every_step_and_question(experts: dict) -> None:
    """As `generate` compiles it on a GPU. With fullgraph a break is an error; the answers are those of the model as it is."""
    torch.compiler.reset()
    net, graphs = toy_model(**experts), []
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = EOS, PAD

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(fullgraph=True, backend=backend)
    compiled._compile_all_devices = True
    for seed in (0, 10):
        ids = torch.stack([prompt(6, seed=seed), prompt(6, seed=seed + 1)])
        ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2, seed), "do_sample": False}
        ask |= {"max_new_tokens": 6, "min_new_tokens": 6}
        plain = net.generate(**ask)
        assert torch.equal(net.generate(**ask, cache_implementation="static", compile_config=compiled), plain)
    assert len(graphs) == 1


def test_a_static_cache_keeps_its_weights_at_one_address() -> None:
    net, cache = toy_model(**LANGUAGE), StaticCache(config=toy_model().config.text_config, max_cache_len=64)
    held = []
    for seed in (0, 1):
        cache.reset()
        out = net(input_ids=prompt(6, images=0, seed=seed)[None], past_key_values=cache, use_cache=True)
        held.append(keep_beside(cache, tuple(out.expert_weights)))
        assert all(torch.equal(a, b) for a, b in zip(held[-1], out.expert_weights, strict=True))
    assert [w.data_ptr() for w in held[0]] == [w.data_ptr() for w in held[1]]
    assert all(w._dynamo_static_input_type for w in held[1])  # what a CUDA graph reads in place
    other = net(input_ids=torch.stack([prompt(6, images=0)] * 2), use_cache=True)
    assert keep_beside(other.past_key_values, other.expert_weights) is other.expert_weights


def test_watching_the_experts_never_waits_for_the_device() -> None:
    net = toy_model(**BOTH).train()
    experts = (net.model.language_expert, *net.model.multi_modal_projector.experts)
    inputs = {"input_ids": torch.stack([prompt(6), prompt(6, seed=1)]), "pixel_values": pixels(2)}
    seen = {}
    for watched in (False, True):
        for expert in experts:
            expert.monitor = watched
        with Operations() as seen[watched]:
            net(**inputs)
    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "index", "masked_select")
    assert {name: seen[True].counts[name] for name in waits} == {name: seen[False].counts[name] for name in waits}
    assert sum(seen[True].counts.values()) > sum(seen[False].counts.values())
    assert all(set(expert.statistics()) >= {"down_norm", "up_norm", "output_ratio"} for expert in experts)
