"""Parquet and Arrow files: rows by blocks (row groups, record batches), read in batches."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from grads_dist.data.rows import Broken
from grads_dist.errors import DataError

_BATCH_ROWS = 1024
# UnicodeDecodeError: names of columns that are no UTF-8.
_READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError)
# Texts that are no UTF-8, and dates beyond those that Python has.
_VALUE_ERRORS = (ValueError, OverflowError, LookupError, pa.ArrowException)


class TableFile:
    """The rows of one .parquet or .arrow file; never more than a batch of them in memory."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file cannot be read."""
        self.path = path
        kind, make = ("Parquet", _ParquetBlocks) if path.suffix.lower() == ".parquet" else ("Arrow", _arrow)
        try:
            self._blocks: _Blocks = make(path)
            # A subset is written as Parquet, which has not every type that Arrow has.
            pq.write_table(self._blocks.schema.empty_table(), io.BytesIO())
        except _READ_ERRORS as error:
            raise DataError(
                f"data.path: {str(path)!r} is no readable {kind} ({_first_line(error)})"
            ) from error
        self.schema = self._blocks.schema
        twice = [name for k, name in enumerate(self.schema.names) if name in self.schema.names[:k]]
        if twice:
            raise DataError(f"data.path: {str(path)!r} has two columns {twice[0]!r}")
        self.num_rows = int(self._blocks.ends[-1]) if len(self._blocks.ends) else 0

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any] | Broken]:
        """Rows `start` to `stop` with the given columns (those of them that exist), or all.

        Values inside a column have no null fields: a table gives every value every field of its schema.
        """
        if columns is not None:
            columns = [name for name in columns if name in self.schema.names]
        first, last = np.searchsorted(self._blocks.ends, [start, stop - 1], side="right").tolist()
        for position, batch in self._batches(list(range(first, last + 1)), columns):
            if position >= stop:
                return
            low, high = max(start - position, 0), min(stop - position, len(batch))
            if low < high:
                yield from self._values(batch.slice(low, high - low), position + low)

    def taken(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The sorted `rows` with equal values, in batches; only their blocks are read."""
        blocks = np.unique(np.searchsorted(self._blocks.ends, rows, side="right")).tolist()
        for position, batch in self._batches(blocks, None):
            inside = rows[np.searchsorted(rows, position) : np.searchsorted(rows, position + len(batch))]
            if len(inside):
                yield from _take(batch, inside - position)

    def json_lines(self, rows: np.ndarray) -> Iterator[bytes]:
        """The sorted `rows` as JSON objects of equal values, a line each."""
        for batch in self.taken(rows):
            for row in self._values(batch, None):
                if isinstance(row, Broken):
                    raise DataError(f"data.path: a broken row cannot become a JSON line; {row.reason}")
                yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"

    def _values(self, batch: pa.RecordBatch, position: int | None) -> Iterator[dict[str, Any] | Broken]:
        """The rows of `batch`, without null fields inside its values unless `position` is None."""
        try:
            rows = batch.to_pylist()
        except _VALUE_ERRORS as error:
            if len(batch) == 1:
                where = self.path.name if position is None else f"{self.path.name}, row {position}"
                yield Broken(f"a value cannot be read ({where}: {_first_line(error)})")
                return
            for k in range(len(batch)):
                yield from self._values(batch.slice(k, 1), None if position is None else position + k)
            return
        for row in rows:
            if position is None:
                yield row
            else:
                yield {name: _without_nulls(value) for name, value in row.items()}

    def _batches(self, blocks: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(row number of its first row, batch) over the ascending blocks."""
        try:
            current, position = -1, 0
            for block, batch in self._blocks.read(blocks, columns):
                if block != current:
                    current, position = block, int(self._blocks.ends[block - 1]) if block else 0
                for low in range(0, len(batch), _BATCH_ROWS):
                    some = batch.slice(low, _BATCH_ROWS)
                    yield position, some
                    position += len(some)
        except _READ_ERRORS as error:
            raise DataError(f"data.path: {str(self.path)!r} is damaged ({_first_line(error)})") from error


class _Blocks(Protocol):
    """What a file's format has to give: its schema, where its blocks end (int64 row numbers), and batches."""

    schema: pa.Schema
    ends: np.ndarray

    def read(self, blocks: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(block, batch) of the ascending blocks."""


# None of them keeps its file open: a corpus may have more files than a process may open.


class _ParquetBlocks:
    def __init__(self, path: Path) -> None:
        self._path = path
        with pq.ParquetFile(path) as file:
            self.schema = file.schema_arrow
            self.ends = _ends([file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)])

    def read(self, blocks: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        with pq.ParquetFile(self._path) as file:
            for block in blocks:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[block], columns=columns):
                    yield block, batch


class _ArrowFileBlocks:
    def __init__(self, path: Path) -> None:
        self._path = path
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            self.schema = reader.schema
            self.ends = _ends([reader.get_batch(k).num_rows for k in range(reader.num_record_batches)])

    def read(self, blocks: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        with pa.memory_map(str(self._path)) as file, pa.ipc.open_file(file) as reader:
            for block in blocks:
                batch = reader.get_batch(block)
                yield block, batch if columns is None else batch.select(columns)


class _ArrowStreamBlocks:
    """A stream has no index: batches are passed over, which costs nothing where they are mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            self.schema = reader.schema
            self.ends = _ends([batch.num_rows for batch in reader])

    def read(self, blocks: list[int], columns: list[str] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        wanted, last = set(blocks), blocks[-1]
        with pa.memory_map(str(self._path)) as file, pa.ipc.open_stream(file) as reader:
            for block, batch in enumerate(reader):
                if block in wanted:
                    yield block, batch if columns is None else batch.select(columns)
                if block == last:
                    return


def _arrow(path: Path) -> _Blocks:
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    return _ArrowFileBlocks(path) if is_file else _ArrowStreamBlocks(path)


def _ends(sizes: list[int]) -> np.ndarray:
    return np.cumsum(np.array(sizes, dtype=np.int64))


def _take(batch: pa.RecordBatch, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
    try:
        yield batch.take(pa.array(rows))
    except pa.ArrowNotImplementedError:
        # Some types, as the views that Polars writes, cannot be gathered, but every type can be sliced.
        for row in rows.tolist():
            yield batch.slice(row, 1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
