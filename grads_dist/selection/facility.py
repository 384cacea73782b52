"""Facility location: the rows that are worth most by G and together come closest to every row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grads_dist.selection.config import Weights
from grads_dist.selection.links import Links, cells, leaders, link
from grads_dist.selection.quota import Enough
from grads_dist.similarity.knn import Neighbours

# Cosines have 6 decimals, so that their sums have; without rounding, equal sums would not be ties.
_DECIMALS = 9
_LEAST = float(np.finfo(np.float32).tiny)
_NONE = np.empty(0, np.int64)


def facility_values(
    gradient: np.ndarray,
    weights: Weights,
    neighbours: Neighbours,
    allowed: np.ndarray,
    part: np.ndarray,
    enough: Enough | None = None,
) -> np.ndarray:
    """The gain with which the greedy pick takes each row (docs/selection.md, "Picks"), float64 [n].

    w_g G_j + w_d sum_i max(0, s_ij - the largest s of row i to a picked row), over all rows i of the part.
    What `enough` closed has an upper bound instead, and rows that are not allowed have -inf.

    Args:
        gradient: G, float64 [n].
        weights: those of G and D count.
        neighbours: the graph of n rows.
        allowed: bool [n], rows that can be picked; all rows want to be covered.
        part: int64 [n]; rows of different parts do not see each other.
        enough: stops where the budget is certain.
    """
    # Rows with identical features cover the same: the best by G comes first, and then the others cover
    # nothing. They are one place, which counts as many times as there are rows.
    value = np.where(allowed, np.round(weights.g * gradient, _DECIMALS), -np.inf)
    leader = leaders(value, allowed, neighbours, part)
    node = np.where(leader >= 0, leader, cells(neighbours, part))
    opened = leader == np.arange(len(value))
    links = link(neighbours, _LEAST, node, part, selves=True)
    _Greedy(links, np.bincount(node, minlength=len(node)), value, opened, weights.d, enough).run()
    return value


class _Greedy:
    """The rounds of rounds.py where gains overlap: rows are rivals if both would cover a place more."""

    def __init__(
        self,
        links: Links,
        mass: np.ndarray,
        value: np.ndarray,
        opened: np.ndarray,
        weight: float,
        enough: Enough | None,
    ) -> None:
        num_rows = len(value)
        self.links, self.mass, self.value, self.opened = links, mass, value, opened
        self.own = value.copy()
        self.weight, self.enough = weight, enough
        self.settled = np.zeros(num_rows, bool)
        self.cover = np.zeros(num_rows, np.float32)
        # The best open row that would cover a place more; of an open row, a place that another is best for.
        self.best = np.full(num_rows, -1, np.int64)
        self.blocked = np.full(num_rows, -1, np.int64)

    def run(self) -> None:
        """Settle all rows, or as many as it takes."""
        looked_at = np.flatnonzero(self.opened)
        self._evaluate(looked_at)
        self._find_best(np.flatnonzero(np.diff(self.links.starts)))
        while len(looked_at):
            for rows in self.links.blocks(looked_at):
                self.blocked[rows] = self._find_blocked(rows)
            now = looked_at[self.blocked[looked_at] < 0]
            self.settled[now], self.opened[now] = True, False
            covered, lowered = self._cover(now)
            self._evaluate(lowered)
            if self.enough is not None:
                self.enough.close(self.settled, self.value, self.opened)
            changed = np.concatenate([now, lowered])
            lost = self._ends(changed, lambda rows, places: self.best[places] == rows)
            places = np.union1d(covered, lost)
            self._find_best(places)
            looked_at = self._ends(
                places, lambda places, rows: self.opened[rows] & (self.blocked[rows] == places)
            )

    def _evaluate(self, rows: np.ndarray) -> None:
        """Bring the gains of some open rows up to date."""
        for piece in self.links.blocks(rows):
            at, owner = self.links.of(piece)
            ends = self.links.ends[at]
            more = np.maximum(self.links.cosine[at].astype(np.float64) - self.cover[ends], 0.0)
            gain = np.bincount(owner, weights=self.mass[ends] * more, minlength=len(piece))
            self.value[piece] = np.round(self.own[piece] + self.weight * gain, _DECIMALS)

    def _find_blocked(self, rows: np.ndarray) -> np.ndarray:
        """For each open row a place that it would cover more and another is the best for, -1 for none."""
        at, owner = self.links.of(rows)
        places = self.links.ends[at]
        other = (self.links.cosine[at] > self.cover[places]) & (self.best[places] != rows[owner])
        found = np.full(len(rows), -1, np.int64)
        found[owner[other]] = places[other]
        return found

    def _find_best(self, places: np.ndarray) -> None:
        """Bring up to date which open row is the best that would cover each of some places more."""
        for piece in self.links.blocks(places):
            at, owner = self.links.of(piece)
            rows = self.links.ends[at]
            matters = self.opened[rows] & (self.links.cosine[at] > self.cover[piece][owner])
            rows, owner = rows[matters].astype(np.int64), owner[matters]
            highest = np.full(len(piece), -np.inf)
            np.maximum.at(highest, owner, self.value[rows])
            top = self.value[rows] == highest[owner]
            best = np.full(len(piece), len(self.value), np.int64)
            np.minimum.at(best, owner[top], rows[top])
            self.best[piece] = np.where(best < len(self.value), best, -1)

    def _cover(self, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cover what the rows just settled would; returns the places, and open rows whose gain falls."""
        covered, cosine, lowered = [_NONE], [np.empty(0, np.float32)], [_NONE]
        for piece in self.links.blocks(now):
            at, _ = self.links.of(piece)
            more = self.links.cosine[at] > self.cover[self.links.ends[at]]
            covered.append(self.links.ends[at[more]])
            cosine.append(self.links.cosine[at[more]])
        # No place is covered by two of them: each is the best of its places.
        places = np.concatenate(covered)
        for piece in self.links.blocks(places):
            at, owner = self.links.of(piece)
            rows = self.links.ends[at]
            lowered.append(rows[self.opened[rows] & (self.links.cosine[at] > self.cover[piece][owner])])
        self.cover[places] = np.concatenate(cosine)
        return places, np.unique(np.concatenate(lowered))

    def _ends(self, rows: np.ndarray, test: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """The other ends of those links of some rows that pass a test of (row, other end); rising."""
        found = [_NONE]
        for piece in self.links.blocks(rows):
            at, owner = self.links.of(piece)
            ends = self.links.ends[at]
            found.append(ends[test(piece[owner], ends)])
        return np.unique(np.concatenate(found))
