"""`ask`: put one batch to a model so that a bad sample costs itself, too little memory time, and a programming error the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from ..data.conversation import SampleError
from ..types import Answer, Model, Request, ScoringModel

Verb = Literal["generate", "score"]

_log = logging.getLogger(__name__)


def ask(model: Model, requests: Sequence[Request], verb: Verb = "generate") -> list[Answer]:
    """One answer a request, in order, by the model's method `verb`.

    A model answers its bad requests with `Answer.error`. One that raises instead is asked again: one by one for what a sample can be at
    fault for (SampleError; OSError, as of a picture that can't be read), in halves where memory ran out. A request that fails alone gets
    an answer with `error`. Everything else is a fault of the program, and is raised.

    Raises ValueError for a model that gives another number of answers, or is to score and can't.
    """
    if not requests:
        return []
    if verb == "score" and not isinstance(model, ScoringModel):
        raise ValueError(f"{model.name} gives no probabilities of choices; only a model with `score` can be asked for them")
    try:
        answers = getattr(model, verb)(requests)
    except (SampleError, OSError) as error:
        fault, step = f"{type(error).__name__}: {error}", 1
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        fault, step = f"out of memory, asked alone: {error}", (len(requests) + 1) // 2
    else:
        if len(answers) != len(requests):
            raise ValueError(f"{model.name} gave {len(answers)} answers to {len(requests)} requests; a Model gives one each, in order")
        return list(answers)
    if len(requests) == 1:
        return [Answer("", model=model.name, error=fault)]
    _log.warning("a batch of %d failed (%s); it is asked again in pieces of %d", len(requests), fault.split("\n")[0], step)
    return [answer for at in range(0, len(requests), step) for answer in ask(model, requests[at : at + step], verb)]


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether less at once could help; if so, the device's cache is emptied first."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
        return False
    error.__traceback__ = None  # its frames hold the batch that did not fit
    clear_device_cache(garbage_collection=True)
    return True
