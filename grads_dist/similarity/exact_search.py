"""The true neighbours: candidates by a library's float32 products, their cosines computed anew, and a proof.

A library's products err by up to dim rounding errors. A row that it did not name scores at most the last one
that it named; where that, with the error, stays below the last neighbour of the list, the list is proved. The
few others are compared with every row in float64. So the result depends on no library, thread or block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grads_dist.similarity import keys
from grads_dist.similarity.problem import Problem

Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries float32 [q, dim], results) -> scores float32 [q, results], falling, and rows of the base."""

_QUERY_ROWS = 1 << 13
_SCAN_QUERIES, _SCAN_ROWS = 1 << 9, 1 << 13
# Candidates beyond the list, so that its end seldom ties with what was not found.
_MARGIN = 6
_HALF_STEP = 0.5 * 10.0**-keys.DECIMALS
_FLOAT64_ERROR = 1e-12


def product_error(dim: int) -> float:
    """What a float32 inner product of unit vectors errs by at most, in any order of addition."""
    return (dim + 2) * 2.0**-24


def exact_lists(
    problem: Problem,
    queries: np.ndarray,
    base: tuple[int, int],
    shard_rows: int,
    index_of: Callable[[int, int], Find],
) -> np.ndarray:
    """The nearest positions of each query among those of the base, keys int64 [q, width].

    Args:
        problem: the rows.
        queries: int64 [q], positions.
        base: first and last + 1 position that is compared with.
        shard_rows: positions that are indexed at a time.
        index_of: makes a searchable index of the positions from the first to the last + 1.
    """
    lists = np.full((len(queries), problem.width), keys.NONE)
    # What a row that was not named can score at most.
    unseen = np.full(len(queries), -np.inf)
    for start in range(base[0], base[1], shard_rows):
        stop = min(start + shard_rows, base[1])
        find = index_of(start, stop)
        num_results = min(problem.width + _MARGIN, stop - start)
        for first in range(0, len(queries), _QUERY_ROWS):
            block = slice(first, min(first + _QUERY_ROWS, len(queries)))
            scores, found = find(problem.units(queries[block]), num_results)
            named = keys.measured_keys(
                problem.points, problem.rows[queries[block]], problem.rows[found + start]
            )
            lists[block] = keys.merge(lists[block], named, problem.width)
            if num_results < stop - start:
                unseen[block] = np.maximum(unseen[block], scores[:, -1])
    proved = unseen + product_error(problem.points.dim) + _HALF_STEP < _last_cosine(lists)
    proved |= np.isneginf(unseen)
    open_ = np.flatnonzero(~proved)
    for first in range(0, len(open_), _SCAN_QUERIES):
        some = open_[first : first + _SCAN_QUERIES]
        lists[some] = _scan(problem, queries[some], base, lists[some])
    return lists


def _last_cosine(lists: np.ndarray) -> np.ndarray:
    """The cosine at the end of each list, -inf where the list has room."""
    return np.where(lists[:, -1] == keys.NONE, -np.inf, keys.cosines_of(lists[:, -1]).astype(np.float64))


def _scan(problem: Problem, queries: np.ndarray, base: tuple[int, int], known: np.ndarray) -> np.ndarray:
    """Compare queries with every row of the base, by rising row; lists that are known bound what matters."""
    units = problem.units(queries).astype(np.float64)
    lists = np.full(known.shape, keys.NONE)
    lowest = _last_cosine(known)
    for start in range(base[0], base[1], _SCAN_ROWS):
        positions = np.arange(start, min(start + _SCAN_ROWS, base[1]))
        products = units @ problem.units(positions).astype(np.float64).T
        # A later row must be strictly nearer than the end of a full list, by a whole step of the rounding.
        full = _last_cosine(lists)
        needed = np.maximum(lowest - _HALF_STEP, full + _HALF_STEP) - _FLOAT64_ERROR
        needed[full >= 1.0] = np.inf
        some = np.flatnonzero((products >= needed[:, None]).any(axis=1))
        for query in some:
            near = positions[products[query] >= needed[query]]
            new = keys.measured_keys(problem.points, problem.rows[queries[[query]]], problem.rows[near][None])
            lists[query] = keys.merge(lists[[query]], new, problem.width)[0]
    return lists
