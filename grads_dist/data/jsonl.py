"""Files of JSON lines: rows by their byte offsets.

A row is a line that holds more than white space. Lines end with a newline (a carriage return before it
belongs to the line); the last one needs none. A byte order mark at the start of the file belongs to no row.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.data.records import Starts, parse_object, read_slices
from grads_dist.data.rows import Broken


class JsonlFile:
    """The rows of one file of JSON lines, read where they lie; only offsets are mapped, no row is kept."""

    schema = None

    def __init__(self, path: Path, starts: Starts) -> None:
        self.path = path
        self.num_rows = len(starts) - 1
        self._starts = starts

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any] | Broken]:
        """Rows `start` to `stop`, parsed; all columns, whatever `columns` asks for."""
        for begin, line in self._lines(range(start, stop)):
            yield parse_object(line, f"{self.path.name}, line at byte {begin}")

    def json_lines(self, rows: np.ndarray) -> Iterator[bytes]:
        """The original bytes of the sorted `rows`; each line ends with a newline."""
        for _, line in self._lines(rows.tolist()):
            yield line if line.endswith(b"\n") else line + b"\n"

    def _lines(self, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """(position, line with its ending); blank lines may follow up to where the next row is."""
        for begin, block in read_slices(self.path, self._starts, rows):
            newline = block.find(b"\n")
            yield begin, block if newline < 0 else block[: newline + 1]
