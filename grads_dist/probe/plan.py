"""The order in which rows are processed, computed once and the same for any number of ranks.

A plan is three flat arrays, so that 10^8 rows cost 800 MB and no Python objects: the rows in processing
order, cut into micro-batches, the micro-batches cut into groups. In train mode a group is an optimizer step;
in frozen mode it is a unit of work whose rows become one shard.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from grads_dist.table.spans import Span, gaps

WINDOW_SHARDS = 16
"""Frozen mode sorts rows by length within windows of this many shards: little padding, and shards in rough
corpus order."""


@dataclass(frozen=True)
class Plan:
    """Rows in processing order and where micro-batches and groups begin.

    `order` int64 [N]; `batch_offsets` int64 [M + 1] into `order`; `group_offsets` int64 [K + 1] into the
    micro-batches; `spans` int64 [K, 3], of a frozen plan: which rows of which unit a group is, as in `Span`.
    """

    order: np.ndarray
    batch_offsets: np.ndarray
    group_offsets: np.ndarray
    spans: np.ndarray | None = None

    @property
    def num_groups(self) -> int:
        """K, optimizer steps or units."""
        return len(self.group_offsets) - 1

    def batch(self, index: int) -> np.ndarray:
        """Rows of one micro-batch."""
        return self.order[self.batch_offsets[index] : self.batch_offsets[index + 1]]

    def batches_of(self, group: int) -> range:
        """Micro-batches of one group."""
        return range(int(self.group_offsets[group]), int(self.group_offsets[group + 1]))

    def rows_of(self, group: int) -> np.ndarray:
        """Rows of one group, in processing order."""
        start, stop = self.batch_offsets[self.group_offsets[group : group + 2]]
        return self.order[start:stop]

    def rows_of_rank(self, groups: range, rank: int, world_size: int) -> int:
        """How many rows a rank has when the micro-batches of each group are dealt out in turn."""
        counts = np.diff(self.group_offsets)
        turn = np.arange(len(self.batch_offsets) - 1) - np.repeat(self.group_offsets[:-1], counts)
        first, last = self.group_offsets[groups.start], self.group_offsets[groups.stop]
        sizes = np.diff(self.batch_offsets)[first:last]
        return int(sizes[turn[first:last] % world_size == rank].sum())


def share_units(plan: Plan, num_tokens: np.ndarray, world_size: int) -> list[list[int]]:
    """The units of a frozen plan that each rank takes, every rank with about as many tokens.

    Longest unit first to the rank with the least so far; a rank then goes through its units in ascending
    order. Depends on the plan and the world size alone.
    """
    ends = plan.batch_offsets[plan.group_offsets]
    cumulated = np.append(0, np.cumsum(num_tokens[plan.order], dtype=np.int64))
    tokens = cumulated[ends[1:]] - cumulated[ends[:-1]]
    loads = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for unit in np.argsort(-tokens, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        shares[rank].append(unit)
        heapq.heappush(loads, (load + int(tokens[unit]), rank))
    return [sorted(share) for share in shares]


def train_plan(
    num_tokens: np.ndarray, global_batch: int, batch_tokens: int, seed: int, epoch: int = 0
) -> Plan:
    """One epoch of optimizer steps: a seeded permutation cut into global batches, longest rows first in each.

    Args:
        num_tokens: length of every row, [N].
        global_batch: rows of one step; the last step may have fewer.
        batch_tokens: padded tokens of one micro-batch; a longer row is alone.
        seed, epoch: seed of the permutation.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(len(num_tokens))
    step = np.arange(len(permutation)) // global_batch
    order = permutation[np.lexsort((permutation, -num_tokens[permutation], step))]
    boundaries = np.append(np.arange(0, len(order), global_batch), len(order))
    return _cut(order, num_tokens, boundaries, batch_tokens, even=True)


def frozen_plan(
    num_tokens: np.ndarray,
    rows: np.ndarray,
    shard_rows: int,
    batch_tokens: int,
    done: Collection[Span] = (),
) -> Plan:
    """Units of `shard_rows` rows of similar length, out of `rows` (ascending), less what is done already.

    Which rows a unit has, and their order in it, depends on neither `batch_tokens` nor `done`: a run may go
    on from shards that were written with other batches.

    Raises ValueError for spans in `done` that are of another plan.
    """
    window = np.arange(len(rows)) // (shard_rows * WINDOW_SHARDS)
    order = rows[np.lexsort((rows, -num_tokens[rows], window))]
    spans = np.array(gaps(len(rows), shard_rows, done), np.int64).reshape(-1, 3)
    unit, start, stop = spans.T
    if done:
        pieces = zip((unit * shard_rows + start).tolist(), (unit * shard_rows + stop).tolist(), strict=True)
        order = np.concatenate([order[:0], *(order[low:high] for low, high in pieces)])
    boundaries = np.append(0, np.cumsum(stop - start))
    plan = _cut(order, num_tokens, boundaries, batch_tokens, even=False)
    return replace(plan, spans=spans)


def _cut(
    order: np.ndarray, num_tokens: np.ndarray, boundaries: np.ndarray, batch_tokens: int, even: bool
) -> Plan:
    """Cut every group into micro-batches whose rows times longest row fit `batch_tokens`.

    Args:
        boundaries: where the groups begin in `order`, and its end.
        even: make the micro-batches of a group as equal as their number allows, since ranks wait for the
            longest; otherwise each is as full as it can be.
    """
    batch_offsets, group_offsets = [0], [0]
    for start, stop in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        lengths = num_tokens[order[start:stop]].tolist()
        ends = _ends(lengths, batch_tokens)
        if even and len(ends) > 1:
            ends = _even_ends(lengths, batch_tokens, len(ends))
        batch_offsets.extend(start + end for end in ends)
        group_offsets.append(len(batch_offsets) - 1)
    return Plan(order.astype(np.int64), np.array(batch_offsets, np.int64), np.array(group_offsets, np.int64))


def _ends(lengths: list[int], batch_tokens: int) -> list[int]:
    """Ends of micro-batches of at most `batch_tokens` padded tokens, or of one longer row.

    Rows come in descending length, so the first of a micro-batch sets its padded length, and the loop runs
    once a micro-batch.
    """
    ends, start = [], 0
    while start < len(lengths):
        start = min(start + max(1, batch_tokens // lengths[start]), len(lengths))
        ends.append(start)
    return ends


def _even_ends(lengths: list[int], batch_tokens: int, count: int) -> list[int]:
    """The cut into `count` micro-batches with the smallest limit on their padded tokens, by bisection."""
    low, high = 0, batch_tokens
    while high - low > 1:
        middle = (low + high) // 2
        if len(_ends(lengths, middle)) <= count:
            high = middle
        else:
            low = middle
    return _ends(lengths, high)
