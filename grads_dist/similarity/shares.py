"""The search as work that ranks share: each takes some of the queries, or some of what is searched."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grads_dist.similarity import approximate, exact_search, keys
from grads_dist.similarity.approximate import Setting
from grads_dist.similarity.backend import Backend
from grads_dist.similarity.exact_search import Find
from grads_dist.similarity.faiss_index import FaissIndex
from grads_dist.similarity.plan import Plan
from grads_dist.similarity.problem import Problem

logger = logging.getLogger(__name__)

_MIN_SHARD = 1 << 10
# Queries go to ranks in blocks of this size, so that an index sees the same blocks whoever searches.
_BLOCK_ROWS = 1 << 13
_TRUTH_ROWS = 1 << 16
_MEASURED_ROWS = 1 << 12


@dataclass(frozen=True)
class Place:
    """Which part of the work is this rank's."""

    rank: int = 0
    num_ranks: int = 1
    gpus: tuple[int, ...] = ()
    """GPUs that this rank searches on."""


@dataclass(frozen=True)
class Part:
    """Lists that one rank has found."""

    positions: np.ndarray
    """int64 [q]."""

    lists: np.ndarray
    """Keys, int64 [q, width]."""

    settings: list[Setting]
    """Of each shard of an index that is not exact."""

    seconds: dict[str, float]
    """Time of each step."""


class Searcher:
    """Searches the shares of one rank in one problem."""

    def __init__(self, problem: Problem, plan: Plan, backend: Backend, place: Place, limit: int) -> None:
        self._problem = problem
        self._plan = plan
        self._backend = backend
        self._place = place
        self._limit = limit

    def shard_rows(self, bytes_per_row: int) -> int:
        """Positions that fit into the memory of a rank at a time."""
        return max(_MIN_SHARD, self._limit // bytes_per_row)

    def search_exact(self) -> Part:
        """The true lists of this rank's queries."""
        problem, began = self._problem, time.perf_counter()
        shard_rows = self.shard_rows(4 * problem.points.dim)
        num_rows = len(problem.rows)
        if shard_rows < num_rows:
            logger.info(
                "similarity: %d vectors at a time, for %.1f GiB an index", shard_rows, self._limit / 2**30
            )
        mine = share_of(np.arange(num_rows), self._place)
        lists = exact_search.exact_lists(problem, mine, (0, num_rows), shard_rows, self._flat_index)
        return Part(mine, lists, [], {"search": time.perf_counter() - began})

    def search_index(self, trained: Callable[[], FaissIndex], goal: float) -> Part:
        """Lists from an index: this rank's queries in the whole, or all queries in this rank's shards of it.

        Args:
            trained: gives the trained, empty index, a new one each time.
            goal: recall to reach.
        """
        num_rows = len(self._problem.rows)
        few = self._problem.units(np.arange(min(num_rows, _MEASURED_ROWS)))
        shard_rows = self.shard_rows(trained().bytes_per_row(few))
        shards = [(start, min(start + shard_rows, num_rows)) for start in range(0, num_rows, shard_rows)]
        if len(shards) == 1:
            return self._search_shards(shards, trained, goal, all_queries=False)
        logger.info(
            "similarity: the index is searched in %d shards of %d rows, for %.1f GiB each",
            len(shards),
            shard_rows,
            self._limit / 2**30,
        )
        mine = shards[self._place.rank :: self._place.num_ranks]
        return self._search_shards(mine, trained, goal, all_queries=True)

    def _search_shards(
        self, shards: list[tuple[int, int]], trained: Callable[[], FaissIndex], goal: float, all_queries: bool
    ) -> Part:
        problem = self._problem
        positions = np.arange(len(problem.rows)) if all_queries else np.empty(0, np.int64)
        lists = np.full((len(positions), problem.width), keys.NONE)
        settings, seconds = [], dict.fromkeys(("add", "tune", "search"), 0.0)
        for shard in shards:
            began = time.perf_counter()
            index = trained()
            index.add(problem.blocks(*shard))
            order = index.rows_by_list()
            if self._place.gpus:
                index.to_gpus(list(self._place.gpus))
            seconds["add"] += time.perf_counter() - began
            began = time.perf_counter()
            settings.append(self._tune(index, shard, goal))
            seconds["tune"] += time.perf_counter() - began
            began = time.perf_counter()
            if not all_queries:
                # Queries of one list after another find the lists that they share in the cache.
                positions = share_of(np.arange(len(problem.rows)) if order is None else order, self._place)
                lists = np.full((len(positions), problem.width), keys.NONE)
            found = approximate.find_lists(problem, index, shard[0], positions, settings[-1].candidates)
            lists = keys.merge(lists, found, problem.width)
            seconds["search"] += time.perf_counter() - began
        return Part(positions, lists, settings, seconds)

    def _tune(self, index: FaissIndex, shard: tuple[int, int], goal: float) -> Setting:
        queries = approximate.sample_queries(*shard)
        truth = exact_search.exact_lists(self._problem, queries, shard, _TRUTH_ROWS, self._flat_index)
        return approximate.tune(self._problem, index, shard, truth, goal)

    def _flat_index(self, start: int, stop: int) -> Find:
        if self._backend.library == "faiss":
            index = FaissIndex.flat(self._problem.points.dim)
            index.add(self._problem.blocks(start, stop))
            if self._place.gpus:
                index.to_gpus(list(self._place.gpus))
            return index.search
        units = np.concatenate(list(self._problem.blocks(start, stop)))
        return importlib.import_module("grads_dist.similarity.torch_search").searcher(
            units, self._backend.device
        )


def share_of(queries: np.ndarray, place: Place) -> np.ndarray:
    """A rank's queries: every so many-th block, in the order given."""
    blocks = np.arange(len(queries)) // _BLOCK_ROWS
    return queries[blocks % place.num_ranks == place.rank]


def write_part(folder: Path, part: Part) -> None:
    """Write what a rank has found; `folder` is the rank's own."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "positions.npy", part.positions)
    np.save(folder / "lists.npy", part.lists)


def merge_parts(folders: list[Path], num_rows: int, width: int) -> np.ndarray:
    """The lists of all positions from what all ranks have found, keys int64 [m, width]."""
    merged = np.full((num_rows, width), keys.NONE)
    for folder in folders:
        positions = np.load(folder / "positions.npy", mmap_mode="r", allow_pickle=False)
        lists = np.load(folder / "lists.npy", mmap_mode="r", allow_pickle=False)
        for start in range(0, len(positions), _BLOCK_ROWS):
            block = np.asarray(positions[start : start + _BLOCK_ROWS])
            merged[block] = keys.merge(merged[block], lists[start : start + _BLOCK_ROWS], width)
    return merged
