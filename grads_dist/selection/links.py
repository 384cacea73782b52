"""The neighbour graph as the greedy picks walk it: symmetric, between rows that stand for their copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from grads_dist.selection.ranks import positions, ranking
from grads_dist.similarity.knn import Neighbours

_BLOCK_ROWS = 1 << 18
# Links that are looked at at once: 32 MiB for each array of int64.
_BLOCK_LINKS = 1 << 22


@dataclass(frozen=True)
class Links:
    """Symmetric links of n rows, in compressed rows."""

    starts: np.ndarray
    """int64 [n + 1], where the links of each row begin."""

    ends: np.ndarray
    """int32 or int64 [links], the other end of each."""

    cosine: np.ndarray
    """float32 [links]."""

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Some rows in pieces that have a bounded number of links, but for single rows with more."""
        reached = np.cumsum(self.starts[rows + 1] - self.starts[rows])
        total = int(reached[-1]) if len(rows) else 0
        cuts = np.searchsorted(reached, np.arange(_BLOCK_LINKS, total, _BLOCK_LINKS), side="right")
        return (piece for piece in np.split(rows, np.unique(cuts)) if len(piece))

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `ends` of all links of some rows, and for each the place in `rows` of its row."""
        counts = self.starts[rows + 1] - self.starts[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        offset = self.starts[rows] - (np.cumsum(counts) - counts)
        return np.arange(len(owner)) + offset[owner], owner


def link(
    neighbours: Neighbours,
    least: float,
    node: np.ndarray,
    part: np.ndarray | None = None,
    selves: bool = False,
) -> Links:
    """Links between rows of which either lists the other at a cosine of at least `least`.

    Args:
        neighbours: the graph of n rows.
        least: compared as float32, as which the cosines are kept.
        node: int64 [n], the row that stands for each row, -1 to leave it out; links are between these, at the
            largest cosine of any of the rows they stand for.
        part: int64 [n]; rows of different parts are not linked.
        selves: link every node to itself at cosine 1.
    """
    num_rows = len(node)
    one, other, cosine = (
        np.concatenate(x) for x in zip(*_listed(neighbours, least, node, part), strict=True)
    )
    key = one * num_rows + other
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    cosine = np.maximum.reduceat(cosine[order], first) if len(first) else cosine
    one, other = one[order[first]], other[order[first]]
    own = np.unique(node[node >= 0]) if selves else np.empty(0, np.int64)
    data = np.concatenate([cosine, cosine, np.ones(len(own), np.float32)])
    ends = np.concatenate([one, other, own]), np.concatenate([other, one, own])
    return _compress(data, ends, num_rows)


def link_pairs(one: np.ndarray, other: np.ndarray, num_rows: int) -> Links:
    """Links at cosine 1 between the rows of pairs, each of which is given once."""
    data = np.ones(2 * len(one), np.float32)
    return _compress(data, (np.concatenate([one, other]), np.concatenate([other, one])), num_rows)


def leaders(
    score: np.ndarray, allowed: np.ndarray, neighbours: Neighbours, part: np.ndarray | None = None
) -> np.ndarray:
    """For each row the best allowed row with identical features, ties by row; int64 [n], -1 where none is.

    Args:
        score: float64 [n].
        allowed: bool [n].
        neighbours: tells which rows have identical features.
        part: int64 [n]; identical rows of different parts are apart.
    """
    num_rows = len(score)
    cell = cells(neighbours, part)
    place = np.where(allowed, positions(score), num_rows)
    best = np.full(num_rows, num_rows, np.int64)
    np.minimum.at(best, cell, place)
    return np.append(ranking(score), -1)[best[cell]]


def cells(neighbours: Neighbours, part: np.ndarray | None) -> np.ndarray:
    """For each row the first row of its part with identical features, int64 [n]."""
    if part is None:
        return neighbours.group
    key = neighbours.group.astype(np.int64) * (int(part.max(initial=0)) + 1) + part
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first[inverse]


def _listed(
    neighbours: Neighbours, least: float, node: np.ndarray, part: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of different nodes with one <= other as the rows list them, in blocks; one block may be empty."""
    for start in range(0, max(1, len(node)), _BLOCK_ROWS):
        cosine = np.asarray(neighbours.cosine[start : start + _BLOCK_ROWS])
        row, column = np.nonzero(cosine >= np.float32(least))
        near = neighbours.ids[start + row, column]
        one, other = node[start + row], node[near]
        kept = (one >= 0) & (other >= 0) & (one != other)
        if part is not None:
            kept &= part[start + row] == part[near]
        one, other = one[kept], other[kept]
        yield np.minimum(one, other), np.maximum(one, other), cosine[row[kept], column[kept]]


def _compress(data: np.ndarray, ends: tuple[np.ndarray, np.ndarray], num_rows: int) -> Links:
    graph = csr_array((data, ends), shape=(num_rows, num_rows))
    return Links(graph.indptr.astype(np.int64), graph.indices, graph.data)
