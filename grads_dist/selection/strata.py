"""The stratum of each row of a score table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grads_dist.errors import DataError
from grads_dist.selection.labels import Labels, labels_of_table, unknown_column


def find_strata(table: pa.Table, column: str | None, strata: np.ndarray | None) -> Labels | None:
    """The labels of all rows by `stratify_by`; None without it.

    Args:
        table: the score table.
        column: a column of it or of the corpus, or None.
        strata: [rows of the table], labels of a column that the score table does not have.

    Raises:
        ConfigError: there is no such column, or it does not hold labels.
        DataError: `strata` are not as many as the rows.
    """
    if column is None:
        return None
    if strata is None:
        if column not in table.column_names:
            raise unknown_column(column, table.column_names, "the corpus")
        return labels_of_table(table, column)
    if len(strata) != table.num_rows:
        raise DataError(f"{len(strata)} strata do not belong to a table of {table.num_rows} rows")
    names, codes = np.unique(strata, return_inverse=True)
    return Labels(codes, [str(name) for name in names])
