"""The time of a micro-batch as a sum of non-negative costs, fitted to some that were timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from grads_dist.estimate.workload import BatchSizes

COSTS = ("a micro-batch", "a padded token", "a pair of positions", "a label token", "a row", "a step")


def cost_columns(sizes: BatchSizes) -> np.ndarray:
    """What a micro-batch is charged for, one column for each of COSTS, float64 [M, 6]."""
    ones = np.ones(len(sizes.rows))
    return np.stack([ones, sizes.padded, sizes.squares, sizes.labels, sizes.rows, sizes.ends_step], axis=1)


@dataclass(frozen=True)
class Fit:
    """Seconds for each of COSTS, and how far the timed micro-batches are from it.

    `error`: root mean square of the deviation of a timed micro-batch, relative to their mean.
    """

    seconds: np.ndarray
    error: float
    num_timed: int

    def predict(self, sizes: BatchSizes) -> np.ndarray:
        """Seconds of micro-batches, float64 [M]."""
        return cost_columns(sizes) @ self.seconds


def fit_costs(sizes: BatchSizes, seconds: np.ndarray) -> Fit:
    """Least squares without negative costs; what was timed several times may occur several times."""
    columns = cost_columns(sizes)
    # Columns of one size: the solver stops by an absolute tolerance.
    scale = np.maximum(columns.max(axis=0), 1e-300)
    found, _ = nnls(columns / scale, seconds)
    costs = found / scale
    deviation = columns @ costs - seconds
    error = float(np.sqrt(np.mean(deviation**2)) / seconds.mean())
    return Fit(costs, error, len(seconds))


def chosen_batches(sizes: BatchSizes, count: int) -> np.ndarray:
    """Places of up to `count` micro-batches from the smallest to the largest, ascending.

    They are the middles of equal parts in the order of padded tokens, then of label tokens, with the smallest
    and the largest of all.
    """
    num = len(sizes.rows)
    order = np.lexsort((sizes.labels, sizes.padded))
    if num <= count:
        return np.arange(num)
    places = ((np.arange(count - 2) + 0.5) * num / (count - 2)).astype(np.int64)
    return np.unique(np.concatenate([order[[0, -1]], order[places]]))
