"""`Builder`: a recipe's models and systems, made; what has to be found on held-out data is found, stored, and serves without the data.

FOLDER/answers/NAME.jsonl                 what a leaf answered, kept
FOLDER/fitted/NAME/                       a leaf that was fitted to the task's texts
FOLDER/found/NAME.json                    temperature, strong choices and prior's weight of a system
FOLDER/thresholds/NAME.json, NAME.router.safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import model_sha256, read_json, write_json
from ..types import Answer, Model, Request
from .asking import ask
from .classifier import Classifier
from .compose import Ensemble, Route, Shunt
from .distill import Distiller, Labeler, Targets, WeakToStrong, two_stage_confidence
from .endpoint import REMOTE_KEY, Client
from .gates import Confidence, Floats, Gate, Oracle, Random, fit_temperature
from .hints import Hard, Hint, Soft, Transfer, strong_choices
from .linear_text import Linear, LinearText, empty_linear_text, fit_linear_text, load_linear_text, right_indices
from .proxy import Proxy
from .recipe import CollabError, Recipe, Task, budget_of, file_name, gate_of, hint_of, parts_of
from .recorded import Recorded
from .remote import Remote
from .router import Draft, Features, HashedText, Joined, PooledState, Router, fit_router, load_router
from .single import Single, open_single
from .thresholds import ALL_LARGE, Threshold, choose_threshold, load_threshold, threshold_for_traffic

_PATIENCE = {"timeout", "attempts", "parallel"}
"""Settings that decide no answer."""


class Builder:
    """Makes the models and systems of a recipe, each once.

    `folder` keeps the leaves' answers (unless not `keep_answers`), what was fitted and what was found; None keeps nothing. Without a task
    all that is read from there (`seed`: of the task that it was found on). `tools` are further kinds of leaves: kind -> (name, settings)
    -> model.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        task: Task | None = None,
        folder: Path | None = None,
        keep_answers: bool = True,
        tools: Mapping[str, Callable[[str, Mapping[str, Any]], Model]] | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.seed = task.seed if task else seed
        self.recipe, self.task, self.folder, self.tools = recipe, task, folder, tools or {}
        self.device, self.batch_size = device, batch_size
        self.keep_answers = keep_answers
        self.thresholds: dict[str, Threshold] = {}
        self._made: dict[str, Model] = {}
        self._bare: dict[str, Model] = {}
        self._identities: dict[str, str] = {}
        self._making: list[str] = []

    def model(self, name: str) -> Model:
        """The model or system of this name. Raises CollabError for an unknown name, a circle, and what can't be made."""
        if name not in self._made:
            if name in self._making:
                raise CollabError(f"{self.recipe.name}: {' -> '.join([*self._making, name])} is a circle")
            self._making.append(name)
            try:
                self._check_stored(name)
                if name in self.recipe.systems:
                    self._made[name] = self._system(name, self.recipe.systems[name])
                elif name in self.recipe.models:
                    self._made[name] = self._recorded(name, self._leaf(name))
                else:
                    raise CollabError(
                        f"{self.recipe.name}: no model {name!r}; there are {', '.join([*self.recipe.models, *self.recipe.systems])}"
                    )
            finally:
                self._making.pop()
        return self._made[name]

    def _check_stored(self, name: str) -> None:
        """Without a task, what is in the folder has to be of this recipe and its data; with one, say what is found from here on."""
        path = self._found_path(name)
        if self.task is None and path is not None and path.is_file():
            kept = read_json(path)
            if (kept.get("spec"), kept.get("data")) != (self._spec(name), dict(self.recipe.data)):
                reason = f"was found with other settings or data than {self.recipe.name} has"
                raise CollabError(f"{self.folder}: {name!r} {reason}; run eval/system.py again")
        elif self.task is not None and path is not None:
            write_json(path, {"spec": self._spec(name), "data": dict(self.recipe.data)})

    def _spec(self, name: str) -> Mapping[str, Any] | None:
        return self.recipe.models.get(name) or self.recipe.systems.get(name)

    def _found_path(self, name: str) -> Path | None:
        return self.folder / "found" / f"{file_name(name)}.json" if self.folder else None

    def identity(self, name: str) -> str:
        """What decides a model's answers: its settings, the bytes of its weights, what it found, and all that of its parts."""
        if name not in self._identities:
            self.model(name)
            spec = self.recipe.models.get(name) or self.recipe.systems[name]
            content: list[Any] = [{key: value for key, value in spec.items() if key not in _PATIENCE}]
            bare = self._bare.get(name)
            if isinstance(bare, LinearText):
                content += [bare.labels, hashlib.sha256(bare.weight_CW.tobytes()).hexdigest()]
            elif "path" in spec:
                content.append(model_sha256(Path(self._path(spec))) if Path(self._path(spec)).is_dir() else spec["path"])
            names = self.recipe.models.keys() | self.recipe.systems.keys()
            content += [self.identity(part) for part in parts_of(spec) if part in names]
            if (threshold := self.thresholds.get(name)) is not None:
                content += [threshold.value, dict(threshold.of)]
            self._identities[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return self._identities[name]

    def _path(self, spec: Mapping[str, Any]) -> str:
        """A leaf's path; `{seed}` in it is the seed, for leaves that were trained on the task's own texts."""
        return str(spec["path"]).replace("{seed}", str(self.seed))

    def _recorded(self, name: str, model: Model) -> Model:
        self._bare[name] = self._made[name] = model
        if self.folder is None or not self.keep_answers:
            return model
        identity = self.identity(name)
        if self.recipe.models.get(name, {}).get("kind") in self.tools and self.task is not None:
            identity += f" {self.task.learnt_from}"
        return Recorded(model, self.folder / "answers" / f"{file_name(name)}.jsonl", identity, self.batch_size)

    def _leaf(self, name: str) -> Model:
        spec = dict(self.recipe.models[name])
        kind = spec.pop("kind")
        if kind in self.tools:
            return self.tools[kind](name, spec)
        if kind == "network":
            dtype = None if spec.get("dtype") is None else getattr(torch, spec["dtype"])
            single = open_single(self._path(spec), name, device=self.device, dtype=dtype, template=spec.get("template"))
            if spec.get("feature_cache") and self.task is not None:  # without a task pictures come as they come
                from ..models.build import feature_cache

                if not hasattr(single.processor, "feature_cache"):
                    raise CollabError(f"{name}: feature_cache is for LLaVA models; leave it out")
                asked = [*self.task.tuning, *self.task.validation, *self.task.test]
                images = [image for request in asked for image in request.images]
                single.processor.feature_cache = feature_cache(single.network, single.processor, images, self.batch_size)
            return single
        if kind == "classifier":
            return Classifier(self._path(spec), name, device=self.device, bf16=bool(spec.get("bf16", True)))
        if kind == "remote":
            client = Client(
                spec["endpoint"], spec["model"], timeout=spec.get("timeout", 60.0), attempts=spec.get("attempts", 3), key=REMOTE_KEY
            )
            return Remote(client, name, spec.get("price_in", 0.0), spec.get("price_out", 0.0), spec.get("parallel", 8))
        folder = self.folder / "fitted" / file_name(name) if self.folder else None
        if self.task is None and folder is not None and folder.is_dir():
            return load_linear_text(folder)
        task = self._needs_task(name, "is fitted to labelled texts")
        if kind == "two-stage":
            fitted = self._taught(name, task, spec)
        else:
            fitted = self._distilled(name, task, spec) if kind == "distilled" else self._fitted(name, kind, task, spec)
        if folder is not None:
            fitted.save(folder)
        return fitted

    def _fitted(self, name: str, kind: str, task: Task, spec: Mapping[str, Any]) -> LinearText:
        requests, labels = [request for request, _ in task.fit], [label for _, label in task.fit]
        own = {key: value for key, value in spec.items() if key not in ("hinted_by", "folds")}
        if "hinted_by" in spec:  # it learns to read hints from drafts of models that have not seen the text
            requests = self._hinted(requests, labels, task, dict(self.recipe.models[spec["hinted_by"]]), int(spec.get("folds", 5)))
        return fit_linear_text(kind, [request.text for request in requests], labels, name, seed=task.seed, **own)

    def _hinted(self, requests: Sequence[Request], labels: Sequence[str], task: Task, spec: dict[str, Any], folds: int) -> list[Request]:
        fold_M = np.random.default_rng(task.seed).permutation(len(requests)) % folds
        kind, told = spec.pop("kind"), list(requests)
        for fold in range(folds):
            known, fresh = np.flatnonzero(fold_M != fold).tolist(), np.flatnonzero(fold_M == fold).tolist()
            small = fit_linear_text(kind, [requests[k].text for k in known], [labels[k] for k in known], "fold", seed=task.seed, **spec)
            asked = [replace(requests[k], choices=small.labels) for k in fresh]
            for k, hinted in zip(fresh, Soft()(asked, small.score(asked))[0], strict=True):
                told[k] = requests[k].asking(hinted.text)
        return told

    def _taught(self, name: str, task: Task, spec: Mapping[str, Any]) -> LinearText:
        """2CD on the task's unlabelled requests."""
        self.model(spec["student"])
        student, teacher = self._bare[spec["student"]], self.model(spec["teacher"])
        if not isinstance(student, LinearText):
            raise CollabError(f"{name}: the student of two-stage distillation has to be a linear text model, not {spec['student']!r}")
        small_MC, large_MC = (distributions(model, task.unlabelled) for model in (student, teacher))
        order = [task.unlabelled[0].choices.index(label) for label in student.labels]
        limits = {"small_sure": spec.get("small_sure", 0.9), "large_sure": spec.get("large_sure", 0.9)}
        labeler = two_stage_confidence(small_MC[:, order], large_MC[:, order], rehearsal=spec.get("rehearsal", 1.0), **limits)
        module = Linear(student)
        distiller = Distiller(spec.get("steps", 300), 64, lr=spec.get("lr", 0.01), seed=task.seed)
        distiller.fit(module, [request.text for request in task.unlabelled], labeler, quiet=True)
        return module.back(name)

    def _distilled(self, name: str, task: Task, spec: Mapping[str, Any]) -> LinearText:
        """A linear student over all words, of the teacher's distributions on the unlabelled requests; without a teacher of their labels.

        With `alpha` by weak-to-strong's confidence loss, else by plain distillation.
        """
        texts, choices = [request.text for request in task.unlabelled], task.unlabelled[0].choices
        student = empty_linear_text(texts, choices, name, words=spec.get("words"))
        order = [choices.index(label) for label in student.labels]
        if "teacher" in spec:
            targets_MC = distributions(self.model(spec["teacher"]), task.unlabelled)[:, order]
            labeler: Labeler = WeakToStrong(targets_MC, spec["alpha"], spec.get("warmup", 0.2)) if "alpha" in spec else Targets(targets_MC)
        else:
            labeler = Targets(torch.tensor(right_indices([task.right[request.id] for request in task.unlabelled], student.labels)))
        module = Linear(student)
        Distiller(spec.get("steps", 600), 64, lr=spec.get("lr", 0.05), seed=task.seed).fit(module, texts, labeler, quiet=True)
        return module.back(name)

    def _system(self, name: str, spec: Mapping[str, Any]) -> Model:
        kind, settings = next(iter(spec.items()))
        if kind == "ensemble":
            return Ensemble(tuple(self.model(part) for part in settings["models"]), name)
        if kind == "proxy":
            for part in ("base", "expert", "anti"):
                self.model(settings[part])
            base, expert, anti = (self._bare[settings[part]] for part in ("base", "expert", "anti"))
            if not (isinstance(base, Single) and isinstance(expert, Single) and isinstance(anti, Single)):
                raise CollabError(f"{name}: a proxy is made of networks, whose logits can be had")
            return self._recorded(name, Proxy(base, expert, anti, settings.get("alpha", 1.0), name))
        small, large = self.model(settings["small"]), self.model(settings["large"])
        gate = self._gate(name, settings)
        rest = {"name": name, "degrade": bool(settings.get("degrade", False))}
        if kind == "route":
            return self._tuned(Route(small, large, gate, ALL_LARGE, **rest), settings)
        bare = Shunt(small, large, gate, ALL_LARGE, **rest)
        return self._tuned(self._hinting(bare, settings), settings)

    def _gate(self, name: str, settings: Mapping[str, Any]) -> Gate:
        spec = gate_of(name, settings)
        kind = spec["kind"]
        if kind in ("max", "margin", "entropy"):
            if not spec.get("calibrate"):
                return Confidence(kind)
            fit = partial(self._temperature, settings["small"])
            return Confidence(kind, self._found(name, "temperature", "has a gate that is calibrated", fit))
        if kind == "random":
            return Random(int(spec.get("seed", self.seed)))
        if kind == "oracle":
            task = self._needs_task(name, "has an oracle for a gate")
            asked = [*task.tuning, *task.validation, *task.test]
            gains = self._quality(settings["small"], asked) - self._quality(settings["large"], asked)
            return Oracle({request.id: float(gain) for request, gain in zip(asked, gains, strict=True)})
        if kind in ("deterministic", "probabilistic", "transformed"):
            features = self._features(name, spec.get("features", "text"))
            if "path" in spec:
                return load_router(Path(spec["path"]), features)
            path = self.folder / f"{file_name(name)}.router.safetensors" if self.folder else None
            if self.task is None and path is not None and path.is_file():
                return load_router(path, features)
            task = self._needs_task(name, "learns a router")
            answers = [ask(self.model(settings[part]), task.tuning, task.verb) for part in ("small", "large")]
            fine = [k for k in range(len(task.tuning)) if all(given[k].error is None for given in answers)]
            learn = [task.tuning[k] for k in fine]
            small_M1, large_M1 = (qualities(task, learn, [given[k] for k in fine])[:, None] for given in answers)
            drafts = [answers[0][k] for k in fine] if features.reads == "draft" else []
            options = {"epochs": int(spec.get("epochs", 40)), "seed": task.seed}
            router = fit_router(kind, features, learn, small_M1, large_M1, drafts=drafts, **options)
            if path is not None:
                router.save(path)
            return router
        raise AssertionError(kind)  # gate_of knows the others

    def _features(self, name: str, kind: str | list[str]) -> Features:
        if isinstance(kind, list):
            return Joined([self._features(name, one) for one in kind])
        if kind in ("text", "draft"):
            return HashedText() if kind == "text" else Draft()
        if kind not in self.recipe.models:
            raise CollabError(
                f"{name}: features are `text`, `draft`, a network whose state over the prompt is read, or a list of these, not {kind!r}"
            )
        self.model(kind)
        network = self._bare[kind]
        if not isinstance(network, Single):
            raise CollabError(f"{name}: {kind!r} is no network, so it has no state to read")
        return PooledState(network)

    def _found(self, name: str, what: str, why: str, find: Callable[[Task], Any]) -> Any:
        """What `find` finds on the task's data, kept in the folder; without a task, what was kept there."""
        path = self._found_path(name)
        kept = read_json(path) if path is not None and path.is_file() else {}
        if self.task is None and what in kept:
            return kept[what]
        value = find(self._needs_task(name, why))
        if path is not None:
            write_json(path, kept | {what: value})
        return value

    def _temperature(self, small: str, task: Task) -> float:
        answers = ask(self.model(small), task.tuning, task.verb)
        fine = [(r, a) for r, a in zip(task.tuning, answers, strict=True) if a.scores is not None and task.right.get(r.id) in r.choices]
        if not fine:
            raise CollabError(f"a gate that is calibrated needs scores and right choices, and {small!r} or the task gives none")
        return fit_temperature(np.array([a.scores for _, a in fine]), np.array([r.choices.index(task.right[r.id]) for r, _ in fine]))

    def _hinting(self, bare: Shunt, settings: Mapping[str, Any]) -> Shunt:
        spec = hint_of(bare.name, settings)
        if spec["kind"] == "none":
            return bare
        if spec["kind"] == "prior":
            weight = spec.get("weight")
            if weight is None:
                weight = self._found(bare.name, "prior", "has a prior whose weight is fitted", partial(self._prior, bare))
            return replace(bare, prior=float(weight))
        return replace(bare, hint=self._hint(bare, settings, spec))

    def _prior(self, bare: Shunt, task: Task) -> float:
        """The weight of the small model's distribution at which the large model is best on the third of the tuning requests that the gate
        is least sure of; of equals the smallest."""
        found = []
        for weight in (0.0, 0.1, 0.2, 0.3, 0.5):
            confidence_M, _, large_M = both_ways(replace(bare, prior=weight), task, task.tuning)
            found.append((-float(large_M[np.argsort(confidence_M, kind="stable")[: len(large_M) // 3]].mean()), weight))
        return min(found)[1]

    def _hint(self, bare: Shunt, settings: Mapping[str, Any], spec: Mapping[str, Any]) -> Hint:
        name = bare.name
        if spec["kind"] == "soft":
            return Soft(int(spec.get("top", 3)))
        if spec["kind"] == "transfer":
            own = {key: spec[key] for key in ("question", "template") if key in spec}
            return Transfer(self.model(spec["model"]), **own)
        find = partial(self._strong, bare, settings, spec)
        return Hard(frozenset(self._found(name, "strong", "prunes choices that its small model is good at", find)))

    def _strong(self, bare: Shunt, settings: Mapping[str, Any], spec: Mapping[str, Any], task: Task) -> list[str]:
        scores_MN = distributions(self.model(settings["small"]), task.tuning).double().numpy()
        choices = task.tuning[0].choices
        right = [choices.index(task.right[request.id]) if task.right[request.id] in choices else -1 for request in task.tuning]
        sure = spec.get("sure", 0.9)
        if sure == "threshold":  # what the small model would have answered itself depends on the shunt's own threshold
            budget = budget_of(bare.name, settings)
            if not isinstance(budget, dict) or "traffic" not in budget:
                raise CollabError(f"{bare.name}: `sure: threshold` needs a threshold that does not depend on the hint, {{traffic: SHARE}}")
            sure = threshold_for_traffic(confidences(bare, task, task.test), float(budget["traffic"]))
        return sorted(strong_choices(scores_MN, right, choices, float(sure), float(spec.get("share", 0.9))))

    def _tuned(self, pair: Shunt | Route, settings: Mapping[str, Any]) -> Model:
        spec = budget_of(pair.name, settings)
        if isinstance(spec, int | float):
            return replace(pair, threshold=float(spec))
        hint, prior = getattr(pair, "hint", None), getattr(pair, "prior", 0.0)
        names = self.recipe.models.keys() | self.recipe.systems.keys()
        rest = {key: value for key, value in settings.items() if key not in ("small", "large")}
        others = [self.identity(part) for part in parts_of(rest) if part in names]
        of = {
            "gate": _told_apart(pair.gate),
            "small": self.identity(settings["small"]),
            "large": self.identity(settings["large"]),
            "hint": _told_apart(hint) if hint else f"prior {prior:g}" if prior else "none",
            "other models": " ".join(others),
            "data": json.dumps(dict(self.recipe.data)),
        }
        path = self.folder / "thresholds" / f"{file_name(pair.name)}.json" if self.folder else None
        if isinstance(spec, str):
            threshold = load_threshold(Path(spec), of)
        elif path is not None and self.task is None:
            threshold = load_threshold(path, of)
        else:
            task = self._needs_task(pair.name, "has a threshold that is chosen on validation data")
            columns = both_ways(pair, task, task.validation)
            if "traffic" in spec:
                value = threshold_for_traffic(confidences(pair, task, task.test), float(spec["traffic"]))
                threshold = Threshold.at(value, f"at most {spec['traffic']:.0%} of the traffic", *columns, of=of)
            else:
                threshold = choose_threshold(*columns, of=of, **spec)
            if path is not None:
                threshold.save(path)
        self.thresholds[pair.name] = threshold
        return replace(pair, threshold=threshold.value)

    def _quality(self, name: str, requests: Sequence[Request]) -> Floats:
        assert self.task is not None
        return qualities(self.task, requests, ask(self.model(name), requests, self.task.verb))

    def _needs_task(self, name: str, why: str) -> Task:
        if self.task is None:
            raise CollabError(
                f"{self.recipe.name}: {name!r} {why}, so it needs the recipe's data: run eval/system.py first, or fix it in the recipe"
            )
        return self.task


def qualities(task: Task, requests: Sequence[Request], answers: Sequence[Answer]) -> Floats:
    """[M] qualities; a failed answer's is 0."""
    pairs = zip(requests, answers, strict=True)
    return np.array([0.0 if answer.error is not None else task.quality(request.id, answer) for request, answer in pairs])


def distributions(model: Model, requests: Sequence[Request]) -> torch.Tensor:
    """Float [M,C] over the requests' choices. Raises CollabError where the model gave none."""
    answers = ask(model, requests, "score")
    if without := [answer for answer in answers if answer.scores is None]:
        why = without[0].error or "it names a choice and gives no probabilities"
        raise CollabError(
            f"{model.name}: no distribution for {len(without)} of {len(answers)} requests, which have to be learnt from ({why})"
        )
    return torch.tensor([answer.scores for answer in answers], dtype=torch.float32)


def confidences(pair: Shunt | Route, task: Task, requests: Sequence[Request]) -> Floats:
    """[M], without asking the large model anything."""
    drafts = ask(pair.small, requests, task.verb) if isinstance(pair, Shunt) else []
    return np.array(pair.gated(requests, drafts)[0])


def both_ways(pair: Shunt | Route, task: Task, requests: Sequence[Request]) -> tuple[Floats, Floats, Floats]:
    """Confidence, quality of the small and of the large answer (with its hint) to every request, [M] each: what a curve is made of."""
    large = ask(replace(pair, threshold=float("inf")), requests, task.verb)
    small = [answer.parts[0] for answer in large] if isinstance(pair, Shunt) else ask(pair.small, requests, task.verb)
    confidence = [float("-inf") if answer.confidence is None else answer.confidence for answer in large]
    return np.array(confidence), qualities(task, requests, small), qualities(task, requests, large)


def _told_apart(part: Gate | Hint) -> str:
    """A gate's or hint's name, with a digest of what it learnt; models that it asks are told apart by the threshold's other fields."""
    if isinstance(part, Router):
        content = f"{part.features.name} {part.bias} {part.weight_F.tolist()}"
    elif isinstance(part, Hard):
        content = str(sorted(part.strong))
    elif isinstance(part, Transfer):
        content = f"{part.question}|{part.template}|{part.least}"
    else:
        return part.name if isinstance(part, Oracle) else repr(part)
    return f"{part.name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"
