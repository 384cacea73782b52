"""Finding a graph: what is searched, by which index, who does what, and the lists of all rows at the end."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from grads_dist.errors import ConfigError
from grads_dist.similarity import approximate, faiss_index, keys, store
from grads_dist.similarity.approximate import Setting
from grads_dist.similarity.backend import Backend
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.faiss_index import FaissIndex
from grads_dist.similarity.graph import Neighbours, Search
from grads_dist.similarity.memory import index_limit
from grads_dist.similarity.plan import Plan, plan_index
from grads_dist.similarity.points import UnitRows
from grads_dist.similarity.problem import Lists, Problem, make_problem
from grads_dist.similarity.shares import Place, Searcher, merge_parts, write_part

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")
_BLOCK_ROWS = 1 << 16
_PARTS = ".parts"


@dataclass(frozen=True)
class Found:
    """What a search has found, before it is a graph; without lists on all ranks but the first."""

    problem: Problem
    lists: np.ndarray
    search: Search

    def graph(self) -> Neighbours:
        """The graph in memory."""
        ids = np.concatenate([self._empty(np.int32), *map(keys.rows_of, self._all_rows())])
        cosine = np.concatenate([self._empty(np.float32), *map(keys.cosines_of, self._all_rows())])
        return Neighbours(ids, cosine, self.problem.group, self.search)

    def write(self, folder: Path, key: str) -> None:
        """Write the graph to its folder."""
        shape = (self.problem.points.num_rows, self.problem.num_neighbours)
        store.write_array(folder, "ids", shape, map(keys.rows_of, self._all_rows()))
        store.write_array(folder, "cosine", shape, map(keys.cosines_of, self._all_rows()))
        store.write_array(folder, "group", shape[:1], iter([self.problem.group]))
        store.finish(folder, key, self.search)

    def _all_rows(self) -> Iterator[np.ndarray]:
        """Keys of the neighbours of every row, in blocks."""
        problem, expand = self.problem, Lists(self.problem).expand
        position = np.full(problem.points.num_rows, -1, np.int64)
        position[problem.rows] = np.arange(len(problem.rows))
        directed = problem.points.has_direction
        for start in range(0, problem.points.num_rows, _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, problem.points.num_rows))
            some = directed[rows]
            found = np.full((len(rows), problem.num_neighbours), keys.NONE)
            lists = self.lists[position[problem.group[rows[some]]]]
            found[some] = keys.without_row(expand(lists), rows[some])
            yield found

    def _empty(self, dtype: type) -> np.ndarray:
        return np.empty((0, self.problem.num_neighbours), dtype)


def build(
    points: UnitRows, config: SimilarityConfig, backend: Backend, folder: Path, ranks: Ranks | None
) -> Found:
    """Search for the neighbours; `folder` is for what ranks hand to each other. Arguments as for `knn`."""
    began = time.perf_counter()
    problem = make_problem(points, config.k)
    plan = plan_index(config, backend, len(problem.rows), points.dim)
    _log_start(problem, plan, backend)
    _check_alike(ranks, plan, backend)
    place = _place(backend, ranks)
    limit = min(_gathered(ranks, index_limit(backend.device, _num_local(ranks))))
    searcher = Searcher(problem, plan, backend, place, limit)
    seconds = {"prepare": time.perf_counter() - began}
    parts = folder / _PARTS
    on_main(ranks, lambda: _clear(parts))
    if plan.index == "exact":
        part = agreed(ranks, searcher.search_exact)
    else:
        began = time.perf_counter()
        path = parts / "trained.faiss"

        def read_trained() -> FaissIndex:
            return FaissIndex.read(path, plan.index)

        on_main(ranks, lambda: approximate.train(problem, plan.index).write(path))
        seconds["train"] = time.perf_counter() - began
        part = agreed(ranks, lambda: searcher.search_index(read_trained, config.recall))
    write_part(parts / str(place.rank), part)
    # All parts are written when all settings are here.
    settings = [setting for some in _gathered(ranks, part.settings) for setting in some]
    folders = [parts / str(rank) for rank in range(place.num_ranks)]
    lists = merge_parts(folders, len(problem.rows), problem.width) if place.rank == 0 else np.empty((0, 0))
    on_main(ranks, lambda: shutil.rmtree(parts))
    recall = _recall(settings, plan, config.recall)
    search = Search(
        library=backend.library,
        device=backend.device,
        index=plan.index,
        reason=f"{plan.reason}; {backend.reason}",
        exact=recall is None,
        recall=recall,
        seconds=seconds | part.seconds,
    )
    return Found(problem, lists, search)


def on_main(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, on all ranks."""
    return work() if ranks is None else ranks.on_main(work)


def agreed(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """The result of `work` on every rank; the error of one is raised on all."""
    if ranks is None:
        return work()

    def patient() -> T:
        try:
            return work()
        finally:
            # Ranks may be done at very different times; a barrier does not mind.
            ranks.barrier()

    return ranks.on_all(patient)


def _check_alike(ranks: Ranks | None, plan: Plan, backend: Backend) -> None:
    """Ranks that searched in different ways would wait for each other for ever."""
    if ranks is None:
        return
    ways = ranks.gather(f"{plan.index} with {backend.library} on {backend.device}")
    differing = next((rank for rank, way in enumerate(ways) if way != ways[0]), None)
    if differing is not None:
        ranks.agree(
            ConfigError(
                f"similarity: rank 0 would search {ways[0]}, rank {differing} {ways[differing]}; "
                "give similarity.index, library and device that all nodes have"
            )
        )


def _gathered(ranks: Ranks | None, value: T) -> list[T]:
    return [value] if ranks is None else ranks.gather(value)


def _place(backend: Backend, ranks: Ranks | None) -> Place:
    on_gpus = backend.library == "faiss" and backend.device == "cuda"
    if ranks is None or ranks.world_size == 1:
        return Place(gpus=tuple(range(faiss_index.num_gpus())) if on_gpus else ())
    return Place(ranks.rank, ranks.world_size, (ranks.device.index or 0,) if on_gpus else ())


def _num_local(ranks: Ranks | None) -> int:
    return 1 if ranks is None else ranks.placement.local_world_size


def _clear(parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)


def _log_start(problem: Problem, plan: Plan, backend: Backend) -> None:
    points = problem.points
    num_lost = points.num_rows - int(points.has_direction.sum())
    if num_lost > 0:
        logger.warning(
            "%d of %d rows have no direction in the feature space and so no neighbours",
            num_lost,
            points.num_rows,
        )
    logger.info(
        "similarity: %d different rows of %d x %d features, index %s (%s) with %s on %s (%s)",
        len(problem.rows),
        points.num_rows,
        points.dim,
        plan.index,
        plan.reason,
        backend.library,
        backend.device,
        backend.reason,
    )


def _recall(settings: list[Setting], plan: Plan, goal: float) -> float | None:
    """Mean over the shards of an index, logged; None where the search was exact."""
    if not settings:
        return None
    recall = float(np.mean([setting.recall for setting in settings]))
    efforts = sorted({setting.effort for setting in settings})
    candidates = max(setting.candidates for setting in settings)
    told = (plan.index, recall, "/".join(map(str, efforts)), candidates)
    line = "similarity: %s finds %.4f of a sample's true neighbours (effort %s, %d candidates a place)"
    if recall < goal:
        logger.warning(line + ", and no more; similarity.recall asks for %s", *told, goal)
    else:
        logger.info(line, *told)
    return recall
