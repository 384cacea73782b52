"""How much of its corpus a selection covers, and the redundancy it left out; docs/selection.md, "Summary"."""

from __future__ import annotations

from typing import Any

import numpy as np

from grads_dist.selection.sampling import sample
from grads_dist.similarity.exact import nearest_cosine
from grads_dist.similarity.knn import Neighbours
from grads_dist.similarity.points import UnitRows

THRESHOLDS = (0.9, 0.8, 0.7)
"""Cosines within which a row counts as covered: near copies, the same subject, the same region."""

NEAR_DUPLICATE = 0.95
"""Cosine from which two rows count as near-duplicates."""

# Multiplications of one search, about a second of two cores. Queries give way to it before the base does:
# fewer queries make a share less sure, a smaller base would make it wrong.
_MOST_PRODUCTS = 2 * 10**10
_MOST_QUERIES, _FEWEST_QUERIES = 4_000, 100
_BLOCK_ROWS = 1 << 11


def describe_coverage(
    points: UnitRows, index: np.ndarray, subsets: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Share of the candidates within each of `THRESHOLDS` of a row of each subset.

    Rows without a direction are left out. `queries` rows are looked at, and `base` rows of each subset:
    samples where all would take too long.

    Args:
        points: the candidates' features.
        index: their row numbers in the corpus, int64 [n].
        subsets: rows by the name of the subset, each bool [n].
        seed: of the samples.
    """
    directed = points.has_direction
    bases = {name: np.flatnonzero(members & directed) for name, members in subsets.items()}
    num_queries, num_base = _affordable(max(map(len, bases.values())), points.dim)
    queries = sample(np.flatnonzero(directed), index, num_queries, seed, "queries")
    result: dict[str, Any] = {"thresholds": list(THRESHOLDS), "queries": len(queries)}
    for name, rows in bases.items():
        base = sample(rows, index, num_base, seed, "base")
        cosine = nearest_cosine(points, queries, base)
        known = len(queries) > 0 and len(base) > 0
        result[name] = [float(np.mean(cosine >= np.float32(t))) for t in THRESHOLDS] if known else None
        result[f"base_{name}"] = len(base)
    return result


def describe_redundancy(
    points: UnitRows, index: np.ndarray, subsets: dict[str, np.ndarray], graph: Neighbours | None, seed: int
) -> dict[str, Any]:
    """How close rows are to their nearest other row, among all candidates and within each of the subsets.

    For each: the mean cosine to the nearest other row, the share of rows that have a near-duplicate
    (`NEAR_DUPLICATE`), and how many rows were looked at. Among all, the graph says it where there is one.
    None where fewer than two rows have a direction, or exact cosines to all of them would take too long.

    Args:
        points: the candidates' features.
        index: their row numbers in the corpus, int64 [n].
        subsets: rows by the name of the subset, each bool [n].
        graph: the candidates' neighbours, if they were searched.
        seed: of the samples.
    """
    result: dict[str, Any] = {"near_duplicate": NEAR_DUPLICATE}
    directed = np.flatnonzero(points.has_direction)
    if graph is not None and graph.cosine.shape[1]:
        result["all"] = _nearness(_nearest_in_graph(graph)[directed])
    else:
        result["all"] = _nearness(_nearest_within(points, directed, index, seed))
    for name, members in subsets.items():
        result[name] = _nearness(_nearest_within(points, directed[members[directed]], index, seed))
    return result


def nearest_other(points: UnitRows, queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The largest cosine of each query row to another row of the base, float32 [q].

    Args:
        points: the rows.
        queries: int64 [q], rows with a direction.
        base: int64 [b], ascending, rows with a direction, at least one that is not the query.
    """
    units = points.take(queries)
    best = np.full(len(queries), -np.inf, np.float32)
    for start in range(0, len(base), _BLOCK_ROWS):
        block = base[start : start + _BLOCK_ROWS]
        products = units @ points.take(block).T
        place = np.minimum(np.searchsorted(block, queries), len(block) - 1)
        own = np.flatnonzero(block[place] == queries)
        products[own, place[own]] = -np.inf
        np.maximum(best, products.max(axis=1), out=best)
    return np.minimum(np.round(best, 6), np.float32(1))


def _nearest_in_graph(graph: Neighbours) -> np.ndarray:
    """Cosine to the first neighbour; 1 for rows with identical features, listed or not; NaN for none."""
    sizes = np.bincount(graph.group, minlength=len(graph.group))
    return np.where(sizes[graph.group] > 1, np.float32(1), graph.cosine[:, 0])


def _nearest_within(points: UnitRows, members: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray | None:
    num_queries, num_base = _affordable(len(members), points.dim)
    if len(members) < 2 or num_base < len(members):
        return None
    queries = sample(members, index, num_queries, seed, "queries")
    step = max(1, min(len(queries), (1 << 24) // points.dim))
    blocks = [queries[start : start + step] for start in range(0, len(queries), step)]
    return np.concatenate([nearest_other(points, block, members) for block in blocks])


def _nearness(cosine: np.ndarray | None) -> dict[str, float | int] | None:
    if cosine is None or not np.isfinite(cosine).any():
        return None
    cosine = cosine[np.isfinite(cosine)]
    return {
        "mean_nearest": float(cosine.mean(dtype=np.float64)),
        "near_duplicates": float(np.mean(cosine >= np.float32(NEAR_DUPLICATE))),
        "rows": len(cosine),
    }


def _affordable(num_base: int, dim: int) -> tuple[int, int]:
    """How many queries, and how many base rows, a search may have."""
    products = max(1, num_base) * dim
    queries = min(_MOST_QUERIES, max(_FEWEST_QUERIES, _MOST_PRODUCTS // products))
    return queries, max(1, _MOST_PRODUCTS // (_FEWEST_QUERIES * dim))
