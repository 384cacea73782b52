"""The rows that take part in a selection: finite, and one of each set of equal token sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute


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
    usable = pa.compute.equal(table.column("status"), "ok").to_numpy()
    rows = np.flatnonzero(usable)
    if len(rows) and not (np.diff(index[rows]) > 0).all():
        rows = rows[np.argsort(index[rows], kind="stable")]
    token_hash = table.column("token_hash").to_numpy()
    num_tokens = table.column("num_tokens").to_numpy()
    if not is_all(rows, len(index)):
        token_hash, num_tokens = token_hash[rows], num_tokens[rows]
    copy, original = _copies(token_hash, num_tokens)
    copies, originals = index[rows[copy]], index[rows[original]]
    if not keep_duplicates:
        rows = np.delete(rows, copy)
    return Candidates(rows.astype(np.int64, copy=False), copies, originals, len(index) - int(usable.sum()))


def is_all(rows: np.ndarray, count: int) -> bool:
    """Whether these are all of `count` rows in order."""
    return len(rows) == count and bool((np.diff(rows) == 1).all())


def rows_of(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows of a table, not copied where these are all of them in order."""
    return table if is_all(rows, table.num_rows) else table.take(pa.array(rows))


def _copies(token_hash: np.ndarray, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the hash and length of an earlier row, rising, and the first such row of each."""
    order = np.argsort(token_hash, kind="stable")
    ordered = token_hash[order]
    same = ordered[1:] == ordered[:-1]
    alike = np.zeros(len(order), bool)
    alike[1:] |= same
    alike[:-1] |= same
    # Few rows share a hash: only they are sorted by length as well. Stable: equal rows keep their order.
    rows = order[alike]
    rows = rows[np.lexsort((num_tokens[rows], token_hash[rows]))]
    new = np.ones(len(rows), bool)
    new[1:] = (token_hash[rows[1:]] != token_hash[rows[:-1]]) | (np.diff(num_tokens[rows]) != 0)
    first = rows[np.flatnonzero(new)][np.cumsum(new) - 1] if len(rows) else rows
    copy, original = rows[~new], first[~new]
    by_row = np.argsort(copy)
    return copy[by_row], original[by_row]
