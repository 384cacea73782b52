"""Files that are one JSON array: its elements are the rows, found by their brackets without parsing."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grads_dist.data.records import BYTE_ORDER_MARK, LayoutError, Starts, parse_object, read_slices
from grads_dist.data.rows import Broken

_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'\\.|"', re.DOTALL)
_VISIBLE = re.compile(rb"[^ \t\r\n]")
_LONGEST_LINE = 1 << 28
_ALLOWED = "allowed: an array of rows, or JSON lines"


class JsonArrayFile:
    """The elements of one array, read where they lie; only offsets are mapped, no row is kept."""

    schema = None

    def __init__(self, path: Path, starts: Starts) -> None:
        self.path = path
        self.num_rows = len(starts) - 1
        self._starts = starts

    def rows(self, start: int, stop: int, columns: list[str] | None) -> Iterator[dict[str, Any] | Broken]:
        """Rows `start` to `stop`, parsed; all columns, whatever `columns` asks for."""
        for begin, block in read_slices(self.path, self._starts, range(start, stop)):
            yield parse_object(_element(block), f"{self.path.name}, element at byte {begin}")

    def json_lines(self, rows: np.ndarray) -> Iterator[bytes]:
        """The original text of the sorted `rows`, a line each.

        Line breaks and the white space around them become a space: they stand between tokens only, since JSON
        has none inside a string.
        """
        for _, block in read_slices(self.path, self._starts, rows.tolist()):
            lines = (line.strip() for line in _element(block).splitlines())
            yield b" ".join(line for line in lines if line) + b"\n"


def is_array(path: Path) -> bool:
    """Whether a .json file is an array of rows; else it is JSON lines, as files of that name often are.

    Raises LayoutError when it is neither.
    """
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        while (first := file.read(1)) and not first.strip():
            pass
        if first in (b"", b"["):
            return bool(first)
        if first == b"{" and not isinstance(parse_object(first + file.readline(_LONGEST_LINE), ""), Broken):
            return False
    found = "one JSON object over several lines" if first == b"{" else "neither an array nor JSON lines"
    raise LayoutError(f"is {found}; {_ALLOWED}")


def check_lone(row: dict[str, Any] | Broken, known: set[str]) -> None:
    """Raise LayoutError for a file's only object if it holds the rows, as in {"data": [{...}, ...]}.

    known: the names of columns; an object with one of them is a row.
    """
    if isinstance(row, Broken) or known & row.keys():
        return
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise LayoutError(f"is one object with its rows under {key!r}; {_ALLOWED}")


def element_starts(file: BinaryIO) -> Iterator[int]:
    """Where each element of the array starts, behind a bracket or comma, then where the last one ends.

    Every start is one byte behind the end of the element before. The file is mapped, so that no more of it is
    in memory than the system cares to keep. Raises LayoutError when the array has no end, or more follows it.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, depth = data.find(b"["), 0
        start = position
        while found := _OUTSIDE.search(data, position):
            mark, position = found[0], found.end()
            if mark == b'"':
                position = _string_end(data, position)
            elif mark in (b"[", b"{"):
                depth += 1
                start = position if depth == 1 else start
            elif mark != b",":
                depth -= 1
                if depth == 0:
                    break
            elif depth == 1:
                yield start
                start = position
        else:
            raise LayoutError("is an array without an end; allowed: a whole file")
        if _VISIBLE.search(data, position):
            raise LayoutError(f"goes on after its array, at byte {position}; {_ALLOWED}")
        # What is blank before the last bracket is an empty array, or what follows a comma too many.
        if data[start : position - 1].strip():
            yield start
            yield position
        else:
            yield start


def _string_end(data: mmap.mmap, position: int) -> int:
    while found := _INSIDE.search(data, position):
        position = found.end()
        if found[0] == b'"':
            return position
    raise LayoutError("is an array with a text that has no end; allowed: a whole file")


def _element(block: bytes) -> bytes:
    return block[:-1].strip()
