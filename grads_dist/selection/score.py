"""The score of a row: w_g G + w_d D - w_r R."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.selection.config import Weights
from grads_dist.selection.criteria import GradientCriterion
from grads_dist.selection.diversity import diversity
from grads_dist.selection.redundancy import redundancy
from grads_dist.similarity.knn import Neighbours

DECIMALS = 12


@dataclass(frozen=True)
class Terms:
    """The terms of the score of n rows, and the score; D and R are NaN where there was no graph."""

    gradient: np.ndarray
    """G, float64 [n]."""

    diversity: np.ndarray
    """D, float64 [n]."""

    redundancy: np.ndarray
    """R, float64 [n]."""

    shadow: np.ndarray
    """int64 [n], the row that R is due to, -1 where R is 0 or unknown."""

    tau: float | None
    """The cosine from which on a better neighbour counts."""

    score: np.ndarray
    """float64 [n]."""


def combine(criterion: GradientCriterion, neighbours: Neighbours | None, weights: Weights) -> Terms:
    """Score every row (docs/selection.md, "Score"); a graph is needed unless the weights of D and R are 0."""
    gradient = criterion.values
    if neighbours is None:
        unknown = np.full(len(gradient), np.nan)
        return Terms(gradient, unknown, unknown, np.full(len(gradient), -1), None, weights.g * gradient)
    spread = diversity(neighbours)
    reduction = redundancy(neighbours, gradient)
    score = weights.g * gradient + weights.d * spread - weights.r * reduction.values
    # Without rounding, equal sums such as 0.1 + 0.2 and 0.3 would not be ties.
    score = np.round(score, DECIMALS)
    return Terms(gradient, spread, reduction.values, reduction.shadow, reduction.tau, score)
