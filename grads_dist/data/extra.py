"""Columns that the rows of a subset get behind their own, in the form that their file has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grads_dist.errors import DataError

_BLANK = b" \t\r\n"
_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Extra:
    """A value of each column for each row of a subset, in its order; a float that is not finite is null."""

    columns: dict[str, np.ndarray]
    indices: np.ndarray
    """int64, the rows' numbers in the corpus, for what is said about one."""

    def check_names(self, columns: Sequence[str]) -> None:
        """Raise DataError for a column that files with these columns have themselves."""
        for name in self.columns:
            if name in columns:
                raise DataError(f"selection.output.scores: the corpus has a column {name!r} already")

    def schema(self, schema: pa.Schema) -> pa.Schema:
        """`schema` with the columns appended."""
        for name, values in self.columns.items():
            schema = schema.append(pa.field(name, pa.from_numpy_dtype(values.dtype)))
        return schema

    def batches(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows of `batches` with the columns; `schema` is what `schema` gives."""
        position = 0
        for batch in batches:
            arrays = [values[position : position + len(batch)] for values in self.columns.values()]
            added = [pa.array(values, from_pandas=True) for values in arrays]
            yield pa.RecordBatch.from_arrays([*batch.columns, *added], schema=schema)
            position += len(batch)

    def json_lines(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """JSON objects, a line each, with the columns as last keys; all other text stays.

        Raises DataError for a row that has such a key.
        """
        for line, index, values in zip(lines, self.indices, self._texts("null"), strict=True):
            body = line.rstrip(_BLANK)
            head = body[:-1].rstrip(_BLANK)
            self._check_object(body, int(index))
            pairs = ", ".join(f'"{name}": {value}' for name, value in zip(self.columns, values, strict=True))
            # Only an empty object ends with its opening brace.
            comma = b"" if head.endswith(b"{") else b", "
            yield head + comma + pairs.encode() + line[len(head) :]

    def header(self, header: bytes) -> bytes:
        """The header of a CSV file with the columns."""
        return _appended(header, self.columns)

    def records(self, records: Iterable[bytes]) -> Iterator[bytes]:
        """The records of a CSV file with the columns; null is an empty field."""
        for record, values in zip(records, self._texts(""), strict=True):
            yield _appended(record, values)

    def _check_object(self, body: bytes, index: int) -> None:
        if not (body.startswith(b"{") or body.lstrip(_BLANK).startswith(b"{")) or not body.endswith(b"}"):
            raise DataError(
                f"selection.output.scores: row {index} is no JSON object, and cannot have columns"
            )
        # Keys may be written with escapes; parsing every row would cost more than all the rest.
        if b"\\u" not in body and not any(name.encode() in body for name in self.columns):
            return
        taken = self.columns.keys() & json.loads(body.decode("utf-8")).keys()
        if taken:
            raise DataError(f"selection.output.scores: row {index} has a column {min(taken)!r} already")

    def _texts(self, null: str) -> Iterator[tuple[str, ...]]:
        """The values of each row as text."""
        for start in range(0, len(self.indices), _BLOCK_ROWS):
            block = [values[start : start + _BLOCK_ROWS].tolist() for values in self.columns.values()]
            for row in zip(*block, strict=True):
                yield tuple(repr(value) if math.isfinite(value) else null for value in row)


def _appended(record: bytes, values: Iterable[str]) -> bytes:
    body = record.rstrip(b"\r\n")
    return body + "".join(f",{value}" for value in values).encode() + record[len(body) :]
