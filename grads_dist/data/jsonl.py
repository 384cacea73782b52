"""Files of JSON lines: rows by their byte offsets.

A row is a line that holds more than white space. Lines end with a newline (a carriage return before it
belongs to the line); the last one needs none. A byte order mark at the start of the file belongs to no row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grads_dist.data.rows import Broken, kind_of_value, shorten
from grads_dist.data.scan import Scan

_ROWS_PER_READ = 4096


class JsonlFile:
    """The rows of one .jsonl file, read where they lie; only offsets are mapped, no row is kept."""

    def __init__(self, path: Path, scan: Scan) -> None:
        assert scan.starts is not None
        self.path = path
        self.num_rows = len(scan.starts) - 1
        self._starts = scan.starts

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any] | Broken]:
        """Rows `start` to `stop`, parsed; all columns, whatever `columns` asks for."""
        with self.path.open("rb") as file:
            for row in range(start, stop, _ROWS_PER_READ):
                bounds = self._starts[row : min(row + _ROWS_PER_READ, stop) + 1].tolist()
                for begin, end in zip(bounds, bounds[1:], strict=False):
                    yield self._parse(_line(file, begin, end), begin)

    def copy_rows(self, rows: np.ndarray, target: BinaryIO) -> None:
        """Append the original bytes of the sorted `rows` to `target`; each line ends with a newline."""
        with self.path.open("rb") as file:
            for row in rows.tolist():
                line = _line(file, int(self._starts[row]), int(self._starts[row + 1]))
                target.write(line if line.endswith(b"\n") else line + b"\n")

    def _parse(self, line: bytes, begin: int) -> dict[str, Any] | Broken:
        where = f"{self.path.name}, line at byte {begin}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Broken(f"not UTF-8 text ({where}: {error.reason} at byte {error.start} of the line)")
        except json.JSONDecodeError as error:
            return Broken(f"broken JSON ({where}: {error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            return Broken(f"broken JSON ({where}: {shorten(str(error))})")
        if not isinstance(row, dict):
            return Broken(f"the row is {kind_of_value(row)}, not an object ({where})")
        return row


def _line(file: BinaryIO, begin: int, end: int) -> bytes:
    """The line from `begin`, with its ending; blank lines may follow up to `end`, where the next row is."""
    file.seek(begin)
    block = file.read(end - begin)
    newline = block.find(b"\n")
    return block if newline < 0 else block[: newline + 1]
