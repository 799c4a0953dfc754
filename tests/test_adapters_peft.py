"""The same experts as a peft method: any transformers model, peft's own save, load, switch, merge and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llava_collab.adapters import METHODS, LowRankExperts, RoutingContext, TeamLoraConfig, checkpoint_context, export_lora

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def adapted(method: str = "teamlora", steps: int = 8, **settings: object) -> PeftModel:
    """Trained a little, in eval mode."""
    model = get_peft_model(base(), TeamLoraConfig.of(method, rank=4, dropout=0.0, task_type="CAUSAL_LM", **settings)).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(steps):
        with RoutingContext():
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01 * steps
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), RoutingContext():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_loaded_switched(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    assert {name.split("teamlora_experts")[0] == name for name, p in model.named_parameters() if p.requires_grad} == {False}
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["rank"], stored["experts"]) == (4, 1 if method == "lora" else 4)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    other = adapted(method, steps=3)
    other.save_pretrained(tmp_path / "other")
    again.load_adapter(tmp_path / "other", adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(other)) and not torch.equal(logits(other), expected)
    again.delete_adapter("second")
    again.set_adapter("default")
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base()))
    plain = base()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize(
    "settings", [{"method": "lora"}, {"method": "teamlora", "routing": "uniform"}, {"method": "hydralora", "routing": "uniform"}]
)
def test_what_is_one_matrix_is_merged_and_exported(settings: dict, tmp_path: Path) -> None:
    model = adapted(**settings)
    expected = logits(model)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert type(lora.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LowRankExperts) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_routed_experts_are_neither_merged_nor_exported(tmp_path: Path) -> None:
    model = adapted("teamlora")
    before = logits(model)
    for act in (model.merge_adapter, model.merge_and_unload, lambda: export_lora(model, tmp_path / "lora")):
        with pytest.raises(ValueError, match="no merge"):
            act()
    assert not (tmp_path / "lora").exists()
    if isinstance(model, PeftModel):
        assert torch.equal(logits(model), before)


def test_two_adapters_at_once_add_up() -> None:
    model = adapted("teamlora")
    one = logits(model) - logits(base())
    model.add_adapter("second", TeamLoraConfig(rank=2, experts=2, dropout=0.0, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model) - logits(base()), one)  # a new one says nothing yet
    assert {p.requires_grad for name, p in model.named_parameters() if "teamlora_experts" in name} == {True}


def test_another_adapter_in_every_row_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter_names"):
        adapted("lora")(input_ids=IDS, adapter_names=["default", "__base__"])


def test_quantised_bases_are_adapted_and_not_merged() -> None:
    model = base()
    for block in model.model.layers:
        block.mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    tuned = get_peft_model(model, TeamLoraConfig.of("lora", rank=2, target_modules=["gate_proj"]))
    assert sum(p.requires_grad for p in tuned.parameters()) == 4
    with pytest.raises(ValueError, match="quantised"):
        tuned.merge_adapter()


def test_what_was_trained_whole_is_not_lost_in_an_export(tmp_path: Path) -> None:
    model = get_peft_model(base(), TeamLoraConfig.of("lora", rank=2, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        export_lora(model, tmp_path)


def test_an_adapter_of_another_kind_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter 'other'"):
        export_lora(adapted("lora"), tmp_path, "other")


def test_only_linear_layers_take_experts() -> None:
    with pytest.raises(ValueError, match="LlamaRMSNorm"):
        get_peft_model(base(), TeamLoraConfig(target_modules=["input_layernorm"]))


@pytest.mark.parametrize("routing", ["token", "sample"])
def test_generation_equals_one_by_one_and_no_cache(routing: str) -> None:
    model = adapted("teamlora", routing=routing)
    rows = [IDS[0], IDS[1, 3:]]
    padded = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, 9 - len(ids) :], mask[row, 9 - len(ids) :] = ids, 1
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with RoutingContext(mask):
        together = model.generate(input_ids=padded, attention_mask=mask, **options)[:, 9:]
    for row, ids in enumerate(rows):
        with RoutingContext():
            alone = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), **options)[0, len(ids) :]
        assert torch.equal(together[row], alone)
        if routing == "token":  # by sample every call without a cache is a new prompt to a context that knows nothing of it
            uncached = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False, **options)
            assert torch.equal(uncached[0, len(ids) :], alone)


def test_gradient_checkpointing_of_transformers(tmp_path: Path) -> None:
    gradients = []
    for again in (False, True):
        model = get_peft_model(base(), TeamLoraConfig(rank=4, dropout=0.0, routing="sample", balance=0.5, task_type="CAUSAL_LM")).train()
        for module in model.modules():
            if isinstance(module, LowRankExperts):
                torch.manual_seed(5)
                torch.nn.init.normal_(module.up, std=0.2)
        if again:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
            model.enable_input_require_grads()
        with RoutingContext() as context:
            loss = model(input_ids=IDS, labels=IDS).loss
        extra = context.balance_loss()
        assert extra is not None
        (loss + extra).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1])
