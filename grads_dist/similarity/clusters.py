"""Clusters of rows by direction: Lloyd's k-means on unit vectors, the same on any number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from grads_dist.similarity import faiss_index
from grads_dist.similarity.points import UnitRows

_ITERATIONS = 10
_ROWS_PER_CLUSTER = 100
_MIN_SAMPLE = 1 << 14


def kmeans(points: UnitRows, num_clusters: int, seed: int) -> np.ndarray:
    """Label every row with a cluster of similar direction, int64 [n]; -1 for a row without direction.

    Labels are 0 .. c - 1, each of them used, c at most `num_clusters`: fewer where there are fewer different
    rows, or where a cluster stays empty.

    Args:
        points: the rows.
        num_clusters: clusters asked for.
        seed: of the sample that the centres are learnt from, and of the first centres.
    """
    rows = np.flatnonzero(points.has_direction)
    labels = np.full(points.num_rows, -1, np.int64)
    if len(rows) == 0:
        return labels
    draw = np.random.default_rng(seed)
    size = max(_MIN_SAMPLE, _ROWS_PER_CLUSTER * num_clusters)
    sample = rows if len(rows) <= size else np.sort(draw.choice(rows, size, replace=False))
    nearest = _nearest_to(learn_centres(points.take(sample), num_clusters, seed))
    for start, stop in points.bounds():
        labels[start:stop] = nearest(points.block(start, stop))
    labels[~points.has_direction] = -1
    labels[rows] = np.unique(labels[rows], return_inverse=True)[1]
    return labels


def learn_centres(units: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Centres of unit vectors by Lloyd's algorithm, unit vectors float32 [at most num_clusters, dim].

    The first centres are rows drawn by the seed; a cluster that loses its rows gets the place of a row drawn
    from the largest ones.

    Args:
        units: float32 [m, dim], m at least 1.
        num_clusters: centres asked for, m where that is smaller.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    centres = units[np.sort(draw.permutation(len(units))[:num_clusters])]
    for _ in range(_ITERATIONS):
        labels = _nearest_to(centres)(units)
        centres = _means(units, labels, centres, draw)
    return centres


def _means(
    units: np.ndarray, labels: np.ndarray, centres: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """The direction of each cluster's mean."""
    order = np.argsort(labels, kind="stable")
    used, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    # One sum after another in the order of the rows: the same whoever computes it.
    sums = np.add.reduceat(units[order].astype(np.float64), starts, axis=0)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means = centres.copy()
    means[used] = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), centres[used])
    empty = np.setdiff1d(np.arange(len(centres)), used)
    if len(empty) > 0:
        share = (counts - 1)[np.searchsorted(used, labels)].astype(np.float64)
        if np.count_nonzero(share) >= len(empty):
            means[empty] = units[draw.choice(len(units), len(empty), replace=False, p=share / share.sum())]
    return means


def _nearest_to(centres: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from unit vectors to the number of the centre with the largest product."""
    if faiss_index.is_installed():
        index = faiss_index.FaissIndex.flat(centres.shape[1])
        index.add([np.ascontiguousarray(centres)])
        return lambda units: index.search(units, 1)[1][:, 0]
    torch_search = importlib.import_module("grads_dist.similarity.torch_search")
    search = torch_search.searcher(centres, "cpu")
    return lambda units: search(units, 1)[1][:, 0]
