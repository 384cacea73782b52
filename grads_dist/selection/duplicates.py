"""The rows that take part in a selection: finite, and one of each set of equal token sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Candidates:
    """Which rows of the score table take part."""

    rows: np.ndarray
    """int64 [n], places in the table, by rising corpus index."""

    copies: np.ndarray
    """int64 [m], corpus index of rows whose tokens equal those of an earlier row."""

    originals: np.ndarray
    """int64 [m], corpus index of the first row with these tokens."""

    num_nonfinite: int
    """Rows without usable statistics."""


def candidates(table: pa.Table, keep_duplicates: bool) -> Candidates:
    """Leave out rows with a status other than ok and, unless kept, copies (docs/selection.md, "Duplicates").

    Rows are copies when `token_hash` and `num_tokens` are equal; the first by corpus index stays.
    """
    index = table.column("index").to_numpy()
    usable = np.asarray(pa.compute.equal(table.column("status"), "ok"))
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(index[rows], kind="stable")]
    first = _first_alike(
        table.column("token_hash").to_numpy()[rows], table.column("num_tokens").to_numpy()[rows]
    )
    is_copy = first != np.arange(len(rows))
    copies, originals = index[rows[is_copy]], index[rows[first[is_copy]]]
    if not keep_duplicates:
        rows = rows[~is_copy]
    return Candidates(rows.astype(np.int64), copies, originals, int(np.count_nonzero(~usable)))


def _first_alike(token_hash: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """For each row the first row with the same hash and length, int64 [n]."""
    order = np.lexsort((num_tokens, token_hash))  # stable: equal rows keep their order
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(token_hash[order]) != 0) | (np.diff(num_tokens[order]) != 0)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first
