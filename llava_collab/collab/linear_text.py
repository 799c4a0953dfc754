"""Linear classifiers of texts: naive Bayes and TF-IDF with logistic regression. Small, quick, and with probabilities.

Both are one matrix over counted words, so one class holds them, one file (safetensors + JSON) stores them, and the distiller can go on
from them (`Linear` gives the matrix to torch). scikit-learn fits them. Shapes: M texts, W words, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from ..files import read_json, write_bytes, write_json
from ..types import Answer, Request, Usage
from .gates import Floats
from .single import check_choices, chosen

KINDS = ("naive-bayes", "tfidf-lr")


@dataclass
class LinearText:
    """A `ScoringModel`: softmax(x W^T + b) over the labels, x the request's TF-IDF (1 + log count, times `scale_W` = idf, length 1).

    Naive Bayes reads TF-IDF too: on plain counts it is sure of nearly everything, and a gate learns nothing from that. Scores of a request
    are those of its choices; one that it was never shown has 0.
    """

    name: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    scale_W: Floats
    weight_CW: Floats
    bias_C: Floats

    def __post_init__(self) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        self._counter = CountVectorizer(vocabulary={word: k for k, word in enumerate(self.words)})
        self._column = {label: k for k, label in enumerate(self.labels)}

    def features(self, texts: Sequence[str]) -> Any:
        """Sparse [M,W]."""
        from sklearn.preprocessing import normalize

        counts_MW = self._counter.transform(texts).astype(np.float64)
        counts_MW.data = 1.0 + np.log(counts_MW.data)
        return normalize(counts_MW.multiply(self.scale_W).tocsr())

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """[M,C]"""
        logits_MC = np.asarray(self.features(texts) @ self.weight_CW.T) + self.bias_C
        exp_MC = np.exp(logits_MC - logits_MC.max(1, keepdims=True))
        return exp_MC / exp_MC.sum(1, keepdims=True)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The likeliest choice; of a request without choices, the likeliest label."""
        start = time.perf_counter()
        p_MC = self.probabilities([request.text for request in requests])
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        return [self._answer(request, p_C, seconds) for request, p_C in zip(requests, p_MC, strict=True)]

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """See `types.ScoringModel`."""
        for request in requests:
            check_choices(request)
        return self.generate(requests)

    def _answer(self, request: Request, p_C: Floats, seconds: float) -> Answer:
        words = len(request.text.split())
        usage = Usage(1, 0, words, 0, 2.0 * len(self.labels) * words, seconds)
        if not request.choices:
            return Answer(self.labels[int(p_C.argmax())], usage, self.name, likelihood=float(p_C.max()))
        known = [choice for choice in request.choices if choice in self._column]
        if not known:
            reason = f"{request.id}: {request.choices[0]!r} and its other choices are none of {self.name}'s {len(self.labels)} labels"
            return Answer("", usage, self.name, error=reason)
        own = dict(zip(known, p_C[[self._column[choice] for choice in known]] + 1e-300, strict=True))  # all may be 0 in double precision
        total = sum(own.values())
        return chosen(request, [float(own.get(choice, 0.0) / total) for choice in request.choices], usage, self.name)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `model.json`."""
        tensors = {"scale": self.scale_W, "weight": self.weight_CW, "bias": self.bias_C}
        write_bytes(folder / "model.safetensors", save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))
        write_json(folder / "model.json", {"name": self.name, "labels": list(self.labels), "words": list(self.words)})


class Linear(torch.nn.Module):
    """A `LinearText` as a module to train: logits [M,C] of texts; `back` puts what was learnt into a copy of the model."""

    def __init__(self, model: LinearText) -> None:
        super().__init__()
        self.model = model
        self.weight_WC = torch.nn.Parameter(torch.tensor(model.weight_CW.T, dtype=torch.float32).contiguous())
        self.bias_C = torch.nn.Parameter(torch.tensor(model.bias_C, dtype=torch.float32))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """[M,C]"""
        rows = self.model.features(texts).tocsr()
        bags = (torch.tensor(rows.indices, dtype=torch.int64), torch.tensor(rows.indptr[:-1], dtype=torch.int64))
        weights = torch.tensor(rows.data, dtype=torch.float32)
        return torch.nn.functional.embedding_bag(bags[0], self.weight_WC, bags[1], mode="sum", per_sample_weights=weights) + self.bias_C

    def back(self, name: str) -> LinearText:
        model = self.model
        weight_CW = self.weight_WC.detach().T.double().numpy()
        return LinearText(name, model.labels, model.words, model.scale_W, weight_CW, self.bias_C.detach().double().numpy())


def fit_linear_text(
    kind: str,
    texts: Sequence[str],
    labels: Sequence[str],
    name: str,
    *,
    words: int | None = None,
    smoothing: float = 0.01,
    strength: float = 100.0,
    seed: int = 0,
) -> LinearText:
    """Fit one of KINDS over the `words` most frequent words (None: all; of logistic regression those of two texts or more).

    `smoothing` is alpha of naive Bayes, `strength` C of the logistic regression. Raises ValueError for another kind or a single label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB

    known = tuple(sorted(set(labels)))
    if kind not in KINDS or len(known) < 2:
        raise ValueError(f"kind has to be one of {', '.join(KINDS)} and there have to be two labels or more, got {kind!r} and {known[:3]}")
    model = empty_linear_text(texts, known, name, words=words, least=2 if kind == "tfidf-lr" else 1)
    rows_MW, index_M = model.features(texts), np.array([known.index(label) for label in labels])
    if kind == "naive-bayes":
        bayes = MultinomialNB(alpha=smoothing).fit(rows_MW, index_M)
        model.weight_CW, model.bias_C = bayes.feature_log_prob_, bayes.class_log_prior_
        return model
    fitted: Any = LogisticRegression(C=strength, max_iter=1000, random_state=seed).fit(rows_MW, index_M)
    two = len(known) == 2  # scikit-learn keeps one row then
    model.weight_CW = np.concatenate([np.zeros_like(fitted.coef_), fitted.coef_]) if two else fitted.coef_
    model.bias_C = np.concatenate([[0.0], fitted.intercept_]) if two else fitted.intercept_
    return model


