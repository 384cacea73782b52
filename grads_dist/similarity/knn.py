"""The k nearest neighbours of every row by cosine."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass

import numpy as np

from grads_dist.errors import ConfigError
from grads_dist.similarity import faiss_index
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.vectors import identical_rows, unit_vectors

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 1 << 18
# Backends differ in the seventh decimal of an inner product, which must not decide between equal rows.
_DECIMALS = 6


@dataclass(frozen=True)
class Neighbours:
    """A sparse graph of n rows with k neighbours each."""

    ids: np.ndarray
    """int64 [n, min(k, n - 1)], nearest first, equal cosines by row number; -1 where fewer exist."""

    cosine: np.ndarray
    """float32 like `ids`, in [-1, 1], NaN where `ids` is -1."""

    group: np.ndarray
    """int64 [n], the first row with identical features; such rows are neighbours even beyond k. A row without
    a direction is alone in its group."""


@dataclass(frozen=True)
class Backend:
    """The library and the device of a search, and why they were chosen."""

    library: str
    device: str
    reason: str


def knn(features: np.ndarray, config: SimilarityConfig) -> Neighbours:
    """Exact k nearest neighbours by cosine of centred features (docs/selection.md, "Neighbours").

    A row is never its own neighbour. Rows without a direction (a value that is not finite, or features
    equal to the mean) have no neighbours and are nobody's. With fewer than k other rows all of them are
    neighbours.

    Args:
        features: [n, k'] of any float type, possibly a memory map.
        config: number of neighbours, library and device.

    Raises:
        ConfigError: the library or the device asked for is not there.
    """
    unit, rows = unit_vectors(features)
    if len(rows) < len(features):
        logger.warning(
            "%d of %d rows have no direction in the feature space and so no neighbours",
            len(features) - len(rows),
            len(features),
        )
    # A k beyond the corpus means all other rows, and takes no more memory than they do.
    width = min(config.k, max(0, len(features) - 1))
    ids = np.full((len(features), width), -1, np.int64)
    cosine = np.full((len(features), width), np.nan, np.float32)
    num_found = min(config.k, len(rows) - 1)
    if num_found > 0:
        found_ids, found_cosine = _search(unit, num_found, config)
        ids[rows, :num_found] = rows[found_ids]
        cosine[rows, :num_found] = found_cosine
    group = np.arange(len(features))
    group[rows] = identical_rows(features)[rows]
    return Neighbours(ids, cosine, group)


def choose_backend(config: SimilarityConfig) -> Backend:
    """Resolve `auto` to a library and a device.

    Raises:
        ConfigError: what was asked for by name is not there.
    """
    device = _device(config)
    if config.library == "torch":
        return Backend("torch", device, "asked for")
    if not faiss_index.is_installed():
        if config.library == "faiss":
            raise ConfigError(
                "similarity.library: faiss is not installed; install faiss-cpu or faiss-gpu, or give torch"
            )
        return Backend("torch", device, "faiss is not installed")
    if device == "cuda" and faiss_index.num_gpus() == 0:
        if config.library == "auto":
            return Backend("torch", "cuda", "the installed faiss cannot use the GPU")
        if config.device == "cuda":
            raise ConfigError(
                "similarity.device: the installed faiss cannot use cuda; "
                "give cpu, or similarity.library torch"
            )
        return Backend("faiss", "cpu", "the installed faiss cannot use the GPU")
    return Backend(
        "faiss", device, "asked for" if config.library == "faiss" else f"faiss is there and serves {device}"
    )


def _device(config: SimilarityConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    torch = importlib.import_module("torch")
    available = bool(torch.cuda.is_available())
    if config.device == "cuda" and not available:
        raise ConfigError("similarity.device: cuda is not available here; give cpu or auto")
    return "cuda" if available else "cpu"


def _search(unit: np.ndarray, num_found: int, config: SimilarityConfig) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of each unit vector without itself: row numbers in `unit` and cosines, [m, num_found]."""
    backend = choose_backend(config)
    logger.info(
        "similarity: exact search of %d x %d features with %s on %s (%s)",
        *unit.shape,
        backend.library,
        backend.device,
        backend.reason,
    )
    if backend.library == "faiss":
        cosine, ids = faiss_index.search(unit, num_found + 1, backend.device)
    else:
        torch_search = importlib.import_module("grads_dist.similarity.torch_search")
        cosine, ids = torch_search.search(unit, num_found + 1, backend.device)
    return _without_self(ids, cosine)


def _without_self(ids: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own number, or its last result where many identical rows have crowded it out."""
    num_rows, width = ids.shape
    kept_ids = np.empty((num_rows, width - 1), np.int64)
    kept_cosine = np.empty((num_rows, width - 1), np.float32)
    for start in range(0, num_rows, _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, num_rows))
        dropped = ids[block] == np.arange(block.start, block.stop)[:, None]
        dropped[~dropped.any(axis=1), -1] = True
        block_ids = ids[block][~dropped].reshape(-1, width - 1)
        block_cosine = cosine[block][~dropped].reshape(-1, width - 1)
        block_cosine = np.clip(np.round(block_cosine, _DECIMALS), -1.0, 1.0)
        order = np.lexsort((block_ids, -block_cosine), axis=-1)
        kept_ids[block] = np.take_along_axis(block_ids, order, axis=1)
        kept_cosine[block] = np.take_along_axis(block_cosine, order, axis=1)
    return kept_ids, kept_cosine
