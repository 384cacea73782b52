"""The k-nearest-neighbour graph and how it was found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Search:
    """How a graph was found."""

    library: str
    device: str

    index: str
    """The index that was searched: exact or a FAISS factory string."""

    reason: str
    """Why index and library were chosen."""

    exact: bool
    """Whether every neighbour is a true one."""

    recall: float | None
    """Share of the true neighbours that were found, measured on a sample; None where the search is exact."""

    seconds: dict[str, float]
    """Time of each step on rank 0."""


@dataclass(frozen=True)
class Neighbours:
    """A sparse graph of n rows with k neighbours each; the arrays may be memory maps."""

    ids: np.ndarray
    """int32 [n, min(k, n - 1)], nearest first, equal cosines by row number; -1 where fewer exist."""

    cosine: np.ndarray
    """float32 like `ids`, in [-1, 1], rounded to 6 decimals, NaN where `ids` is -1."""

    group: np.ndarray
    """int64 [n], the first row with identical features; such rows are neighbours even beyond k. A row without
    a direction is alone in its group."""

    search: Search | None = None
    """How they were found; None for a graph made by hand."""
