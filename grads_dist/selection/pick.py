"""From a score a row to the rows that are selected."""

from __future__ import annotations

import numpy as np

from grads_dist.selection.budget import Budget, take
from grads_dist.selection.ranks import positions, ranking
from grads_dist.similarity.knn import Neighbours


def top_k(score: np.ndarray, eligible: np.ndarray, num_tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """Mark the best eligible rows that the budget allows, bool [n]; ties go to the earlier row.

    Args:
        score: float64 [n].
        eligible: bool [n], rows that may be picked, see `keep_distinct`.
        num_tokens: tokens a row, int [n].
        budget: how much is picked.
    """
    order = ranking(score)
    chosen = np.zeros(len(score), bool)
    chosen[take(order[eligible[order]], num_tokens, budget)] = True
    return chosen


def keep_distinct(
    score: np.ndarray, eligible: np.ndarray, neighbours: Neighbours, threshold: float
) -> np.ndarray:
    """Walk the eligible rows from the best, keep those that no kept row is too close to, bool [n].

    Two rows are too close when either lists the other at a cosine of at least `threshold`, or when their
    features are identical. The graph lists k neighbours a row: in a cluster of more than k near-duplicates
    that are not identical, close rows can miss each other and both be kept (docs/selection.md,
    "Near-duplicates").
    """
    num_rows = len(score)
    place = np.where(eligible, positions(score), num_rows)
    # The best of the rows with identical features stands for all of them, with all their edges.
    best = np.full(num_rows, num_rows, np.int64)
    np.minimum.at(best, neighbours.group, place)
    leader = best[neighbours.group]
    dropped = np.zeros(num_rows + 1, bool)
    _drop_successors(dropped, *_edges(neighbours, leader, threshold, num_rows))
    return eligible & (place == leader) & ~dropped[place]


def _edges(
    neighbours: Neighbours, leader: np.ndarray, threshold: float, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places (earlier, later) of group leaders at least as close as the threshold, by the earlier."""
    # Cosines are float32: compared with the threshold as float32, 0.9 is at least 0.9.
    row, column = np.nonzero(neighbours.cosine >= np.float32(threshold))
    one, other = leader[row], leader[neighbours.ids[row, column]]
    earlier, later = np.minimum(one, other), np.maximum(one, other)
    proper = (earlier != later) & (later < num_rows)
    earlier, later = earlier[proper], later[proper]
    order = np.argsort(earlier, kind="stable")
    return earlier[order], later[order]


def _drop_successors(dropped: np.ndarray, earlier: np.ndarray, later: np.ndarray) -> None:
    """Mark in `dropped` the later ends of every kept earlier end; one step for each row with an edge."""
    places, starts, counts = np.unique(earlier, return_index=True, return_counts=True)
    for place, start, count in zip(places.tolist(), starts.tolist(), counts.tolist(), strict=True):
        if not dropped[place]:
            dropped[later[start : start + count]] = True
