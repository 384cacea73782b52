"""The two ways in which numbers are made comparable: standardisation z and average rank r."""

from __future__ import annotations

import numpy as np

# Below this spread, relative to the size of the values, what varies is rounding.
_CONSTANT = 1e-12
_TABLE = 4


def is_constant(x: np.ndarray) -> bool:
    """Whether all values are equal but for rounding; true of an empty array."""
    if len(x) == 0:
        return True
    low, high = float(x.min()), float(x.max())
    return high - low <= _CONSTANT * max(abs(low), abs(high))


def z(x: np.ndarray) -> np.ndarray:
    """(x - mean) / std over the array, float64, with the population's std; all zeros where x is constant."""
    x = np.asarray(x, np.float64)
    if is_constant(x):
        return np.zeros(len(x))
    centred = x - x.mean()
    centred /= np.sqrt(np.mean(centred**2))
    return centred


def r(x: np.ndarray) -> np.ndarray:
    """Average rank / n, in (0, 1], rising with x; ties share their mean rank, and n = 1 gives 0.5."""
    return np.array([0.5]) if len(x) == 1 else average_rank(x) / max(1, len(x))


def average_rank(x: np.ndarray) -> np.ndarray:
    """Rank from 1 to n, float64 [n], rising with x; ties share their mean rank."""
    order = np.argsort(x)
    ordered = x[order]
    # Ties begin where the value changes, and share the mean of the ranks that they take up.
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(x)])
    stops = np.append(starts[1:], len(x))
    ranks = np.empty(len(x))
    ranks[order] = np.repeat((starts + stops + 1) / 2, stops - starts)
    return ranks


def distinct(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct whole numbers, rising, the place of each of `x` among them, and how often each occurs."""
    low, high = (int(x.min()), int(x.max())) if len(x) else (0, -1)
    if high - low > _TABLE * (len(x) + 1):
        values, place, counts = np.unique(x, return_inverse=True, return_counts=True)
        return values, place, counts
    # Counting instead of sorting.
    offset = x.astype(np.int64) - low
    counts = np.bincount(offset, minlength=high - low + 1)
    values = np.flatnonzero(counts)
    place = np.cumsum(counts > 0) - 1
    return values + low, place[offset], counts[values]


def positions(score: np.ndarray) -> np.ndarray:
    """Place of every row in the ranking by falling score, from 0, ties by row; int64 [n]."""
    places = np.empty(len(score), np.int64)
    places[ranking(score)] = np.arange(len(score))
    return places


def ranking(score: np.ndarray) -> np.ndarray:
    """Rows by falling score, ties by row; int64 [n]."""
    return np.argsort(-score, kind="stable")
