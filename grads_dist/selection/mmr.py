"""Maximal marginal relevance: the best score, with the similarity reduction against what is picked."""

from __future__ import annotations

import numpy as np

from grads_dist.selection.config import Weights
from grads_dist.selection.links import leaders, link
from grads_dist.selection.quota import Enough
from grads_dist.selection.redundancy import reduction
from grads_dist.selection.rounds import settle
from grads_dist.selection.score import DECIMALS, Terms
from grads_dist.similarity.knn import Neighbours


def mmr_values(
    terms: Terms,
    weights: Weights,
    neighbours: Neighbours,
    allowed: np.ndarray,
    part: np.ndarray,
    enough: Enough | None = None,
) -> np.ndarray:
    """The value at which the greedy pick takes each row (docs/selection.md, "Picks"), float64 [n].

    w_g G + w_d D - w_r R, R from the largest cosine to a row of the same part that was picked before. What
    `enough` closed has an upper bound instead, and rows that are not allowed have -inf.

    Args:
        terms: G, D and tau.
        weights: of the terms.
        neighbours: the graph of n rows.
        allowed: bool [n], rows that can be picked.
        part: int64 [n]; rows of different parts do not see each other.
        enough: stops where the budget is certain.
    """
    tau = 0.0 if terms.tau is None else terms.tau
    spread = 0.0 if weights.d == 0 else weights.d * terms.diversity
    value = np.where(allowed, np.round(weights.g * terms.gradient + spread, DECIMALS), -np.inf)
    start = value.copy()

    def fall(rows: np.ndarray, closest: np.ndarray) -> np.ndarray:
        return np.round(start[rows] - weights.r * reduction(closest, tau), DECIMALS)

    # Rows with identical features are lowered alike, so that the best of them comes first. Once it is picked,
    # the others are at cosine 1 to it: their values are final, and their picks change nothing.
    leader = leaders(value, allowed, neighbours, part)
    opened = leader == np.arange(len(value))
    settle(link(neighbours, tau, leader, part), value, opened, fall, enough)
    others = np.flatnonzero(allowed & (leader != np.arange(len(value))))
    value[others] = fall(others, np.ones(len(others)))
    return value
