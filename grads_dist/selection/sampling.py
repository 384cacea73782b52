"""Seeded samples of rows, for numbers that need not be read off all of them."""

from __future__ import annotations

import numpy as np

from grads_dist.selection.noise import uniform


def sample(rows: np.ndarray, index: np.ndarray, size: int, seed: int, purpose: str) -> np.ndarray:
    """At most `size` of the rows, ascending, int64; the same whatever other rows there are.

    Args:
        rows: ascending places among the candidates, int64 [m].
        index: the candidates' row numbers in the corpus, int64 [n].
        size: how many at most.
        seed: of the selection.
        purpose: different purposes sample independently.
    """
    if len(rows) <= size:
        return rows
    noise = uniform(index[rows], seed, purpose)
    return np.sort(rows[np.argpartition(noise, size)[:size]])


def random_subset(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Mark `size` random candidates, bool [n]: what a selection of as many rows is compared with."""
    chosen = np.zeros(len(index), bool)
    chosen[sample(np.arange(len(index)), index, size, seed, "random subset")] = True
    return chosen
