"""Which samples share a micro-batch, and which of those a row: worked out from lengths alone, so that it can be measured beforehand.

What is cut here is one rank's share of one optimiser step. A plan is a list of micro-batches, each a list of rows, each a list of the
share's indices. However a share is cut, its loss and gradient are the same; what differs is how many positions are padding.

Packed or not, a share of n samples gives ceil(n / size) micro-batches of at most `size` samples. So ranks with equal shares run equally
many forward passes, which engines that shard the model need (all ranks run one together), and there are no more generated expert
weights in memory. A packed micro-batch never has more positions than the same samples have one a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

Plan = list[list[list[int]]]
SLACK = 0.05  # share of padding that packed rows may keep


def one_a_row(lengths: Sequence[int], size: int) -> Plan:
    """Sorted by length, so that a micro-batch's rows are alike."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [[[index] for index in order[k : k + size]] for k in range(0, len(order), size)]


def packed(lengths: Sequence[int], size: int, longest_row: int) -> Plan:
    """Dealt out by length, so that every micro-batch has long and short samples to put together; rows of at most `longest_row` positions.

    Raises ValueError for a sample that is longer than that.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and lengths[order[0]] > longest_row:
        raise ValueError(f"a sample of {lengths[order[0]]} tokens does not fit into a row of {longest_row}")
    count = -(-len(order) // size)
    return [_rows(lengths, order[k::count], longest_row) for k in range(count)]


def positions(lengths: Sequence[int], plan: Plan) -> int:
    """Tokens and padding of all micro-batches: rows times the longest row."""
    return sum(len(rows) * _width(lengths, rows) for rows in plan)


def padding_share(shares: Iterable[tuple[Sequence[int], Plan]]) -> float:
    """The part of all positions that is padding, of (lengths, plan) pairs; 0 where there are no positions at all."""
    tokens = total = 0
    for lengths, plan in shares:
        tokens += sum(lengths)
        total += positions(lengths, plan)
    return 1 - tokens / total if total else 0.0


def _rows(lengths: Sequence[int], order: Sequence[int], longest_row: int) -> list[list[int]]:
    """The shortest rows that are not padding by more than SLACK, else the least padded ones.

    Short, because attention with a mask works on a row times itself, other samples included.
    """
    tokens = sum(lengths[index] for index in order)
    best = [[index] for index in order]
    least = len(best) * _width(lengths, best)
    for count in range(len(order) - 1, 0, -1):
        if tokens >= (1 - SLACK) * least:
            break
        rows = _even_rows(lengths, order, count)
        width = _width(lengths, rows)
        if width > longest_row:
            break
        if count * width < least:
            best, least = rows, count * width
    return best


def _even_rows(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of nearly the same length: each sample, longest first, goes to the row that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, row) for row in range(count)]
    for index in order:
        length, row = shortest[0]
        rows[row].append(index)
        heapq.heapreplace(shortest, (length + lengths[index], row))
    return rows


def _width(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[index] for index in row) for row in rows)
