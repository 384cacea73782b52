"""Parquet files: rows by row group, read in batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.errors import DataError

_BATCH_ROWS = 1024


class ParquetFile:
    """The rows of one .parquet file; never more than a batch of them in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"data.path: {str(path)!r} is no readable Parquet ({_first_line(error)})"
            ) from error
        metadata = self._file.metadata
        self.num_rows: int = metadata.num_rows
        self.schema: pa.Schema = self._file.schema_arrow
        sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, dtype=np.int64))

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """Rows `start` to `stop` with the given columns (those of them that exist), or all."""
        if columns is not None:
            columns = [name for name in columns if name in self.schema.names]
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        for position, batch in self._batches(list(range(first, last + 1)), columns):
            if position >= stop:
                return
            low, high = max(start - position, 0), min(stop - position, len(batch))
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()

    def copy_rows(self, rows: np.ndarray, target: pq.ParquetWriter) -> None:
        """Append the sorted `rows` to `target` with equal values; only their row groups are read."""
        groups = np.unique(np.searchsorted(self._ends, rows, side="right")).tolist()
        gathered: list[pa.RecordBatch] = []
        for position, batch in self._batches(groups, None):
            inside = rows[np.searchsorted(rows, position) : np.searchsorted(rows, position + len(batch))]
            if len(inside):
                gathered.append(batch.take(pa.array(inside - position)))
            # A row group for each batch would make the subset slow to read.
            if sum(map(len, gathered)) >= 16 * _BATCH_ROWS:
                target.write_table(pa.Table.from_batches(gathered, self.schema))
                gathered = []
        if gathered:
            target.write_table(pa.Table.from_batches(gathered, self.schema))

    def _batches(self, groups: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(row number of its first row, batch) over the row groups."""
        try:
            for group in groups:
                position = int(self._ends[group - 1]) if group else 0
                for batch in self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                    yield position, batch
                    position += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"data.path: {str(self.path)!r} is damaged ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
