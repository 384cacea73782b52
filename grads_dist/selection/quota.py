"""Shares of the budget for parts of the corpus, and the rows that each part's share pays for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_FIRST_CHECK, _GROWTH = 64, 1.25


@dataclass(frozen=True)
class Quotas:
    """How much each part may take of n rows."""

    part: np.ndarray
    """int64 [n], the part of each row."""

    limit: np.ndarray
    """int64 [parts], rows or tokens."""

    cost: np.ndarray | None
    """int [n], tokens of each row; None where rows are counted."""

    def spent(self, rows: np.ndarray) -> np.ndarray:
        """What rows sorted by part cost together with those before them in their part, int64."""
        cost = np.ones(len(rows), np.int64) if self.cost is None else self.cost[rows].astype(np.int64)
        total = np.cumsum(cost)
        first = np.searchsorted(self.part[rows], np.arange(len(self.limit)))
        before = np.concatenate([[0], total])[first]
        return total - before[self.part[rows]]


def divide(
    total: np.ndarray, share: np.ndarray, capacity: np.ndarray, parent: np.ndarray | None = None
) -> np.ndarray:
    """Divide whole numbers by largest remainders in proportion to shares (docs/selection.md, "Strata").

    What a part cannot take goes to the others of its parent by their shares, and so on; ties of remainders go
    to the earlier part. Without a part at its capacity each is within 1 of its exact share.

    Args:
        total: int64 [parents], what is divided.
        share: int64 [parts], positive where `capacity` is.
        capacity: int64 [parts], the most that a part can take.
        parent: int64 [parts], what each is a part of; by default all of one.

    Returns:
        int64 [parts], which add up to `total`, or to the capacities where these are less.
    """
    parent = np.zeros(len(share), np.int64) if parent is None else parent
    given = np.zeros(len(share), np.int64)
    rest = np.minimum(total, _sums(capacity, parent, len(total)))
    opened = capacity > 0
    while True:
        whole = np.maximum(_sums(share * opened, parent, len(total)), 1)[parent]
        # In whole numbers, for rounding would break ties; as objects, for products of tokens outgrow 64 bits.
        product = rest[parent].astype(object) * np.where(opened, share, 0)
        least, remainder = (product // whole).astype(np.int64), (product % whole).astype(np.int64)
        full = opened & (capacity <= least)
        if not full.any():
            break
        given[full] = capacity[full]
        rest = rest - _sums(capacity * full, parent, len(total))
        opened &= ~full
    given[opened] = least[opened]
    rest = rest - _sums(given * opened, parent, len(total))
    order = np.lexsort((-remainder, parent))
    order = order[opened[order]]
    place = np.arange(len(order)) - np.searchsorted(parent[order], parent[order])
    given[order[place < rest[parent[order]]]] += 1
    return given


def take_parts(value: np.ndarray, allowed: np.ndarray, quotas: Quotas) -> np.ndarray:
    """Mark in each part the best allowed rows that its quota pays for, bool [n]; ties go to the earlier row.

    Where tokens are counted a part takes the longest prefix of its ranking that fits. What is left over then
    goes to the rows that come next in the parts, one each and the best first, as far as it reaches.
    """
    rows = np.flatnonzero(allowed)
    rows = rows[np.lexsort((-value[rows], quotas.part[rows]))]
    spent, limit = quotas.spent(rows), quotas.limit[quotas.part[rows]]
    chosen = np.zeros(len(value), bool)
    chosen[rows[spent <= limit]] = True
    if quotas.cost is not None:
        rest = int(quotas.limit.sum()) - int(quotas.cost[chosen].sum(dtype=np.int64))
        beyond = rows[spent > limit]
        _, first = np.unique(quotas.part[beyond], return_index=True)
        following = beyond[np.sort(first)]
        following = following[np.lexsort((following, -value[following]))]
        chosen[following[np.cumsum(quotas.cost[following], dtype=np.int64) <= rest]] = True
    return chosen


@dataclass
class Enough:
    """Closes rows that cannot be among the picked any more, now and then, as rows settle."""

    quotas: Quotas
    """What each part may take."""

    _next: int = field(default=_FIRST_CHECK, init=False)

    def close(self, settled: np.ndarray, value: np.ndarray, opened: np.ndarray) -> None:
        """Close open rows whose value, an upper bound, is below that of settled rows which use up the quota.

        Settled values are final, so more settled rows can but raise the bound.
        """
        if np.count_nonzero(settled) < self._next:
            return
        rows = np.flatnonzero(settled)
        self._next = int(_GROWTH * len(rows)) + 1
        rows = rows[np.lexsort((-value[rows], self.quotas.part[rows]))]
        spent, limit = self.quotas.spent(rows), self.quotas.limit[self.quotas.part[rows]]
        # In tokens the row that no longer fits is still looked at when what is left over is given out.
        used_up = rows[spent >= limit] if self.quotas.cost is None else rows[spent > limit]
        bound = np.full(len(self.quotas.limit), -np.inf)
        np.maximum.at(bound, self.quotas.part[used_up], value[used_up])
        opened &= value >= bound[self.quotas.part]


def _sums(values: np.ndarray, parent: np.ndarray, num_parents: int) -> np.ndarray:
    result = np.zeros(num_parents, np.int64)
    np.add.at(result, parent, values)
    return result
