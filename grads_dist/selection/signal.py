"""The signal: one number a row, from the statistics of its gradients."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection.config import SelectionConfig, SignalPreset
from grads_dist.selection.ranks import z
from grads_dist.selection.smooth import remove_trend

logger = logging.getLogger(__name__)

# Statistics of a target that each preset reads.
_STATISTICS = {"paper": ("max", "min", "std", "mean", "sum", "sumsq"), "norm": ("norm",)}
# A sum below this share of the norm, in 99 % of the rows, is what rounding leaves of a mean that cancels.
_ZERO_MEAN = 1e-2


@dataclass(frozen=True)
class Signal:
    """The signal of n rows and how it came about."""

    values: np.ndarray
    """float64 [n]: what the criteria see, adjusted for length and trend as configured."""

    raw: np.ndarray
    """float64 [n]: before adjustment."""

    length_r2: float | None
    """Share of the signal's variance that length explained; None without adjustment."""

    step_r2: float | None
    """Share of the signal's variance that the trend over steps explained; None without detrending."""

    floored: dict[str, int] = field(default_factory=dict)
    """Rows whose value was not positive and was replaced by the smallest positive one, by column."""

    zero_means: list[str] = field(default_factory=list)
    """Targets whose mean is zero by construction and left out."""


def signal_columns(signal: SignalPreset | list[str], targets: list[str]) -> list[str]:
    """Columns of the score table that a signal is computed from."""
    if isinstance(signal, str):
        return [f"{target}.{name}" for target in targets for name in _STATISTICS[signal]]
    return list(signal)


def compute_signal(table: pa.Table, config: SelectionConfig, targets: list[str]) -> Signal:
    """Signal of every row of a table (docs/selection.md, "Signal").

    Raises:
        ConfigError: a column is missing, not a number, or there is no target.
        DataError: a column holds a value that is not finite.
    """
    columns = signal_columns(config.signal, targets)
    if not columns:
        raise ConfigError(
            f"selection.signal: {config.signal} needs at least one target, and the score table has none"
        )
    values = {name: read_column(table, name, "selection.signal") for name in columns}
    floored: dict[str, int] = {}
    zero_means: list[str] = []
    if config.signal == "paper":
        parts = [_paper(values, target, floored, zero_means) for target in targets]
    elif config.signal == "norm":
        parts = [z(_log(values, f"{target}.norm", floored)) for target in targets]
    else:
        parts = [z(column) for column in values.values()]
    raw = np.mean(parts, axis=0)
    if floored:
        logger.warning("signal: values that are not positive count as the smallest positive one: %s", floored)
    adjusted, length_r2, step_r2 = _adjust(raw, table, config)
    return Signal(adjusted, raw, length_r2, step_r2, floored, zero_means)


def read_column(table: pa.Table, name: str, field: str) -> np.ndarray:
    """A numeric column as float64 [n] for the option `field`; errors are those of `compute_signal`."""
    if name not in table.column_names:
        raise ConfigError(f"{field}: {name!r} is not a column of the score table")
    kind = table.schema.field(name).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ConfigError(f"{field}: column {name!r} holds {kind}, not numbers")
    column = table.column(name).to_numpy().astype(np.float64)
    num_bad = int(np.count_nonzero(~np.isfinite(column)))
    if num_bad:
        raise DataError(f"column {name!r} of the score table is not finite in {num_bad} rows with status ok")
    return column


def _paper(
    values: dict[str, np.ndarray], target: str, floored: dict[str, int], zero_means: list[str]
) -> np.ndarray:
    parts = [
        z(_log(values, f"{target}.{name}", floored, sign))
        for name, sign in (("max", 1), ("min", -1), ("std", 1))
    ]
    if _mean_is_zero(values[f"{target}.sum"], values[f"{target}.sumsq"]):
        zero_means.append(target)
    else:
        parts.append(z(values[f"{target}.mean"]))
    return np.mean(parts, axis=0)


def _mean_is_zero(total: np.ndarray, sumsq: np.ndarray) -> bool:
    """Sums of real gradients are of the size of the norm; where they cancel, rounding is left."""
    return len(total) == 0 or bool(np.mean(np.abs(total) <= _ZERO_MEAN * np.sqrt(sumsq)) >= 0.99)


def _log(values: dict[str, np.ndarray], name: str, floored: dict[str, int], sign: int = 1) -> np.ndarray:
    column = sign * values[name]
    positive = column > 0
    if not positive.all():
        floored[name] = int(np.count_nonzero(~positive))
    if not positive.any():
        return np.zeros(len(column))
    return np.log(np.where(positive, column, column[positive].min()))


def _adjust(
    raw: np.ndarray, table: pa.Table, config: SelectionConfig
) -> tuple[np.ndarray, float | None, float | None]:
    """Trend first, so that the result is exactly uncorrelated with the fit on length."""
    values, length_r2, step_r2 = raw, None, None
    if config.detrend:
        steps = table.column("step").to_numpy()
        if (steps < 0).all():
            logger.warning("signal: detrend has nothing to remove, all rows were probed at the same weights")
        without_trend = remove_trend(values, steps, log=False)
        values, step_r2 = without_trend.residual, without_trend.r2
    if config.length_adjust:
        lengths = np.maximum(table.column("num_label_tokens").to_numpy(), 1)
        without_length = remove_trend(values, lengths, log=True)
        values, length_r2 = without_length.residual, without_length.r2
    return values, length_r2, step_r2
