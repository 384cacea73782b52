"""The strata of rows: the labels of a column of the score table, else of the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from grads_dist.data.rows import Broken, kind_of_value
from grads_dist.errors import ConfigError

if TYPE_CHECKING:
    from grads_dist.data.corpus import Corpus

MOST_LABELS = 10_000
"""Distinct labels that a column may have: beyond, it tells rows apart and no strata."""

MISSING = "null"
"""Label of a row that has no value."""


@dataclass(frozen=True)
class Labels:
    """The label of each of n rows."""

    codes: np.ndarray
    """int64 [n], place in `names`."""

    names: list[str]
    """The labels, sorted."""


def labels_of_table(table: pa.Table, column: str) -> Labels:
    """Labels from a column of the score table.

    Raises:
        ConfigError: the column holds lists or structures, or more than `MOST_LABELS` values.
    """
    kind = table.schema.field(column).type
    if pa.types.is_nested(kind):
        raise ConfigError(
            f"selection.stratify_by: column {column!r} of the score table holds {kind}; "
            "allowed: a column of texts, numbers or booleans"
        )
    values = table.column(column)
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
    distinct = values.unique()
    if len(distinct) > MOST_LABELS:
        raise _too_many(column, str(len(distinct)))
    codes = pa.compute.index_in(values, value_set=distinct).to_numpy()
    return _sorted([_text(value) for value in distinct.to_pylist()], codes)


def labels_of_corpus(corpus: Corpus, column: str, index: np.ndarray | None = None) -> Labels:
    """Labels from a column of the corpus; reads it through once.

    Args:
        corpus: rows with or without the column; a row without it, or that cannot be read, is `MISSING`.
        column: its name.
        index: row numbers, int64 [n]; all rows by default.

    Raises:
        ConfigError: no row has the column, a row holds a list or an object there, or there are more than
            `MOST_LABELS` values.
    """
    wanted = np.arange(corpus.num_rows) if index is None else index
    stop = int(wanted.max(initial=-1)) + 1
    codes = np.empty(stop, np.int64)
    places: dict[str, int] = {}
    found = False
    for number, row in corpus.iter_rows(0, stop, columns=[column]):
        value = None
        if not isinstance(row, Broken) and column in row:
            found, value = True, row[column]
        if isinstance(value, (dict, list, tuple)):
            raise ConfigError(
                f"selection.stratify_by: column {column!r} holds {kind_of_value(value)} in row {number} of "
                "the corpus; allowed: a column of texts, numbers or booleans"
            )
        codes[number] = places.setdefault(_text(value), len(places))
        if len(places) > MOST_LABELS:
            raise _too_many(column, f"{len(places)} and more")
    if not found:
        raise unknown_column(column, corpus.columns(), "the corpus")
    return _sorted(list(places), codes[wanted])


def unknown_column(column: str, known: Iterable[str], where: str) -> ConfigError:
    """The error of a column that is neither in the score table nor in the corpus."""
    return ConfigError(
        f"selection.stratify_by: {column!r} is no column of the score table, nor of {where}; "
        f"allowed: {', '.join(known)}"
    )


def _too_many(column: str, number: str) -> ConfigError:
    return ConfigError(
        f"selection.stratify_by: column {column!r} has {number} distinct values; "
        f"allowed: a column with at most {MOST_LABELS}"
    )


def _text(value: Any) -> str:
    """A label: text as it is, null, true and numbers as JSON has them, dates and others as they print."""
    if isinstance(value, str):
        return value
    return MISSING if value is None else json.dumps(value, default=str).strip('"')


def _sorted(names: list[str], codes: np.ndarray) -> Labels:
    """Merge what reads alike, and number the labels in order."""
    distinct = sorted(set(names))
    place = {name: k for k, name in enumerate(distinct)}
    new = np.array([place[name] for name in names], np.int64)
    return Labels(new[codes] if len(codes) else np.zeros(0, np.int64), distinct)
