"""Language models as text classifiers: kept states are the network's own, and what is saved is what transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from llava_collab.collab.classifier import Classifier, UpperBlocks, encode
from llava_collab.collab.distill import Distiller, Targets
from llava_collab.models.tiny import tiny_decoder, tiny_tokenizer
from llava_collab.types import Request, Turn

TEXTS = ["the cat sat on a red mat", "left", "a dog and a tree, on the right of the blue square", "What is in the picture?"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_decoder()).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_upper_blocks_on_kept_states_are_the_whole_network(base: Path) -> None:
    student = UpperBlocks(base, ["a", "b", "c"], learning=2, tokens=16).eval()
    student.keep(TEXTS, batch_size=3)
    with torch.no_grad():
        ours = student([2, 0, 1])
        whole = student.network(**encode(student.tokenizer, [TEXTS[k] for k in (2, 0, 1)], 16)).logits
    assert torch.allclose(ours, whole, atol=0.02)  # states are kept in bfloat16
    assert len(student.network.model.layers) == 4
    learns = {name.split(".layers.")[1].split(".")[0] for name, p in student.named_parameters() if p.requires_grad and ".layers." in name}
    assert learns == {"2", "3"}
    with pytest.raises(ValueError, match="has 4 blocks"):
        UpperBlocks(base, ["a", "b"], learning=5, tokens=8)


def test_it_learns_and_is_read_by_transformers(base: Path, tmp_path: Path) -> None:
    student = UpperBlocks(base, ["a", "b"], learning=1, tokens=16)
    student.keep(TEXTS)
    Distiller(steps=40, batch_size=4, lr=5e-3).fit(student, range(4), Targets(torch.tensor([0, 1, 0, 1])), quiet=True)
    student.save(tmp_path / "out")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "a", 1: "b"}
    leaf = Classifier(tmp_path / "out", "leaf", bf16=False)
    asked = [Request(str(k), (Turn("user", text),), choices=("b", "a")) for k, text in enumerate(TEXTS)]
    answers = leaf.score(asked)
    assert [answer.text for answer in answers] == ["a", "b", "a", "b"]
    for one, answer in zip(asked, answers, strict=True):  # padding does not matter
        assert leaf.score([one])[0].scores == pytest.approx(answer.scores, abs=1e-5)
        assert answer.usage.flops == 2.0 * leaf.parameters * answer.usage.prompt_tokens and answer.usage.prompt_tokens <= 16
    assert leaf.score([Request("r", asked[0].turns, choices=("a", "z"))])[0].scores == (1.0, 0.0)
    assert "none of leaf's 2 labels" in str(leaf.score([Request("r", asked[0].turns, choices=("y", "z"))])[0].error)
