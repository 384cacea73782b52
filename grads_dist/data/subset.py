"""Subsets of a corpus: rows as their files hold them, in the form that all of its files share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.data.csv_records import CsvFile
from grads_dist.data.extra import Extra
from grads_dist.data.json_array import JsonArrayFile
from grads_dist.data.jsonl import JsonlFile
from grads_dist.data.tables import TableFile
from grads_dist.errors import DataError
from grads_dist.runtime.rundir import atomic_folder, atomic_write

Part = JsonlFile | JsonArrayFile | CsvFile | TableFile
Form = Literal["jsonl", "csv", "parquet"]
# A row group for each batch would make the subset slow to read.
_ROWS_PER_GROUP = 16 * 1024
_DIGITS = 5


def subset_form(parts: Sequence[Part]) -> Form:
    """The kind of file that holds rows of all `parts`: csv or parquet if all are, else JSON lines.

    Raises DataError for tables of different schemas, and for tables beside other files that hold what JSON
    cannot.
    """
    tables = [part for part in parts if isinstance(part, TableFile)]
    if tables and len(tables) == len(parts):
        for part in tables[1:]:
            if not part.schema.equals(tables[0].schema):
                raise DataError(
                    f"data.path: {str(part.path)!r} and {str(tables[0].path)!r} have different schemas"
                )
        return "parquet"
    for part in tables:
        _check_json(part)
    headers = [part.columns if isinstance(part, CsvFile) else None for part in parts]
    return "csv" if headers[0] is not None and all(header == headers[0] for header in headers) else "jsonl"


@dataclass(frozen=True)
class Chosen:
    """The rows of a subset."""

    rows: Sequence[tuple[Part, np.ndarray]]
    """Of each file that has any, the sorted numbers of its own rows."""

    form: Form
    parts: Sequence[Part]
    """All files of the corpus."""

    extra: Extra | None = None
    """Columns that the rows get."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return sum(len(rows) for _, rows in self.rows)


def write_rows(chosen: Chosen, path: Path) -> None:
    """Write the rows to the file `path`. Raises DataError for a column that a row has already."""
    with atomic_write(path) as temporary:
        _write(chosen, [temporary], max(chosen.num_rows, 1))


def write_shards(chosen: Chosen, folder: Path, rows_per_file: int) -> None:
    """Write the rows to `folder`, which must not be there, as files of so many rows; the last has the rest.

    The names sort in the order of the rows. Raises DataError for a column that a row has already.
    """
    count = max(-(-chosen.num_rows // rows_per_file), 1)
    width = max(_DIGITS, len(str(count)))
    with atomic_folder(folder) as temporary:
        names = [f"{folder.name}-{k:0{width}}-of-{count:0{width}}.{chosen.form}" for k in range(count)]
        _write(chosen, [temporary / name for name in names], rows_per_file)


def _write(chosen: Chosen, paths: Sequence[Path], rows_per_file: int) -> None:
    """Rows stream once through all files, so that no block of a table is decoded for each file anew."""
    if chosen.form == "parquet":
        _write_tables(chosen, paths, rows_per_file)
        return
    head, pieces = _csv(chosen) if chosen.form == "csv" else ([], _lines(chosen))
    for path in paths:
        with path.open("wb") as file:
            file.writelines(head)
            file.writelines(itertools.islice(pieces, rows_per_file))


def _lines(chosen: Chosen) -> Iterator[bytes]:
    lines = (line for part, rows in chosen.rows for line in part.json_lines(rows))
    return lines if chosen.extra is None else chosen.extra.json_lines(lines)


def _csv(chosen: Chosen) -> tuple[list[bytes], Iterator[bytes]]:
    first = chosen.parts[0]
    assert isinstance(first, CsvFile)
    records = _records(chosen.rows)
    if chosen.extra is None:
        return [first.header], records
    chosen.extra.check_names(first.columns)
    return [chosen.extra.header(first.header)], chosen.extra.records(records)


def _records(chosen: Sequence[tuple[Part, np.ndarray]]) -> Iterator[bytes]:
    for part, rows in chosen:
        assert isinstance(part, CsvFile)
        yield from part.records(rows)


def _write_tables(chosen: Chosen, paths: Sequence[Path], rows_per_file: int) -> None:
    first = chosen.parts[0]
    assert isinstance(first, TableFile)
    schema, batches = first.schema, _batches(chosen.rows)
    if chosen.extra is not None:
        chosen.extra.check_names(schema.names)
        schema = chosen.extra.schema(schema)
        batches = chosen.extra.batches(batches, schema)
    pieces = _cut(batches, rows_per_file)
    left = chosen.num_rows
    for path in paths:
        _write_table(path, schema, pieces, min(left, rows_per_file))
        left -= rows_per_file


def _batches(chosen: Sequence[tuple[Part, np.ndarray]]) -> Iterator[pa.RecordBatch]:
    for part, rows in chosen:
        assert isinstance(part, TableFile)
        yield from part.taken(rows)


def _cut(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The rows of `batches` in batches of which none goes over a multiple of `size` rows."""
    position = 0
    for batch in batches:
        start = 0
        while start < len(batch):
            piece = batch.slice(start, size - position % size)
            yield piece
            start += len(piece)
            position += len(piece)


def _write_table(path: Path, schema: pa.Schema, pieces: Iterator[pa.RecordBatch], num_rows: int) -> None:
    """Write the next `num_rows` rows of `pieces`."""
    gathered: list[pa.RecordBatch] = []
    with pq.ParquetWriter(path, schema) as table:
        while num_rows > 0:
            gathered.append(next(pieces))
            num_rows -= len(gathered[-1])
            if num_rows <= 0 or sum(map(len, gathered)) >= _ROWS_PER_GROUP:
                table.write_table(pa.Table.from_batches(gathered, schema))
                gathered = []


def _check_json(part: TableFile) -> None:
    for field in part.schema:
        if not _is_json(field.type):
            raise DataError(
                f"data.path: column {field.name!r} of {str(part.path)!r} is {field.type}, which JSON lines "
                "(the subset of files of several kinds) cannot hold; allowed: files of one kind"
            )


def _is_json(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(k).type) for k in range(kind.num_fields))
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string)
    return any(test(kind) for test in plain) or types.is_large_string(kind)
