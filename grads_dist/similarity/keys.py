"""Neighbours as sortable numbers: (rounded cosine, row) in one int64, so that lists merge by sorting.

A key grows as the cosine falls and, at equal cosine, with the row number: sorted keys are nearest first, and
what is merged in any order, in any number of pieces, gives the same list.
"""

from __future__ import annotations

import numpy as np

from grads_dist.similarity.points import UnitRows

DECIMALS = 6
"""Of a cosine. Search libraries differ in the seventh, which must not decide between equal rows."""
NONE = np.iinfo(np.int64).max
"""Fills a list that has fewer neighbours than places: behind every neighbour."""
_UNITS = 10**DECIMALS
_ROW_BITS = 32
# Numbers of a block of candidates: 128 MiB in float64.
_BLOCK_NUMBERS = 1 << 24


def rounded(cosine: np.ndarray) -> np.ndarray:
    """Cosines to 6 decimals and in [-1, 1], float64."""
    return np.rint(np.clip(cosine, -1.0, 1.0) * _UNITS) / _UNITS


def pack(cosine: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keys int64 of neighbours at these cosines (float64), NONE where the row is -1."""
    steps = _UNITS - np.rint(np.clip(cosine, -1.0, 1.0) * _UNITS).astype(np.int64)
    return np.where(rows >= 0, (steps << _ROW_BITS) | rows, NONE)


def rows_of(keys: np.ndarray) -> np.ndarray:
    """The rows of keys, int32; -1 for NONE."""
    return np.where(keys == NONE, -1, keys & ((1 << _ROW_BITS) - 1)).astype(np.int32)


def cosines_of(keys: np.ndarray) -> np.ndarray:
    """The cosines of keys, float32 in [-1, 1]; NaN for NONE."""
    cosine = (_UNITS - (keys >> _ROW_BITS)) / _UNITS
    return np.where(keys == NONE, np.nan, cosine).astype(np.float32)


def merge(one: np.ndarray, other: np.ndarray, width: int) -> np.ndarray:
    """The first `width` different keys of two lists a row, int64 [n, min(width, both widths)]."""
    return without_repeats(np.sort(np.concatenate([one, other], axis=1), axis=1))[:, :width]


def without_repeats(keys: np.ndarray) -> np.ndarray:
    """Sorted keys [n, w] with every key that repeats the one before moved to the end as NONE."""
    repeated = keys[:, 1:] == keys[:, :-1]
    if not (repeated & (keys[:, 1:] != NONE)).any():
        return keys
    keys = keys.copy()
    keys[:, 1:][repeated] = NONE
    return np.sort(keys, axis=1)


def without_row(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Lists [n, w] less one entry each: the given row, or the last where it is not listed; [n, w - 1]."""
    dropped = rows_of(keys) == rows[:, None]
    dropped[~dropped.any(axis=1), -1] = True
    return keys[~dropped].reshape(len(keys), keys.shape[1] - 1)


def measured_keys(points: UnitRows, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Keys, sorted, of candidates by their cosines computed from the features, int64 [q, c].

    The one place where a cosine of the graph is computed: products in float64 added in an order that
    depends on the width alone, then rounded.

    Args:
        points: the rows.
        queries: int64 [q], row numbers.
        candidates: int64 [q, c], row numbers; -1 for none.
    """
    keys = np.empty(candidates.shape, np.int64)
    step = max(1, _BLOCK_NUMBERS // max(1, candidates.shape[1] * points.dim))
    for start in range(0, len(queries), step):
        block = candidates[start : start + step]
        # Candidates of neighbouring queries repeat: each vector is made once.
        rows, place = np.unique(block, return_inverse=True)
        units = points.take(rows.clip(0))[place.reshape(block.shape)]
        cosine = row_products(points.take(queries[start : start + step])[:, None], units)
        keys[start : start + step] = pack(cosine, block)
    keys.sort(axis=1)
    return keys


def row_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products over the last axis in float64, in an order that depends on its length alone."""
    return np.einsum("...d,...d->...", one.astype(np.float64), other.astype(np.float64))
