"""From a score a row to the rows that are selected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.selection.budget import Budget, take
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.facility import facility_values
from grads_dist.selection.mmr import mmr_values
from grads_dist.selection.noise import gumbel
from grads_dist.selection.quota import Enough, Quotas, divide, take_parts
from grads_dist.selection.ranks import ranking
from grads_dist.selection.scored import Scored
from grads_dist.similarity.clusters import kmeans
from grads_dist.similarity.points import UnitRows


@dataclass(frozen=True)
class Picked:
    """The rows that a pick takes of n rows, and their order."""

    value: np.ndarray
    """float64 [n], what orders the rows, best highest; final for the selected rows."""

    selected: np.ndarray
    """bool [n]."""


def pick(
    scored: Scored, score: np.ndarray, allowed: np.ndarray, budget: Budget, config: SelectionConfig
) -> Picked:
    """Pick within the budget by the configured rule (docs/selection.md, "Picks").

    Args:
        scored: the candidates.
        score: float64 [n].
        allowed: bool [n], rows that can be picked.
        budget: how much is picked.
        config: the rule and its options.
    """
    if budget.unit == "none":
        return Picked(score, allowed.copy())
    stratum = np.zeros(len(score), np.int64) if scored.strata is None else scored.strata.codes
    quotas = divide_budget(stratum, allowed, scored.num_tokens, budget)
    if config.pick == "cluster":
        assert scored.points is not None
        labels = clusters(scored.points, config.clusters, config.seed)
        quotas = _within(quotas, labels, allowed)
    value = _values(scored, score, allowed, quotas, config)
    if len(quotas.limit) == 1:
        return Picked(value, top_k(value, allowed, scored.num_tokens, budget))
    return Picked(value, take_parts(value, allowed, quotas))


def top_k(score: np.ndarray, eligible: np.ndarray, num_tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """Mark the best eligible rows that the budget allows, bool [n]; ties go to the earlier row.

    Args:
        score: float64 [n].
        eligible: bool [n], rows that may be picked.
        num_tokens: tokens a row, int [n].
        budget: how much is picked.
    """
    if budget.unit == "none":
        return eligible.copy()
    rows = np.flatnonzero(eligible)
    if budget.unit == "rows" and 0 < budget.limit < len(rows):
        # Ordering all rows would take ten times as long as finding the last that is taken.
        lowest = np.partition(score[rows], len(rows) - budget.limit)[len(rows) - budget.limit]
        rows = rows[score[rows] >= lowest]
    chosen = np.zeros(len(score), bool)
    chosen[take(rows[ranking(score[rows])], num_tokens, budget)] = True
    return chosen


def divide_budget(part: np.ndarray, allowed: np.ndarray, num_tokens: np.ndarray, budget: Budget) -> Quotas:
    """Each part's share of a budget in rows or tokens, by its share of all rows or tokens."""
    num_parts = int(part.max(initial=0)) + 1
    cost = None if budget.unit == "rows" else num_tokens
    share, capacity = _totals(part, allowed, cost, num_parts)
    return Quotas(part, divide(np.array([budget.limit]), share, capacity), cost)


def clusters(points: UnitRows, num_clusters: int | None, seed: int) -> np.ndarray:
    """A cluster for each row, int64 [n]; rows without direction are one of their own."""
    directed = int(np.count_nonzero(points.has_direction))
    if directed == 0:
        return np.zeros(points.num_rows, np.int64)
    wanted = round(points.num_rows**0.5) if num_clusters is None else num_clusters
    return kmeans(points, min(wanted, directed), seed) + 1


def _within(quotas: Quotas, labels: np.ndarray, allowed: np.ndarray) -> Quotas:
    """Divide the quota of each part among the clusters in it."""
    key = quotas.part * (int(labels.max(initial=0)) + 1) + labels
    names, part = np.unique(key, return_inverse=True)
    parent = names // (int(labels.max(initial=0)) + 1)
    share, capacity = _totals(part, allowed, quotas.cost, len(names))
    return Quotas(part, divide(quotas.limit, share, capacity, parent), quotas.cost)


def _totals(
    part: np.ndarray, allowed: np.ndarray, cost: np.ndarray | None, num_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows, or what they cost, of each part: of all rows and of the allowed ones; int64."""
    everything = np.bincount(part, weights=cost, minlength=num_parts)
    weights = None if cost is None else cost[allowed]
    possible = np.bincount(part[allowed], weights=weights, minlength=num_parts)
    return everything.astype(np.int64), possible.astype(np.int64)


def _values(
    scored: Scored, score: np.ndarray, allowed: np.ndarray, quotas: Quotas, config: SelectionConfig
) -> np.ndarray:
    """What the rule orders the rows by, float64 [n]."""
    if config.pick == "gumbel":
        return score / config.temperature + gumbel(scored.index, config.seed, "gumbel")
    if config.pick not in ("mmr", "facility_location") or scored.graph is None:
        return score
    assert scored.terms is not None
    enough = Enough(quotas)
    if config.pick == "mmr":
        return mmr_values(scored.terms, config.weights, scored.graph, allowed, quotas.part, enough)
    gradient = scored.terms.gradient
    return facility_values(gradient, config.weights, scored.graph, allowed, quotas.part, enough)
