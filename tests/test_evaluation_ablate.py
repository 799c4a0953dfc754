"""Other codes than one's own: nothing changes where nothing is replaced, and what is replaced is what answers change by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_collab.collab.single import Single
from llava_collab.data.samples import read_samples
from llava_collab.evaluation.ablate import CONDITIONS, ablate
from llava_collab.evaluation.codes import Recoded, mean_codes, read_codes, replaced, shuffled, variances
from llava_collab.evaluation.suite import load_suite
from llava_collab.models.build import ModelSpec, build

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"bottleneck": 4, "code_width": 8}


def model(**settings: Any) -> Single:
    network, processor = build(
        ModelSpec(visual_expert={**SIZES, "layers": "both"} | settings, language_expert={**SIZES, "layers": "all"} | settings)
    )
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "_expert" in name and "encoder" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return Single(network, processor, "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two categories of two families, one of them with two pictures a sample."""
    root = tmp_path / "data"
    root.mkdir()
    for split, count in (("train", 4), ("test", 6)):
        rows = []
        for i in range(count):
            for category, family, images in (("Visual QA", "name", 1), ("Visual QA", "count", 1), ("Spatial Inference", "side", 2)):
                names = [f"{split}-{family}-{i}-{k}.png" for k in range(images)]
                for k, name in enumerate(names):
                    Image.new("RGB", (32, 32), (40 * i, 90 * k, 10 * len(family))).save(root / name)
                turns = [{"from": "human", "value": "<image>\n" * images + family + "?"}, {"from": "gpt", "value": "ab"[i % 2]}]
                rows.append(
                    {
                        "id": f"{family}-{i}",
                        "image": names,
                        "conversations": turns,
                        "category": category,
                        "family": family,
                        "answers": ["a"],
                    }
                )
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def test_own_codes_are_the_model_itself(data: Path) -> None:
    plain, samples = model(), read_samples(data / "test.jsonl")
    requests = [sample.request(4) for sample in samples]
    own = Recoded(plain, "own", read_codes(plain, requests, batch_size=5))
    assert [a.text for a in own.generate(requests[:3])] == [a.text for a in plain.generate(requests[:3])]
    for sample, loss in zip(samples[:4], own.losses(samples[:4]), strict=True):
        batch = plain.processor.encode(sample.turns, sample.images)
        inputs = {name: batch[name][None] for name in ("input_ids", "labels", "guidance_mask")} | {"pixel_values": batch["pixel_values"]}
        with torch.no_grad():
            assert loss == pytest.approx(plain.network(**inputs).loss.item(), rel=1e-4)


def test_shuffling_gives_everyone_the_codes_of_another_of_its_kind(data: Path) -> None:
    plain, samples = model(), read_samples(data / "test.jsonl")
    codes = read_codes(plain, [sample.request(4) for sample in samples], batch_size=8)
    mixed, kept = shuffled(codes, samples, lambda sample: sample.family, seed=0)
    assert kept == 0
    for sample in samples:
        donor = next(name for name, code in codes.items() if code is mixed[sample.id])
        assert donor != sample.id and donor.split("-")[0] == sample.family
    assert shuffled(codes, samples, lambda sample: sample.id, seed=0) == (codes, len(samples))
    before, after = (Recoded(plain, "x", c).losses(samples) for c in (codes, mixed))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-4


def test_the_mean_of_equal_codes_is_each_of_them(data: Path) -> None:
    plain, samples = model(mode="constant"), read_samples(data / "test.jsonl")
    codes = read_codes(plain, [sample.request(4) for sample in samples], batch_size=8)
    mean = replaced(codes, mean_codes(codes))
    for a, b in zip(*(Recoded(plain, "x", c).losses(samples) for c in (codes, mean)), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("part", ["image", "question"])
def test_guidance_of_a_part_is_pooled_over_that_part(data: Path, part: str) -> None:
    plain, samples = model(), read_samples(data / "test.jsonl")[:2]
    recoded = Recoded(plain, "x", part=part)
    batch = recoded.prepared([s.request(4) for s in samples], plain.processor.encode_requests([s.request(4) for s in samples]))
    images_BT = batch["input_ids"] == plain.network.config.image_token_id
    assert batch["guidance_mask"].any(1).all() and not (batch["guidance_mask"] & (images_BT != (part == "image"))).any()


def test_variance_within_is_zero_for_equal_views_and_between_for_equal_samples(data: Path) -> None:
    plain, samples = model(), [s for s in read_samples(data / "test.jsonl") if s.family == "name"]
    pictures = [Image.open(sample.images[0]).convert("RGB") for sample in samples]
    prompts = [sample.request(4) for sample in samples]
    same_views = variances(plain, [[picture] * 2 for picture in pictures], prompts)
    assert {name: len(layers) for name, layers in same_views.items()} == {"language": 4, "visual": 2}
    assert all(layer["within"] < 1e-9 and layer["between"] > 1e-9 for layers in same_views.values() for layer in layers)
    same_samples = variances(
        plain, [pictures[:3]] * 4, [prompts[0]] * 1 + [type(p)(f"x{i}", prompts[0].turns, ()) for i, p in enumerate(prompts[:3])]
    )
    assert all(layer["between"] < 1e-9 and layer["within"] > 1e-9 for layers in same_samples.values() for layer in layers)


def test_ablate_writes_a_table_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = model()
    folder = tmp_path / "model"
    single.network.save_pretrained(folder)
    single.processor.save_pretrained(folder)
    suite = load_suite(ROOT / "eval" / "suites" / "cmt-open.yaml")
    samples, train = read_samples(data / "test.jsonl"), read_samples(data / "train.jsonl")
    text = ablate(folder, single, suite, samples, train, tmp_path / "out", batch_size=8)
    assert all(f"| {name} |" in text for name in CONDITIONS) and (tmp_path / "out" / "ablate.png").stat().st_size > 1000
    found = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert found["conditions"]["own"]["loss_difference"]["Macro"]["mean"] == 0.0
    assert found["conditions"]["zero"]["loss_difference"]["Macro"]["mean"] != 0.0
    monkeypatch.setattr(Recoded, "_answer", lambda *_: pytest.fail("answered again"))
    monkeypatch.setattr(Recoded, "losses", lambda *_: pytest.fail("computed again"))
    assert ablate(folder, single, suite, samples, train, tmp_path / "out", batch_size=8) == text
    fewer = ablate(folder, single, suite, samples, train, tmp_path / "out", batch_size=8, chosen=("mean",))
    assert [name for name in CONDITIONS if f"| {name} |" in fewer] == ["own", "mean"]
    with pytest.raises(ValueError, match=r"no condition \['means'\] .*there are own, "):
        ablate(folder, single, suite, samples, train, tmp_path / "out", batch_size=8, chosen=("means",))
    with pytest.raises(ValueError, match="no hypernetwork to ablate"):
        ablate(folder, model(mode="static"), suite, samples, train, tmp_path / "other", batch_size=8)
