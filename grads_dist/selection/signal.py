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

    pair: np.ndarray | None = None
    """float64 [2, n], signals of the two targets, adjusted alike; None without `density_over: targets`."""


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
    both = is_over_targets(config, targets)
    floored: dict[str, int] = {}
    zero_means: list[str] = []
    raw, parts = np.zeros(table.num_rows), []
    # One column in memory at a time, but for what is kept of it.
    names = targets if isinstance(config.signal, str) else columns
    for name in names:
        part = _part(table, name, config.signal, floored, zero_means)
        raw += part
        parts += [part] if both else []
    raw /= len(names)
    if floored:
        logger.warning("signal: values that are not positive count as the smallest positive one: %s", floored)
    adjusted, length_r2, step_r2 = _adjust(raw, table, config)
    pair = np.stack([_adjust(part, table, config)[0] for part in parts]) if both else None
    return Signal(adjusted, raw, length_r2, step_r2, floored, zero_means, pair)


def read_column(table: pa.Table, name: str, field: str) -> np.ndarray:
    """A numeric column as float64 [n] for the option `field`; errors are those of `compute_signal`."""
    if name not in table.column_names:
        raise ConfigError(f"{field}: {name!r} is not a column of the score table")
    kind = table.schema.field(name).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ConfigError(f"{field}: column {name!r} holds {kind}, not numbers")
    # A copy: what to_numpy gives may be the table's own memory, and callers change the result.
    column = table.column(name).to_numpy().astype(np.float64)
    num_bad = int(np.count_nonzero(~np.isfinite(column)))
    if num_bad:
        raise DataError(f"column {name!r} of the score table is not finite in {num_bad} rows with status ok")
    return column


def is_over_targets(config: SelectionConfig, targets: list[str]) -> bool:
    """Whether the density is over the signals of two targets; refuses it where they are not two."""
    if config.density_over != "targets":
        return False
    if not isinstance(config.signal, str):
        raise ConfigError(
            "selection.density_over: targets needs a signal of targets, and selection.signal lists columns; "
            "allowed: signal, or selection.signal paper or norm"
        )
    if len(targets) != 2:
        raise ConfigError(
            f"selection.density_over: targets needs two targets, and the score table has {len(targets)}; "
            "allowed: signal"
        )
    return True


def _part(
    table: pa.Table,
    name: str,
    signal: SignalPreset | list[str],
    floored: dict[str, int],
    zero_means: list[str],
) -> np.ndarray:
    """What one target, or one listed column, adds to the signal, float64 [n]."""
    if signal == "paper":
        return _paper(table, name, floored, zero_means)
    if signal == "norm":
        return z(_log(table, f"{name}.norm", floored))
    return z(read_column(table, name, "selection.signal"))


def _paper(table: pa.Table, target: str, floored: dict[str, int], zero_means: list[str]) -> np.ndarray:
    total = z(_log(table, f"{target}.max", floored))
    total += z(_log(table, f"{target}.min", floored, sign=-1))
    total += z(_log(table, f"{target}.std", floored))
    mean = read_column(table, f"{target}.mean", "selection.signal")
    if _mean_is_zero(table, target):
        zero_means.append(target)
        return total / 3
    total += z(mean)
    return total / 4


def _mean_is_zero(table: pa.Table, target: str) -> bool:
    """Sums of real gradients are of the size of the norm; where they cancel, rounding is left."""
    total = np.abs(read_column(table, f"{target}.sum", "selection.signal"))
    norm = np.sqrt(read_column(table, f"{target}.sumsq", "selection.signal"))
    return len(total) == 0 or bool(np.mean(total <= _ZERO_MEAN * norm) >= 0.99)


def _log(table: pa.Table, name: str, floored: dict[str, int], sign: int = 1) -> np.ndarray:
    column = read_column(table, name, "selection.signal")
    column *= sign
    positive = column > 0
    if not positive.all():
        floored[name] = int(np.count_nonzero(~positive))
        if not positive.any():
            return np.zeros(len(column))
        column[~positive] = column[positive].min()
    return np.log(column, out=column)


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
