"""The experts in use: no leakage; padding, batching, caching, beams and neighbours change nothing; what can't be right is refused."""

import pytest
import torch
from toy import BOTH, EOS, pad_batch, pixels, prompt, toy_model
from transformers import DynamicCache, GenerationConfig

ROWS = [prompt(6, images=1, seed=1), prompt(11, images=0, seed=2), prompt(4, images=2, seed=3)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model(**experts: dict):
    made = toy_model(**(experts or BOTH))
    made.generation_config.eos_token_id = EOS
    made.generation_config.pad_token_id = 0
    return made


def run(net, rows: list[torch.Tensor], side: str = "left", **kwargs):
    images = sum(int((row == 3).sum()) // 16 for row in rows)
    extra = {"pixel_values": pixels(3)[3 - images :]} if images else {}
    return net(**pad_batch(rows, side), **extra, **kwargs)


def test_answer_tokens_never_reach_earlier_logits() -> None:
    net, row = model(), prompt(12, seed=5)
    labels = row.clone()
    labels[:24] = -100
    other = row.clone()
    other[26:] = (other[26:] + 7) % 100 + 5
    a = net(input_ids=row[None], labels=labels[None], pixel_values=pixels(1)).logits
    b = net(input_ids=other[None], labels=torch.where(labels == -100, -100, other)[None], pixel_values=pixels(1)).logits
    assert torch.equal(a[:, :26], b[:, :26])
    assert not torch.equal(a[:, 26:], b[:, 26:])


def test_prompt_tokens_do_reach_the_weights() -> None:
    net, a, b = model(), prompt(12, seed=5), prompt(12, seed=6)
    assert not torch.equal(net(input_ids=a[None], pixel_values=pixels(1)).expert_weights[0],
                           net(input_ids=b[None], pixel_values=pixels(1)).expert_weights[0])  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_nothing(side: str) -> None:
    net, images = model(), pixels(3)
    single = [
        net(input_ids=ROWS[0][None], pixel_values=images[:1]).logits[0],
        net(input_ids=ROWS[1][None]).logits[0],
        net(input_ids=ROWS[2][None], pixel_values=images[1:]).logits[0],
    ]
    batch = pad_batch(ROWS, side)
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = net(**batch, position_ids=position_ids, pixel_values=images).logits
    for b in range(3):
        torch.testing.assert_close(logits[b][batch["attention_mask"][b].bool()], single[b], **CLOSE)


def test_generation_in_a_batch_equals_one_by_one() -> None:
    net, images = model(), pixels(3)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    together = net.generate(**pad_batch(ROWS), pixel_values=images, **kwargs)[:, max(map(len, ROWS)) :]
    alone = [
        net.generate(input_ids=ROWS[0][None], attention_mask=torch.ones(1, len(ROWS[0])), pixel_values=images[:1], **kwargs),
        net.generate(input_ids=ROWS[1][None], attention_mask=torch.ones(1, len(ROWS[1])), **kwargs),
        net.generate(input_ids=ROWS[2][None], attention_mask=torch.ones(1, len(ROWS[2])), pixel_values=images[1:], **kwargs),
    ]
    for b, row in enumerate(alone):
        new = row[0, len(ROWS[b]) :]
        assert torch.equal(together[b, : len(new)], new)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_cache_equals_no_cache(how: dict) -> None:
    net, images = model(), pixels(3)
    kwargs = {"max_new_tokens": 8, "do_sample": False} | {k: v for k, v in how.items() if k == "num_beams"}
    cached = net.generate(**pad_batch(ROWS), pixel_values=images, **(kwargs | how))
    plain = net.generate(**pad_batch(ROWS), pixel_values=images, use_cache=False, **kwargs)
    assert torch.equal(cached, plain)


def test_greedy_decode_equals_full_forwards_with_frozen_guidance() -> None:
    net, row = model(), ROWS[0]
    out = net.generate(
        input_ids=row[None], attention_mask=torch.ones(1, len(row)), pixel_values=pixels(1), max_new_tokens=6, do_sample=False
    )
    mask = torch.zeros_like(out, dtype=torch.bool)
    mask[:, : len(row)] = True
    logits = net(input_ids=out, pixel_values=pixels(1), guidance_mask=mask).logits
    assert torch.equal(logits[0, len(row) - 1 : -1].argmax(-1), out[0, len(row) :])


def test_beams_and_sequences_keep_each_samples_images() -> None:
    net, images = model(), pixels(3)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    rows = [ROWS[0], ROWS[2]]
    width = max(map(len, rows))
    both = net.generate(**pad_batch(rows), pixel_values=images, **kwargs)[:, width:]
    second = net.generate(input_ids=rows[1][None], attention_mask=torch.ones(1, len(rows[1])), pixel_values=images[1:], **kwargs)
    for k in range(2):
        new = second[k, len(rows[1]) :]
        assert torch.equal(both[2 + k, : len(new)], new)


def test_cached_features_equal_pixels() -> None:
    from llava_collab.models.build import extract_features

    net, images = model(), pixels(3)
    features = extract_features(net, images)
    a = net(**pad_batch(ROWS), pixel_values=images).logits
    b = net(**pad_batch(ROWS), image_features=features).logits
    assert torch.equal(a, b)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        a = net.generate(**pad_batch(ROWS), pixel_values=images, **kwargs, **how)
        assert torch.equal(a, net.generate(**pad_batch(ROWS), image_features=features, **kwargs, **how)), how


def test_interleaved_calls_do_not_share_weights() -> None:
    net = model()
    alone = [net.generate(input_ids=r[None], attention_mask=torch.ones(1, len(r)), max_new_tokens=5, do_sample=False) for r in TEXTS]
    caches = [DynamicCache(config=net.config.text_config) for _ in TEXTS]
    outs = [net(input_ids=r[None], past_key_values=c, use_cache=True) for r, c in zip(TEXTS, caches, strict=True)]
    rows = [[int(o.logits[0, -1].argmax())] for o in outs]
    for _ in range(4):  # one token of each in turn
        for k, out in enumerate(outs):
            step = net(
                input_ids=torch.tensor([[rows[k][-1]]]),
                past_key_values=out.past_key_values,
                expert_weights=out.expert_weights,
                use_cache=True,
            )
            rows[k].append(int(step.logits[0, -1].argmax()))
    for k, r in enumerate(TEXTS):
        assert rows[k][: len(alone[k][0]) - len(r)] == alone[k][0, len(r) :].tolist()


TEXTS = [prompt(9, images=0, seed=8), prompt(9, images=0, seed=9)]


def test_a_strangers_cache_is_refused() -> None:
    net, row = model(), ROWS[1]
    cache = net(input_ids=row[None], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expert_weights"):
        net(input_ids=row[None, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="expert_weights"):
        net.generate(input_ids=torch.cat([row, row])[None], past_key_values=cache, max_new_tokens=2)
    weights = net(input_ids=torch.stack([row, row])).expert_weights
    with pytest.raises(ValueError, match="another call"):
        net(input_ids=row[None, :1], past_key_values=cache, expert_weights=weights)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}])
def test_unsound_decoding_is_refused(how: dict) -> None:
    net, row = model(), ROWS[1]
    ask = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)), "max_new_tokens": 3}
    with pytest.raises(ValueError, match=next(iter(how))):
        net.generate(**ask, **how)
    with pytest.raises(ValueError, match=next(iter(how))):
        net.generate(**ask, generation_config=GenerationConfig(**how))
    with pytest.raises(ValueError, match="assistant_model"):
        net.generate(**ask, assistant_model=model())


def test_a_wrong_number_of_image_tokens_is_refused() -> None:
    net = model()
    with pytest.raises((ValueError, RuntimeError), match="do not match"):
        net(input_ids=ROWS[0][None], pixel_values=pixels(2))
    with pytest.raises(ValueError, match="guidance_mask"):
        net(input_ids=ROWS[1][None], guidance_mask=torch.ones(1, 3, dtype=torch.bool))


def test_shuffled_guidance_changes_the_answer() -> None:
    net, row = model(), ROWS[1]
    own = net(input_ids=torch.stack([row, TEXTS[0][: len(row)].new_tensor(row.tolist()[::-1])]))
    down, up = own.expert_weights
    swapped = net(input_ids=row[None], expert_weights=(down[1:], up[1:])).logits
    assert not torch.allclose(own.logits[:1], swapped, atol=1e-3)
