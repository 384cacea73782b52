"""Tables that no probe wrote: which targets they tell of, and what stands for the columns they lack."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import COMPARED_BY
from grads_dist.selection.scored import needs_features
from grads_dist.selection.signal import signal_columns
from grads_dist.table.schema import STATISTICS

logger = logging.getLogger(__name__)


def infer_targets(columns: list[str]) -> list[str]:
    """The targets that columns named `<target>.<statistic>` are of, in their order."""
    pairs = (name.rpartition(".") for name in columns)
    return list(dict.fromkeys(target for target, _, statistic in pairs if target and statistic in STATISTICS))


def check_columns(columns: dict[str, pa.DataType], selection: SelectionConfig, has_features: bool) -> None:
    """Refuse a table that lacks what the configuration reads; says how to go on.

    Args:
        columns: the table's columns and their types.
        selection: what is scored and picked.
        has_features: whether features were given.

    Raises ConfigError.
    """
    for name, reader, instead in _needed(columns, selection):
        if name not in columns:
            raise ConfigError(f"table: column {name!r} is missing, which {reader} reads; {instead}")
        if not _is_number(columns[name]):
            raise ConfigError(
                f"table: column {name!r}, which {reader} reads, holds {columns[name]}, not numbers; {instead}"
            )
    if selection.criterion in COMPARED_BY:
        raise ConfigError(
            f"selection.criterion: {selection.criterion} compares with the target set of a probe; "
            "allowed with --table: grads, random, length_matched_random, loss, grand, el2n"
        )
    if not has_features and needs_features(selection):
        raise ConfigError(
            "features: not given, but the selection compares rows by them (weights d and r, dedup_threshold, "
            "pick); give --features FILE.npy, or --selection.weights.d 0 --selection.weights.r 0, pick topk"
        )


def log_defaults(columns: Iterable[str]) -> None:
    """Say what stands for columns that a table lacks, where that changes a selection."""
    if "num_label_tokens" not in columns:
        logger.info("table: no column num_label_tokens: length_adjust has nothing to remove")
    if "token_hash" not in columns:
        logger.info("table: no column token_hash: no row is known to be a copy of another")


def fill_missing(table: pa.Table, num_rows: int) -> pa.Table:
    """Give a table the columns that every selection reads, in the types of a score table.

    `index` becomes the row number, `id` the index, `status` ok, token counts 1; without `token_hash` no two
    rows are copies.

    Args:
        table: any of its columns.
        num_rows: its rows, also where no column was read.

    Raises DataError for values that such a column cannot have.
    """
    given = {name: table.column(name) for name in table.column_names}
    index = _whole_numbers(given.get("index"), "index", np.arange(num_rows))
    if "checkpoint" not in given and len(np.unique(index)) < num_rows:
        raise DataError("table: column 'index' has a row number twice; allowed: each once")
    ones = np.ones(num_rows, np.int32)
    filled = {
        "index": pa.array(index, pa.int64()),
        "id": _texts(given.get("id", pa.array(index)), "id"),
        "status": _texts(given.get("status", pa.repeat("ok", num_rows)), "status"),
        "num_tokens": pa.array(_whole_numbers(given.get("num_tokens"), "num_tokens", ones)),
        "num_label_tokens": pa.array(_whole_numbers(given.get("num_label_tokens"), "num_label_tokens", ones)),
        "token_hash": pa.array(_hashes(given.get("token_hash"), num_rows)),
    }
    for name, lowest in {"checkpoint": 0, "step": -1}.items():
        if name in given:
            filled[name] = pa.array(_whole_numbers(given[name], name, ones, lowest))
    return pa.table(given | filled)


def _needed(columns: dict[str, pa.DataType], selection: SelectionConfig) -> list[tuple[str, str, str]]:
    """(column, what reads it, what to do instead)."""
    signal = signal_columns(selection.signal, infer_targets(list(columns))) or ["<target>.max"]
    instead = f"allowed: --selection.signal '[column, ...]' of its numeric columns: {_numbers(columns)}"
    needed = [(name, f"selection.signal {selection.signal}", instead) for name in signal]
    if selection.detrend:
        needed.append(("step", "selection.detrend", "allowed: --selection.detrend false"))
    if selection.tokens is not None:
        instead = "allowed: --selection.rows or --selection.fraction"
        needed.append(("num_tokens", "selection.tokens", instead))
    if selection.criterion in ("loss", "el2n"):
        needed.append((selection.criterion, "selection.criterion", "allowed: another criterion"))
    return needed


def _numbers(columns: dict[str, pa.DataType]) -> str:
    fixed = ("index", "checkpoint", "token_hash", "step")
    numeric = [name for name, kind in columns.items() if name not in fixed and _is_number(kind)]
    return ", ".join(numeric) or "it has none"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _texts(column: pa.ChunkedArray | pa.Array, name: str) -> pa.ChunkedArray | pa.Array:
    try:
        return pc.fill_null(pc.cast(column, pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"table: column {name!r} holds {column.type}, not texts") from error


def _whole_numbers(
    column: pa.ChunkedArray | None, name: str, default: np.ndarray, lowest: int = 0
) -> np.ndarray:
    """A column of whole numbers of at least `lowest`, in the type of the default."""
    if column is None:
        return default
    try:
        numbers = pc.cast(column, pa.from_numpy_dtype(default.dtype))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"table: column {name!r} holds {column.type}, not whole numbers ({error})") from error
    if numbers.null_count:
        raise DataError(f"table: column {name!r} has no value in {numbers.null_count} rows")
    values = numbers.to_numpy()
    if len(values) and values.min() < lowest:
        raise DataError(f"table: column {name!r} has values below {lowest}")
    return values


def _hashes(column: pa.ChunkedArray | None, num_rows: int) -> np.ndarray:
    """A number for each distinct value, int64; a row without a value is like no other."""
    if column is None:
        return np.arange(num_rows)
    try:
        codes = pc.index_in(column, value_set=column.unique()).to_numpy().astype(np.int64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"table: column 'token_hash' holds {column.type}; allowed: whole numbers") from error
    missing = np.asarray(column.is_null())
    codes[missing] = len(codes) + np.flatnonzero(missing)
    return codes
