"""Near-duplicates: of rows that are too close to each other only the best is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grads_dist.selection.links import Links, leaders, link, link_pairs
from grads_dist.selection.ranks import ranking
from grads_dist.selection.redundancy import last_cosine
from grads_dist.selection.rounds import settle
from grads_dist.similarity.exact import close_pairs, nearest_cosine
from grads_dist.similarity.knn import Neighbours
from grads_dist.similarity.points import UnitRows

logger = logging.getLogger(__name__)

# So many rows are compared pair by pair at once, each with all others: at most 8 million pairs.
_SLAB_ROWS = 1 << 12
_BLOCK_ROWS = 1 << 18
MOST_PRODUCTS = 4 * 10**12
"""Multiplications that are spent on checking rows against each other where the graph is approximate."""


@dataclass(frozen=True)
class Distinct:
    """The rows that are left."""

    kept: np.ndarray
    """bool [n]."""

    exact: bool
    """Whether certainly no two of them are too close."""


class NearDuplicates:
    """Finds rows that are closer than a threshold, in a graph and, where it does not tell, exactly."""

    def __init__(self, neighbours: Neighbours, points: UnitRows | None, threshold: float) -> None:
        self.neighbours, self.points, self.threshold = neighbours, points, threshold
        self.graph_is_exact = neighbours.search is None or neighbours.search.exact

    def drop(self, score: np.ndarray, allowed: np.ndarray) -> Distinct:
        """Walk the allowed rows from the best, and drop those that are too close to one kept before.

        Either lists the other at a cosine of at least the threshold, or their features are identical, or
        both list only rows as close as that, so that the graph does not tell, and their cosine is.

        Args:
            score: float64 [n]; ties go to the earlier row.
            allowed: bool [n].
        """
        leader = leaders(score, allowed, self.neighbours)
        links = link(self.neighbours, self.threshold, leader)
        order = ranking(score)
        order = order[(leader == np.arange(len(leader)))[order]]
        unsure = self._crowded()
        num_unsure = int(np.count_nonzero(unsure[order]))
        certain = self.graph_is_exact
        if num_unsure > 1 and not (self.points is not None and (certain or self._affordable(num_unsure))):
            unsure[:], certain = False, False
        elif num_unsure > 1:
            logger.info("near-duplicates: %d rows may be close to more than they list; compared", num_unsure)
        return Distinct(self._walk(order, links, unsure), certain)

    def check(self, score: np.ndarray, picked: np.ndarray, checked: np.ndarray) -> np.ndarray | None:
        """Rows among the picked that are too close to better ones, row numbers; None if that costs too much.

        Args:
            score: float64 [n].
            picked: bool [n].
            checked: bool [n], rows that an earlier check found to be distinct; these stay.
        """
        if self.points is None or not self._affordable(int(np.count_nonzero(picked))):
            return None
        order = ranking(score)
        new = order[(picked & ~checked)[order]]
        close = self._close(new, np.flatnonzero(picked & checked))
        nothing = link_pairs(np.empty(0, np.int64), np.empty(0, np.int64), len(score))
        kept = self._walk(new[~close], nothing, np.ones(len(score), bool))
        return new[~kept[new]]

    def _walk(self, order: np.ndarray, links: Links, unsure: np.ndarray) -> np.ndarray:
        """Keep rows in their order, in slabs; those that are unsure are compared exactly with each other."""
        kept, dropped = np.zeros(len(unsure), bool), np.zeros(len(unsure), bool)
        for slab, later in _slabs(order, unsure, dropped):
            one, other = self._pairs(slab, links, unsure)
            now = slab[_first_distinct(one, other, len(slab))]
            kept[now] = True
            for rows in links.blocks(now):
                dropped[links.ends[links.of(rows)[0]]] = True
            later = later[~dropped[later]]
            dropped[later[self._close(later, now[unsure[now]])]] = True
        return kept

    def _pairs(self, slab: np.ndarray, links: Links, unsure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of places in the slab whose rows are too close."""
        place = np.full(len(unsure), -1, np.int64)
        place[slab] = np.arange(len(slab))
        pairs = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for rows in links.blocks(slab):
            at, owner = links.of(rows)
            one, other = place[rows[owner]], place[links.ends[at]]
            pairs.append((one[one < other], other[one < other]))
        members = slab[unsure[slab]]
        if len(members) > 1 and self.points is not None:
            one, other = (place[rows] for rows in close_pairs(self.points, members, self.threshold))
            pairs.append((one, other))
        one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        return one[one >= 0], other[one >= 0]

    def _crowded(self) -> np.ndarray:
        """Rows that may be close to more rows than they list, bool [n]."""
        ids = self.neighbours.ids
        crowded = np.zeros(len(ids), bool)
        if ids.shape[1] < len(ids) - 1:
            for start in range(0, len(ids), _BLOCK_ROWS):
                last = last_cosine(self.neighbours, start, start + _BLOCK_ROWS)
                crowded[start : start + _BLOCK_ROWS] = last >= np.float32(self.threshold)
        return crowded

    def _close(self, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Which rows are too close to one of those kept, bool."""
        if len(rows) == 0 or len(kept) == 0 or self.points is None:
            return np.zeros(len(rows), bool)
        return nearest_cosine(self.points, rows, kept) >= np.float32(self.threshold)

    def _affordable(self, num_rows: int) -> bool:
        return self.points is not None and num_rows**2 * self.points.dim <= MOST_PRODUCTS


def _slabs(
    order: np.ndarray, unsure: np.ndarray, dropped: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in order with a bounded number of unsure ones, and the unsure ones after them; not the dropped."""
    while len(order):
        order = order[~dropped[order]]
        places = np.flatnonzero(unsure[order])
        stop = len(order) if len(places) <= _SLAB_ROWS else int(places[_SLAB_ROWS])
        yield order[:stop], order[places[_SLAB_ROWS:]]
        order = order[stop:]


def _first_distinct(one: np.ndarray, other: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows 0 .. num_rows - 1 that are linked to no earlier one of them, bool."""
    value = -np.arange(num_rows, dtype=np.float64)

    def fall(rows: np.ndarray, closest: np.ndarray) -> np.ndarray:
        return np.full(len(rows), -np.inf)

    return settle(link_pairs(one, other, num_rows), value, np.ones(num_rows, bool), fall)
