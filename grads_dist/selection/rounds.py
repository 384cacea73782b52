"""Greedy picks on a sparse graph without a loop over rows: rows whose turn is certain settle together.

A greedy pick takes the best row, lowers the values of rows linked to it, and begins again. Values only fall.
Take a row that is better than every open row whose pick could lower its value, or whose value its pick
could lower. It comes before all of these in the greedy order: none of them can overtake it, and until one of
them is taken its value stays as it is. So its present value is its final one, what it lowers comes after it,
and all such rows can settle at once. As the values at which rows are taken only fall, the greedy order is
that of the settled values, ties by row.

Rows wait for a rival that beats them and are looked at again when this rival has changed, so that the work
is in proportion to the links of the rows that change. The number of rounds is the longest chain of rivals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grads_dist.selection.links import Links
from grads_dist.selection.quota import Enough


def settle(
    links: Links,
    value: np.ndarray,
    opened: np.ndarray,
    fall: Callable[[np.ndarray, np.ndarray], np.ndarray],
    enough: Enough | None = None,
) -> np.ndarray:
    """Settle rows in greedy order; returns which have settled, bool [n].

    Args:
        links: what a pick lowers.
        value: float64 [n], lowered in place: final for settled rows, an upper bound for others.
        opened: bool [n], rows that can be picked; changed in place.
        fall: from rows and their largest cosine to a settled row to their new values, at most the old ones;
            -inf closes a row.
        enough: closes rows that the budget cannot reach any more.
    """
    settled = np.zeros(len(value), bool)
    closest = np.full(len(value), -np.inf, np.float32)
    rival = np.full(len(value), -1, np.int64)
    looked_at = np.flatnonzero(opened)
    while len(looked_at):
        for rows in links.blocks(looked_at):
            rival[rows] = _rivals(links, rows, value, opened, closest)
        now = looked_at[rival[looked_at] < 0]
        settled[now], opened[now] = True, False
        lowered = _approach(links, now, opened, closest)
        value[lowered] = fall(lowered, closest[lowered])
        opened[lowered[np.isneginf(value[lowered])]] = False
        if enough is not None:
            enough.close(settled, value, opened)
        waiting = _waiting(links, np.concatenate([now, lowered]), opened, rival)
        looked_at = np.union1d(waiting, lowered[opened[lowered]])
    return settled


def _beats(value: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether rows `one` come before rows `other`: by value, ties by row."""
    return (value[one] > value[other]) | ((value[one] == value[other]) & (one < other))


def _rivals(
    links: Links, rows: np.ndarray, value: np.ndarray, opened: np.ndarray, closest: np.ndarray
) -> np.ndarray:
    """For each row an open row that beats it, the pick of either lowering the other's value; -1 for none."""
    at, owner = links.of(rows)
    ends, cosine = links.ends[at], links.cosine[at]
    matters = opened[ends] & ((cosine > closest[rows][owner]) | (cosine > closest[ends]))
    ends, owner = ends[matters], owner[matters]
    better = _beats(value, ends, rows[owner])
    found = np.full(len(rows), -1, np.int64)
    found[owner[better]] = ends[better]
    return found


def _approach(links: Links, now: np.ndarray, opened: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """Raise `closest` of the open rows linked to those just settled; returns the rows where it rose."""
    raised = [np.empty(0, np.int64)]
    for rows in links.blocks(now):
        at, _ = links.of(rows)
        ends, cosine = links.ends[at], links.cosine[at]
        nearer = opened[ends] & (cosine > closest[ends])
        np.maximum.at(closest, ends[nearer], cosine[nearer])
        raised.append(ends[nearer])
    return np.unique(np.concatenate(raised))


def _waiting(links: Links, changed: np.ndarray, opened: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """The open rows whose rival has changed."""
    found = [np.empty(0, np.int64)]
    for rows in links.blocks(changed):
        at, owner = links.of(rows)
        ends = links.ends[at]
        found.append(ends[opened[ends] & (rival[ends] == rows[owner])])
    return np.concatenate(found)
