"""How much is selected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grads_dist.selection.config import DEFAULT_FRACTION, SelectionConfig


@dataclass(frozen=True)
class Budget:
    """A limit in rows or tokens; without a limit every eligible row is taken."""

    unit: Literal["rows", "tokens", "none"]
    """What the limit counts."""

    limit: int = 0
    """The largest number of rows or tokens."""


def resolve_budget(config: SelectionConfig, num_scored: int) -> Budget:
    """The budget a configuration asks for (docs/selection.md, "Budget").

    A fraction is one of all `num_scored` rows of the score table, rounded half up and at least one row.
    Without any budget the criterion zscore takes what its cut leaves, and everything else takes a tenth.
    """
    if config.rows is not None:
        return Budget("rows", config.rows)
    if config.tokens is not None:
        return Budget("tokens", config.tokens)
    if config.fraction is None and config.gradient == "zscore":
        return Budget("none")
    fraction = DEFAULT_FRACTION if config.fraction is None else config.fraction
    return Budget("rows", max(1, math.floor(fraction * num_scored + 0.5)))


def take(order: np.ndarray, num_tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """The longest prefix of a ranking (row numbers, best first) that the budget allows, maybe empty."""
    if budget.unit == "none":
        return order
    if budget.unit == "rows":
        return order[: budget.limit]
    spent = np.cumsum(num_tokens[order], dtype=np.int64)
    return order[: int(np.searchsorted(spent, budget.limit, side="right"))]
