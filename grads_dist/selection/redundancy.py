"""The similarity reduction R: how close a row is to a better row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.selection.ranks import positions, ranking
from grads_dist.similarity.knn import Neighbours

_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class Redundancy:
    """R of n rows."""

    values: np.ndarray
    """float64 [n] in [0, 1]."""

    shadow: np.ndarray
    """int64 [n], the row whose cosine counted, -1 where R is 0."""

    tau: float
    """The cosine from which on a better neighbour counts."""


def redundancy(neighbours: Neighbours, gradient: np.ndarray) -> Redundancy:
    """R = max(0, (c - tau) / (1 - tau)) (docs/selection.md, "Similarity reduction").

    c is the largest cosine of a row to a neighbour that ranks before it by `gradient`, ties by row; of
    several with that cosine the best ranked is the shadow. Where tau is 1, R is 1 for c = 1 and 0
    otherwise, the limit.

    Args:
        neighbours: the graph; a row's neighbours are those it lists and all rows whose features are identical
            to theirs or to its own, so that it does not matter which of many identical rows are listed.
        gradient: the gradient criterion G, float64 [n].
    """
    place = positions(gradient)
    closest, shadow_place = _closest_before(neighbours, place)
    tau = _tau(neighbours)
    values = reduction(closest, tau)
    shadow = np.where(values > 0, ranking(gradient)[shadow_place], -1)
    return Redundancy(values, shadow, tau)


def reduction(closest: np.ndarray, tau: float) -> np.ndarray:
    """max(0, (c - tau) / (1 - tau)) for the cosines c, float64 [n]; where tau is 1: 1 for c = 1, else 0."""
    if tau < 1.0:
        return np.maximum(0.0, (closest.astype(np.float64) - tau) / (1.0 - tau))
    return (closest >= 1.0).astype(np.float64)


def _closest_before(neighbours: Neighbours, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest cosine to a neighbour with a smaller place (-inf: none), and the smallest place at it."""
    best = np.full(len(place), len(place), np.int64)
    np.minimum.at(best, neighbours.group, place)
    best = best[neighbours.group]
    closest = np.empty(len(place), np.float32)
    shadow_place = np.empty(len(place), np.int64)
    for start in range(0, len(place), _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, len(place)))
        ids = np.asarray(neighbours.ids[block])
        # The last column is the row's own group, at cosine 1.
        places = np.concatenate([best[ids], best[block, None]], axis=1)
        cosine = np.concatenate([neighbours.cosine[block], np.ones((len(ids), 1), np.float32)], axis=1)
        before = places < place[block, None]
        before[:, :-1] &= ids >= 0
        cosine = np.where(before, cosine, -np.inf)
        closest[block] = cosine.max(axis=1)
        nearest = before & (cosine == closest[block, None])
        shadow_place[block] = np.where(nearest, places, len(place) - 1).min(axis=1)
    return closest, shadow_place


def _tau(neighbours: Neighbours) -> float:
    """Median over the corpus of the cosine of the farthest listed neighbour; 0 where no row has any."""
    last = [last_cosine(neighbours, start, start + _BLOCK_ROWS) for start in _starts(neighbours)]
    listed = np.concatenate([cosine[~np.isnan(cosine)] for cosine in last])
    return float(np.median(listed.astype(np.float64))) if len(listed) else 0.0


def last_cosine(neighbours: Neighbours, start: int, stop: int) -> np.ndarray:
    """The cosine of the farthest listed neighbour of consecutive rows, float32; NaN for a row without any."""
    cosine = np.asarray(neighbours.cosine[start:stop])
    found = (np.asarray(neighbours.ids[start:stop]) >= 0).sum(axis=1)
    result = np.full(len(cosine), np.nan, np.float32)
    rows = np.flatnonzero(found)
    result[rows] = cosine[rows, found[rows] - 1]
    return result


def _starts(neighbours: Neighbours) -> range:
    return range(0, max(1, len(neighbours.ids)), _BLOCK_ROWS)
