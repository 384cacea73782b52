"""CSV files: a header, then records as RFC 4180 has them, read where they lie.

Records may hold line breaks within quotes. Lines without a character are no rows.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grads_dist.data.records import BYTE_ORDER_MARK, LayoutError, Starts, read_slices
from grads_dist.data.rows import Broken
from grads_dist.errors import DataError

_LONGEST_FIELD = 2**31 - 1


class CsvFile:
    """The records of one .csv file; only offsets are mapped, no row is kept. All values are text."""

    schema = None

    def __init__(self, path: Path, starts: Starts) -> None:
        """Raises LayoutError when the header cannot be read or names a column twice."""
        self.path = path
        self.num_rows = max(len(starts) - 2, 0)
        self._starts = starts
        self.header = b""
        """Its bytes up to the first record."""
        self.columns: list[str] = []
        if len(starts) > 1:
            self._read_header()

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any] | Broken]:
        """Rows `start` to `stop`; all columns, whatever `columns` asks for."""
        for begin, block in read_slices(self.path, self._starts, range(start + 1, stop + 1)):
            yield self._row(begin, block)

    def records(self, rows: np.ndarray) -> Iterator[bytes]:
        """The original bytes of the sorted `rows`; each record ends with a line break."""
        for _, block in read_slices(self.path, self._starts, (rows + 1).tolist()):
            yield _one_ending(block)

    def json_lines(self, rows: np.ndarray) -> Iterator[bytes]:
        """The sorted `rows` as JSON objects of the same values, a line each.

        Raises DataError for a row that cannot be read.
        """
        for begin, block in read_slices(self.path, self._starts, (rows + 1).tolist()):
            values = self._row(begin, block)
            if isinstance(values, Broken):
                raise DataError(f"data.path: a broken record cannot become a JSON line; {values.reason}")
            yield json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"

    def _row(self, begin: int, block: bytes) -> dict[str, Any] | Broken:
        where = f"{self.path.name}, record at byte {begin}"
        try:
            fields = _parse(block)
        except (csv.Error, UnicodeDecodeError) as error:
            return Broken(f"broken CSV ({where}: {error})")
        if len(fields) == len(self.columns):
            return dict(zip(self.columns, fields, strict=True))
        return Broken(f"{len(fields)} fields under a header of {len(self.columns)} ({where})")

    def _read_header(self) -> None:
        _, block = next(read_slices(self.path, self._starts, [0]))
        try:
            self.columns = _parse(block)
        except (csv.Error, UnicodeDecodeError) as error:
            raise LayoutError(f"has a header that cannot be read ({error})") from error
        twice = [name for k, name in enumerate(self.columns) if name in self.columns[:k]]
        if twice:
            raise LayoutError(f"has two columns {twice[0]!r}")
        with self.path.open("rb") as file:
            mark = file.read(3)
        self.header = (BYTE_ORDER_MARK if mark == BYTE_ORDER_MARK else b"") + _one_ending(block)


def record_starts(file: BinaryIO) -> Iterator[int]:
    """Where the header and each record starts, then where the last ends.

    A record that cannot be parsed ends with its line, so that one of them does not cost the others: with its
    first line where a quote is never closed, which would reach to the end of the file.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _Lines(file)
    while True:
        start = lines.position
        try:
            for fields in csv.reader(lines, strict=True):
                if fields:
                    yield start
                start = lines.position
        except csv.Error:
            yield start
            if lines.is_at_end:
                lines.go_behind_line(start)
            continue
        yield start
        return


class _Lines:
    """The lines of a file, a character for each byte, and the position behind the last one given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 3 if file.read(3) == BYTE_ORDER_MARK else 0
        file.seek(self.position)
        self.is_at_end = False

    def go_behind_line(self, start: int) -> None:
        """Go on behind the line that begins at `start`."""
        self._file.seek(start)
        self.position = start + len(self._file.readline())
        self.is_at_end = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self.is_at_end = True
            raise StopIteration
        self.position += len(line)
        return line.decode("latin-1")


def _parse(block: bytes) -> list[str]:
    # The limit of Python's module, 131,072 characters, is about memory; rows of corpora are longer.
    csv.field_size_limit(_LONGEST_FIELD)
    return next(csv.reader([block.decode("utf-8")], strict=True), [])


def _one_ending(block: bytes) -> bytes:
    """The record with its line break, without the blank lines after it."""
    record = block.rstrip(b"\r\n")
    return record + (b"\r\n" if block[len(record) :].startswith(b"\r\n") else b"\n")
