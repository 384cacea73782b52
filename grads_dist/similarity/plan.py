"""Which index is searched: by what an exact search would cost, from the size of the problem alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grads_dist.similarity.backend import Backend
from grads_dist.similarity.config import SimilarityConfig

# Multiplications a second that an exact search is assumed to do: two cores, one data-centre GPU. They are
# constants, so that the same input gives the same index on every machine.
RATE = {"cpu": 2e10, "cuda": 5e12}
MAX_SECONDS = 180.0
"""An exact search that is estimated to take longer is left to an index."""
_LISTS_PER_ROOT = 4


@dataclass(frozen=True)
class Plan:
    """The index of a search."""

    index: str
    """exact or a FAISS factory string."""

    reason: str
    """Why this one; part of a line of the log."""


def plan_index(config: SimilarityConfig, backend: Backend, num_rows: int, dim: int) -> Plan:
    """Choose the index for `num_rows` different rows: the one asked for, or the one that `auto` finds.

    The choice depends on the numbers of rows and dimensions, the library and the device, and on no
    measurement.
    """
    if num_rows < 2:
        return Plan("exact", "there is nothing to search")
    if config.index != "auto":
        return Plan(config.index, "asked for")
    products = float(num_rows) ** 2 * dim
    seconds = products / RATE[backend.device]
    estimate = (
        f"exact is {products:.1e} multiplications, {_duration(seconds)} at {RATE[backend.device]:.0e}/s"
    )
    if seconds <= MAX_SECONDS:
        return Plan("exact", estimate)
    if backend.library != "faiss":
        return Plan("exact", f"{estimate}; other indices need faiss")
    return Plan(f"IVF{num_lists(num_rows)},SQfp16", estimate)


def num_lists(num_rows: int) -> int:
    """Lists of an inverted file over this many rows."""
    return max(1, round(_LISTS_PER_ROOT * math.sqrt(num_rows)))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
