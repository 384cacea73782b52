"""Searching with faiss; the only module that imports it.

faiss is imported inside the functions and after torch: loaded first, its CUDA libraries can break torch's.

On the CPU every call is single-threaded and takes a block of fixed size; several threads take a block each.
So results do not depend on the number of threads. With one and with two of faiss's own threads an index of
the same rows was seen to give different scores.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from grads_dist.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
_QUERY_ROWS = 1 << 10
_ADDED_ROWS = 1 << 14
# By what faiss calls the width of a search, in the order in which they are looked for.
_EFFORTS = ("nprobe", "efSearch")
_HNSW_MAX_EFFORT = 1 << 12
_GPU_MAX_EFFORT = 1 << 11


def is_installed() -> bool:
    """Whether faiss can be imported."""
    return importlib.util.find_spec("faiss") is not None


def num_gpus() -> int:
    """GPUs that the installed faiss can search on; 0 for the CPU build."""
    faiss = _load()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


class FaissIndex:
    """An inner-product index over float32 vectors; rows are numbered as they are added."""

    def __init__(self, index: Any, name: str) -> None:
        self._faiss = _load()
        self._index = index
        self._name = name
        self._on_gpu = False
        self.effort_name = self._find_effort()
        """The parameter that trades time for recall, nprobe or efSearch; None where there is none."""

    @staticmethod
    def flat(dim: int) -> FaissIndex:
        """An index that compares with every row."""
        return FaissIndex(_load().IndexFlatIP(dim), "Flat")

    @staticmethod
    def by_name(name: str, dim: int) -> FaissIndex:
        """An empty index from a factory string; raises ConfigError where faiss cannot make one."""
        faiss = _load()
        index = _tried(name, lambda: faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT))
        return FaissIndex(index, name)

    @staticmethod
    def read(path: Path, name: str) -> FaissIndex:
        """An index that `write` has written."""
        return FaissIndex(_load().read_index(str(path)), name)

    def write(self, path: Path) -> None:
        """Write the index as it is, trained or not, filled or not."""
        self._faiss.write_index(self._index, str(path))

    @property
    def num_lists(self) -> int:
        """Lists of an inverted file, 0 for other indices."""
        ivf = self._inverted_file()
        return 0 if ivf is None else int(ivf.nlist)

    def bytes_per_row(self, units: np.ndarray) -> int:
        """Memory of an added row; where it is not known, what these few rows take when they are added."""
        index = self._faiss.downcast_index(self._index)
        if isinstance(index, self._faiss.IndexIVF):
            return int(index.code_size) + 8
        empty = len(self._faiss.serialize_index(self._index))
        self.add([units])
        return -(-(len(self._faiss.serialize_index(self._index)) - empty) // len(units))

    @property
    def max_effort(self) -> int:
        """The largest useful value of the parameter that trades time for recall."""
        largest = self.num_lists if self.effort_name == "nprobe" else _HNSW_MAX_EFFORT
        return min(largest, _GPU_MAX_EFFORT) if self._on_gpu else largest

    def set_centres(self, centres: np.ndarray) -> bool:
        """Give an inverted file its centres instead of having it learn them; False where it has others.

        Only a file that searches its centres exactly, in the space of the rows, takes them.
        """
        index = self._faiss.downcast_index(self._index)
        if not isinstance(index, self._faiss.IndexIVF):
            return False
        plain = (self._faiss.IndexFlat, self._faiss.IndexFlatIP)
        if type(self._faiss.downcast_index(index.quantizer)) not in plain:
            return False
        index.quantizer.add(np.ascontiguousarray(centres))
        return True

    def train(self, units: np.ndarray) -> None:
        """Learn centres and codes from a sample; raises ConfigError where it is too small."""
        _tried(self._name, lambda: self._alone(lambda: self._index.train(units)))

    def add(self, blocks: Iterable[np.ndarray]) -> None:
        """Append blocks of rows, float32 [any, dim], in order."""

        def add_all() -> None:
            for block in blocks:
                for start in range(0, len(block), _ADDED_ROWS):
                    self._index.add(block[start : start + _ADDED_ROWS])

        _tried(self._name, lambda: self._alone(add_all))

    def to_gpus(self, gpus: list[int]) -> None:
        """Move the filled index to GPUs: a copy each, which share the queries out."""
        resources = [self._faiss.StandardGpuResources() for _ in gpus]
        try:
            self._index = self._faiss.index_cpu_to_gpu_multiple_py(resources, self._index, gpus=gpus)
        except RuntimeError as error:
            logger.warning("similarity: %s stays on the CPU: %s", self._name, _one_line(error))
            return
        self._on_gpu = True

    def set_effort(self, value: int) -> None:
        """Set the parameter `effort_name`."""
        space = self._faiss.GpuParameterSpace() if self._on_gpu else self._faiss.ParameterSpace()
        space.set_index_parameter(self._index, self.effort_name, value)

    def search(self, units: np.ndarray, num_results: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that it finds with the largest inner products with each query.

        Args:
            units: float32 [q, dim].
            num_results: results a query.

        Returns:
            Scores float32 [q, num_results], falling, and row numbers int64, -1 where fewer were found.
        """
        if self._on_gpu:
            return self._index.search(units, num_results)
        pieces = [units[start : start + _QUERY_ROWS] for start in range(0, len(units), _QUERY_ROWS)]
        found = list(in_threads(lambda piece: self._index.search(piece, num_results), pieces))
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def rows_by_list(self) -> np.ndarray | None:
        """All rows in the order of the lists that hold them, int64; None where there are no such lists."""
        ivf = self._inverted_file()
        if ivf is None:
            return None
        lists = ivf.invlists
        sizes = [lists.list_size(number) for number in range(ivf.nlist)]
        rows = [
            self._faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
            for number, size in enumerate(sizes)
            if size > 0
        ]
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def _inverted_file(self) -> Any:
        return None if self._on_gpu else self._faiss.try_extract_index_ivf(self._index)

    def _find_effort(self) -> str | None:
        for name in _EFFORTS:
            try:
                self._faiss.ParameterSpace().set_index_parameter(self._index, name, 1)
            except RuntimeError:
                continue
            return name
        return None

    def _alone(self, work: Callable[[], None]) -> None:
        """Do it on one thread."""
        list(in_threads(lambda do: do(), [work]))


def in_threads(function: Callable[[S], T], pieces: Iterable[S]) -> Iterator[T]:
    """Results of calls with one piece each, in order, on as many threads as torch may use.

    Inside a call faiss and its matrix products are single-threaded.
    """
    torch = importlib.import_module("torch")
    faiss = _load()
    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(function, pieces)


def _tried(name: str, work: Callable[[], T]) -> T:
    """Its result; what faiss raises becomes one line that names the option."""
    try:
        return work()
    except RuntimeError as error:
        raise ConfigError(f"similarity.index: {name!r} cannot be used: {_one_line(error)}") from None


def _one_line(error: RuntimeError) -> str:
    """What faiss says less where in its sources it says so."""
    return " ".join(str(error).split()).rpartition("Error: ")[2].rpartition(".cpp:")[2].lstrip("0123456789: ")


def _load() -> ModuleType:
    importlib.import_module("torch")
    return importlib.import_module("faiss")
