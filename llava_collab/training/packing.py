"""Whether a run packs several samples into one row: asked for, or because too many positions are padding after grouping by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from llava_collab.data.packing import one_a_row, packed, padding_share
from llava_collab.data.sampler import GroupedBatchSampler
from llava_collab.models.packing import unpackable
from llava_collab.training.recipe import Recipe, RecipeError

THRESHOLD = 0.10  # share of padding after grouping above which `data.packing: auto` packs
STEPS = 200  # of the first epoch are measured; their order is random but for the first


def decide(recipe: Recipe, sampler: GroupedBatchSampler, ranks: int, text_config: Any, say: Callable[[str], None]) -> int | None:
    """The longest row of several samples, or None for one sample a row; says what was measured.

    Lengths, seed and number of ranks decide, so all ranks decide the same and so does a resumed run.
    Raises RecipeError where packing is asked for and the decoder can't.
    """
    if recipe.data.packing == "off":
        return None
    if (trouble := unpackable(text_config)) is not None:
        raise RecipeError(f"data.packing: {recipe.data.packing} is not possible here: {trouble}. Set data.packing to off.")
    shares = list(_shares(sampler, ranks))
    size, longest = recipe.run.micro_batch_size, recipe.data.max_length
    grouped = padding_share((lengths, one_a_row(lengths, size)) for lengths in shares)
    measured = (
        f"of {min(STEPS, len(sampler)):,} steps of the first epoch {grouped:.1%} of all positions are padding after grouping by length"
    )
    if recipe.data.packing == "auto" and grouped <= THRESHOLD:
        say(f"packing: off (auto): {measured}, no more than {THRESHOLD:.0%}")
        return None
    left = padding_share((lengths, packed(lengths, size, longest)) for lengths in shares)
    say(f"packing: on{' (auto)' if recipe.data.packing == 'auto' else ''}: {measured}, {left:.1%} in packed rows")
    return longest


def _shares(sampler: GroupedBatchSampler, ranks: int) -> Iterator[list[int]]:
    """Lengths of every rank's share of the first steps."""
    for step in islice(sampler.batches(0), STEPS):
        for rank in range(ranks):
            yield [int(sampler.lengths[index]) for index in step[rank::ranks]]