def empty_linear_text(texts: Sequence[str], labels: Sequence[str], name: str, *, words: int | None = None, least: int = 2) -> LinearText:
    """A model that knows nothing yet (zero weights): the `words` most frequent words of `texts`, each in `least` of them or more."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(min_df=least, max_features=words)
    counts_MW: Any = counter.fit_transform(texts)
    seen_W = np.asarray((counts_MW > 0).sum(0)).ravel()
    vocabulary = tuple(str(word) for word in counter.get_feature_names_out())
    idf_W = np.log((1 + len(texts)) / (1 + seen_W)) + 1.0
    return LinearText(name, tuple(sorted(labels)), vocabulary, idf_W, np.zeros((len(labels), len(vocabulary))), np.zeros(len(labels)))


def load_linear_text(folder: Path) -> LinearText:
    """What `save` wrote. Raises ValueError that names the file where it is not that."""
    try:
        about, tensors = read_json(folder / "model.json"), load_file(folder / "model.safetensors")
        labels, words = tuple(about["labels"]), tuple(about["words"])
        scale_W, weight_CW, bias_C = (tensors[key] for key in ("scale", "weight", "bias"))
        if weight_CW.shape != (len(labels), len(words)) or scale_W.shape != (len(words),) or bias_C.shape != (len(labels),):
            raise ValueError(f"shapes {weight_CW.shape}, {scale_W.shape}, {bias_C.shape} for {len(labels)} labels and {len(words)} words")
        return LinearText(about["name"], labels, words, scale_W, weight_CW, bias_C)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a stored text classifier ({type(error).__name__}: {error}); fit it anew") from error


def right_indices(labels: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """[M] columns of the right labels; -1 for a label that the model does not know, which is always wrong."""
    column = {label: k for k, label in enumerate(known)}
    return np.array([column.get(label, -1) for label in labels])
