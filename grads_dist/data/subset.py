"""Subsets of a corpus: rows as their files hold them, in the form that all of its files share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.data.csv_records import CsvFile
from grads_dist.data.json_array import JsonArrayFile
from grads_dist.data.jsonl import JsonlFile
from grads_dist.data.tables import TableFile
from grads_dist.errors import DataError
from grads_dist.runtime.rundir import atomic_write

Part = JsonlFile | JsonArrayFile | CsvFile | TableFile
Form = Literal["jsonl", "csv", "parquet"]
# A row group for each batch would make the subset slow to read.
_ROWS_PER_GROUP = 16 * 1024


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


def write_rows(
    path: Path, form: Form, chosen: Sequence[tuple[Part, np.ndarray]], parts: Sequence[Part]
) -> None:
    """Write the chosen rows, each part's own sorted numbers, to `path`; `parts` are all of the corpus."""
    with atomic_write(path) as temporary:
        if form == "parquet":
            _write_parquet(temporary, chosen, parts[0].schema)
        elif form == "csv":
            first = parts[0]
            assert isinstance(first, CsvFile)
            _write_bytes(temporary, [first.header], _records(chosen))
        else:
            _write_bytes(temporary, [], (line for part, rows in chosen for line in part.json_lines(rows)))


def _records(chosen: Sequence[tuple[Part, np.ndarray]]) -> Iterator[bytes]:
    for part, rows in chosen:
        assert isinstance(part, CsvFile)
        yield from part.records(rows)


def _write_bytes(path: Path, head: Iterable[bytes], pieces: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(head)
        file.writelines(pieces)


def _write_parquet(path: Path, chosen: Sequence[tuple[Part, np.ndarray]], schema: pa.Schema) -> None:
    gathered: list[pa.RecordBatch] = []
    with pq.ParquetWriter(path, schema) as table:
        for part, rows in chosen:
            assert isinstance(part, TableFile)
            for batch in part.taken(rows):
                gathered.append(batch)
                if sum(map(len, gathered)) >= _ROWS_PER_GROUP:
                    table.write_table(pa.Table.from_batches(gathered, schema))
                    gathered = []
        if gathered:
            table.write_table(pa.Table.from_batches(gathered, schema))


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
