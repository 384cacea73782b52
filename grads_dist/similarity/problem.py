"""What is searched: the different rows that have a direction; how their lists become those of all rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grads_dist.similarity import keys
from grads_dist.similarity.identical import identical_rows
from grads_dist.similarity.points import UnitRows

_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Problem:
    """Rows with identical features are one: what is near one of them is near all, at the same cosine."""

    points: UnitRows

    group: np.ndarray
    """int64 [n], the first row with identical features."""

    rows: np.ndarray
    """int64 [m], rising: the first row of every group that has a direction. A position is an index of it."""

    num_neighbours: int
    """k, or all other rows where these are fewer."""

    @property
    def width(self) -> int:
        """Entries of a list: one more than the neighbours, because it may hold the row itself."""
        return self.num_neighbours + 1

    def units(self, positions: np.ndarray) -> np.ndarray:
        """Unit vectors at positions, float32."""
        return self.points.take(self.rows[positions])

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Unit vectors of consecutive positions, in blocks."""
        step = max(1, _BLOCK_NUMBERS // max(1, self.points.dim))
        for first in range(start, stop, step):
            yield self.points.take(self.rows[first : min(first + step, stop)])


def make_problem(points: UnitRows, k: int) -> Problem:
    """The rows of `points` without repeats."""
    group = identical_rows(points)
    first = (group == np.arange(points.num_rows)) & points.has_direction
    # A k beyond the corpus means all other rows, and takes no more memory than they do.
    return Problem(points, group, np.flatnonzero(first), min(k, max(0, points.num_rows - 1)))


class Lists:
    """Turns lists of different rows into lists of all rows."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        directed = np.flatnonzero(problem.points.has_direction)
        self._members = directed[np.argsort(problem.group[directed], kind="stable")]
        counts = np.bincount(problem.group[directed], minlength=problem.points.num_rows)
        self._sizes = counts
        self._starts = np.cumsum(counts) - counts

    def expand(self, lists: np.ndarray) -> np.ndarray:
        """Lists [b, width] with all rows of every group that they name, the nearest `width` of each."""
        rows = keys.rows_of(lists)
        sizes = np.where(rows >= 0, self._sizes[rows], 1)
        repeated = np.flatnonzero((sizes > 1).any(axis=1))
        if len(repeated) == 0:
            return lists
        expanded = lists.copy()
        step = max(1, _BLOCK_NUMBERS // (lists.shape[1] * lists.shape[1]))
        for start in range(0, len(repeated), step):
            chosen = repeated[start : start + step]
            expanded[chosen] = self._expanded(lists[chosen], rows[chosen], sizes[chosen])
        return expanded

    def _expanded(self, lists: np.ndarray, rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        width = lists.shape[1]
        # More members than places are never listed, and those come first by row.
        counts = np.minimum(sizes, width).ravel()
        begin = np.cumsum(counts) - counts
        offset = np.arange(counts.sum()) - np.repeat(begin, counts)
        owner = np.repeat(rows.ravel(), counts)
        member = self._members[np.minimum(self._starts[owner] + offset, len(self._members) - 1)]
        key = np.repeat(lists.ravel(), counts)
        key = np.where(key == keys.NONE, key, key - owner + member)
        row = np.repeat(np.arange(len(lists)), counts.reshape(lists.shape).sum(axis=1))
        order = np.lexsort((key, row))
        row, key = row[order], key[order]
        first = np.searchsorted(row, np.arange(len(lists)))
        place = np.arange(len(row)) - first[row]
        result = np.full((len(lists), width), keys.NONE)
        result[row[place < width], place[place < width]] = key[place < width]
        return result
