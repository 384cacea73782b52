"""Exact cosines between chosen rows: the nearest of a set, and all pairs above a threshold."""

from __future__ import annotations

import numpy as np

from grads_dist.similarity import keys
from grads_dist.similarity.exact_search import product_error
from grads_dist.similarity.points import UnitRows

_QUERY_ROWS, _BASE_ROWS = 1 << 11, 1 << 12
_PAIRS = 1 << 16


def nearest_cosine(points: UnitRows, queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The largest cosine of each query row to a base row, float32 [q], rounded to 6 decimals.

    A query that is itself in the base has cosine 1 to itself. NaN where the query has no direction, or no
    base row has one. Takes q * b * dim multiplications in float64.

    Args:
        points: the rows.
        queries: int64 [q], numbers of rows.
        base: int64 [b], numbers of rows.
    """
    base = base[points.has_direction[base]]
    found = np.full(len(queries), np.nan)
    usable = np.flatnonzero(points.has_direction[queries]) if len(base) > 0 else np.empty(0, np.int64)
    best = np.full(len(usable), -1.0)
    for start in range(0, len(base), _BASE_ROWS):
        others = points.take(base[start : start + _BASE_ROWS]).astype(np.float64).T
        for first in range(0, len(usable), _QUERY_ROWS):
            block = slice(first, first + _QUERY_ROWS)
            units = points.take(queries[usable[block]]).astype(np.float64)
            best[block] = np.maximum(best[block], (units @ others).max(axis=1))
    found[usable] = keys.rounded(best)
    return found.astype(np.float32)


def close_pairs(points: UnitRows, members: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of members whose cosine, rounded to 6 decimals, is at least the threshold (as float32).

    Takes m^2 * dim / 2 multiplications in float32, and the memory of the pairs that it returns.

    Args:
        points: the rows.
        members: int64 [m], distinct numbers of rows; those without direction are close to none.
        threshold: a cosine.

    Returns:
        (one, other), int64, row numbers with one < other, each pair once, sorted by both.
    """
    members = np.sort(members[points.has_direction[members]])
    needed = threshold - product_error(points.dim) - 2 * 10.0**-keys.DECIMALS
    pairs = [np.empty((2, 0), np.int64)]
    for start in range(0, len(members), _BASE_ROWS):
        others = points.take(members[start : start + _BASE_ROWS])
        for first in range(0, min(start + _BASE_ROWS, len(members)), _QUERY_ROWS):
            units = points.take(members[first : first + _QUERY_ROWS])
            row, column = np.nonzero(units @ others.T >= np.float32(needed))
            proper = row + first < column + start
            row, column = row[proper], column[proper]
            close = _at_least(units, others, row, column, threshold)
            pairs.append(np.stack([members[row[close] + first], members[column[close] + start]]))
    one, other = np.concatenate(pairs, axis=1)
    order = np.lexsort((other, one))
    return one[order], other[order]


def _at_least(
    units: np.ndarray, others: np.ndarray, row: np.ndarray, column: np.ndarray, threshold: float
) -> np.ndarray:
    """Which pairs are close by their exact cosines, bool."""
    close = np.empty(len(row), bool)
    for start in range(0, len(row), _PAIRS):
        block = slice(start, start + _PAIRS)
        cosine = keys.rounded(keys.row_products(units[row[block]], others[column[block]]))
        close[block] = cosine.astype(np.float32) >= np.float32(threshold)
    return close
