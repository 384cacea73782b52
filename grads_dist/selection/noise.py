"""Random numbers that belong to a row of the corpus: the same whatever other rows there are."""

from __future__ import annotations

import zlib

import numpy as np


def uniform(index: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A number in (0, 1) for each corpus row number, float64 [n], by the mixer of splitmix64.

    Args:
        index: row numbers in the corpus, int64 [n].
        seed: of the selection.
        purpose: different purposes get independent numbers from one seed.
    """
    state = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
    key = _mix(_mix(state)[:1] + state[1:])
    bits = _mix(_mix(index.astype(np.uint64) + np.uint64(1)) ^ key)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel(index: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Standard Gumbel noise for each corpus row number, float64 [n]; arguments are those of `uniform`.

    Log weights with this noise rank rows as drawing them one by one by their weights would.
    """
    return -np.log(-np.log(uniform(index, seed, purpose)))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
