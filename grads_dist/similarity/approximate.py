"""Neighbours by an index that does not compare all rows, and looks as hard as the recall it measures asks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grads_dist.similarity import keys
from grads_dist.similarity.clusters import learn_centres
from grads_dist.similarity.faiss_index import FaissIndex
from grads_dist.similarity.problem import Problem

logger = logging.getLogger(__name__)

SEED = 0
"""Of the rows that an index is trained on, and of those that its recall is measured on."""
_SAMPLE_QUERIES = 1000
_ROWS_PER_LIST = 40
_TRAINING_ROWS = 1 << 16
_QUERY_ROWS = 1 << 13
_FIRST_EFFORT = 4
_MAX_CANDIDATES = 16
# Below this gain of a doubled effort it is the codes that hide neighbours, and more candidates help.
_SMALL_GAIN = 0.01


@dataclass(frozen=True)
class Setting:
    """How hard an index looks, and what it finds then."""

    effort: int
    """nprobe or efSearch; 0 where the index has neither."""

    candidates: int
    """Rows that are taken from the index for each place of a list, to be ranked by their true cosines."""

    recall: float


def train(problem: Problem, name: str) -> FaissIndex:
    """An empty index of this factory string that has learnt from a sample of the rows.

    Raises ConfigError where faiss cannot make it or train it.
    """
    index = FaissIndex.by_name(name, problem.points.dim)
    draw = np.random.default_rng(SEED)
    num_rows = max(_TRAINING_ROWS, _ROWS_PER_LIST * index.num_lists)
    sample = np.sort(draw.permutation(len(problem.rows))[:num_rows])
    units = problem.units(sample)
    if 0 < index.num_lists <= len(units):
        index.set_centres(learn_centres(units, index.num_lists, SEED))
    index.train(units)
    return index


def sample_queries(start: int, stop: int) -> np.ndarray:
    """Positions that recall is measured on, rising, int64."""
    draw = np.random.default_rng(SEED)
    return np.sort(start + draw.permutation(stop - start)[:_SAMPLE_QUERIES])


def tune(
    problem: Problem, index: FaissIndex, base: tuple[int, int], truth: np.ndarray, goal: float
) -> Setting:
    """Look harder until the sample's true neighbours are found, then only as hard as that takes.

    Args:
        problem: the rows.
        index: holds the positions of `base`.
        base: first and last + 1 position that it holds.
        truth: the true lists of `sample_queries(*base)`.
        goal: recall to reach.
    """
    queries = sample_queries(*base)

    def attempt(effort: int, candidates: int) -> Setting:
        if effort:
            index.set_effort(effort)
        lists = find_lists(problem, index, base[0], queries, candidates)
        found = Setting(effort, candidates, recall_of(problem, queries, lists, truth))
        logger.debug("similarity: %s %d, %d candidates: recall %.4f", index.effort_name, *_numbers(found))
        return found

    now = attempt(min(_FIRST_EFFORT, index.max_effort) if index.effort_name else 0, 1)
    below = now
    while now.recall < goal:
        harder = _harder(now, below, index)
        if harder is None:
            return now
        below, now = now, attempt(*harder)
    return _least(attempt, below, now, goal)


def recall_of(problem: Problem, queries: np.ndarray, lists: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours that were found; at equal cosine one is as good as another."""
    rows = problem.rows[queries]
    own = keys.without_row(lists, rows)
    true = keys.without_row(truth, rows)
    known = true != keys.NONE
    last = np.where(known, true, -1).max(axis=1, keepdims=True, initial=-1) | 0xFFFFFFFF
    hits = ((own != keys.NONE) & (own <= last)).sum()
    return float(hits / max(1, known.sum()))


def find_lists(
    problem: Problem, index: FaissIndex, first_position: int, queries: np.ndarray, candidates: int
) -> np.ndarray:
    """The nearest positions that the index finds for each query, ranked by true cosines; keys [q, width].

    Args:
        problem: the rows.
        index: its row 0 is position `first_position`.
        first_position: see there.
        queries: int64 [q], positions.
        candidates: rows that are ranked for each place of a list.
    """
    lists = np.empty((len(queries), problem.width), np.int64)
    num_results = candidates * problem.width + problem.width // 2
    for first in range(0, len(queries), _QUERY_ROWS):
        block = queries[first : first + _QUERY_ROWS]
        found = index.search(problem.units(block), num_results)[1]
        rows = np.where(found >= 0, problem.rows[np.maximum(found, 0) + first_position], -1)
        own = problem.rows[block]
        # Codes may hide a row from itself, and with it the rows that are identical.
        rows = np.concatenate([np.where(rows == own[:, None], -1, rows), own[:, None]], axis=1)
        named = keys.measured_keys(problem.points, own, rows)
        lists[first : first + len(block)] = keys.without_repeats(named)[:, : problem.width]
    return lists


def _harder(now: Setting, below: Setting, index: FaissIndex) -> tuple[int, int] | None:
    """The next effort and number of candidates; None at the end of both."""
    can_widen = index.effort_name is not None and now.effort < index.max_effort
    can_deepen = now.candidates < _MAX_CANDIDATES
    stuck = now is not below and now.recall - below.recall < _SMALL_GAIN
    if can_widen and not (stuck and can_deepen):
        return min(2 * now.effort, index.max_effort), now.candidates
    return (now.effort, 2 * now.candidates) if can_deepen else None


def _least(attempt: Callable[[int, int], Setting], below: Setting, reached: Setting, goal: float) -> Setting:
    """The smallest effort that still reaches the goal, to an eighth, between the last two that were tried."""
    low, high = below.effort, reached
    while below.candidates == reached.candidates and high.effort - low > max(1, high.effort // 8):
        middle = attempt((low + high.effort) // 2, high.candidates)
        if middle.recall >= goal:
            high = middle
        else:
            low = middle.effort
    return high


def _numbers(setting: Setting) -> tuple[int, int, float]:
    return setting.effort, setting.candidates, setting.recall
