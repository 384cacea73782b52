"""The two ways in which numbers are made comparable: standardisation z and average rank r."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

# Below this spread, relative to the size of the values, what varies is rounding.
_CONSTANT = 1e-12


def is_constant(x: np.ndarray) -> bool:
    """Whether all values are equal but for rounding; true of an empty array."""
    return len(x) == 0 or bool(np.ptp(x) <= _CONSTANT * np.abs(x).max())


def z(x: np.ndarray) -> np.ndarray:
    """(x - mean) / std over the array, float64, with the population's std; all zeros where x is constant."""
    x = np.asarray(x, np.float64)
    if is_constant(x):
        return np.zeros(len(x))
    centred = x - x.mean()
    return centred / np.sqrt(np.mean(centred**2))


def r(x: np.ndarray) -> np.ndarray:
    """Average rank / n, in (0, 1], rising with x; ties share their mean rank, and n = 1 gives 0.5."""
    return np.array([0.5]) if len(x) == 1 else average_rank(x) / max(1, len(x))


def average_rank(x: np.ndarray) -> np.ndarray:
    """Rank from 1 to n, float64 [n], rising with x; ties share their mean rank."""
    return rankdata(x, method="average")


def positions(score: np.ndarray) -> np.ndarray:
    """Place of every row in the ranking by falling score, from 0, ties by row; int64 [n]."""
    places = np.empty(len(score), np.int64)
    places[ranking(score)] = np.arange(len(score))
    return places


def ranking(score: np.ndarray) -> np.ndarray:
    """Rows by falling score, ties by row; int64 [n]."""
    return np.argsort(-score, kind="stable")
