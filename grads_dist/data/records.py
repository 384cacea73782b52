"""What the text files of a corpus share: rows are slices of bytes, found once and read where they lie."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.data.rows import Broken, kind_of_value, shorten
from grads_dist.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_START = np.dtype(np.int64)


class LayoutError(Exception):
    """A file is not laid out as its name says; the text goes on after its name."""


class Starts:
    """Where each row of a text file starts and the last one ends, int64, in a file of its own.

    It is mapped only while rows are read: a mapping keeps its file open, and a corpus may have more files
    than a process may open.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when there is no such file, ValueError when its size cannot be right."""
        self._path = path
        self._count, rest = divmod(path.stat().st_size, _START.itemsize)
        if rest or not self._count:
            raise ValueError("starts.i64 is cut off")

    def __len__(self) -> int:
        return self._count

    def load(self) -> np.ndarray:
        """The starts, mapped for as long as the array lives. Raises DataError when the file has gone."""
        try:
            return np.asarray(np.memmap(self._path, dtype=_START, mode="r", shape=(self._count,)))
        except (OSError, ValueError) as error:
            raise DataError(f"data.cache_dir: {str(self._path)!r} cannot be read ({error})") from error


def read_slices(path: Path, starts: Starts, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of the `rows`: what lies between the starts of the row and of the next one."""
    offsets = starts.load()
    # Buffered, so that rows next to each other cost no seek.
    position = -1
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        for row in rows:
            begin, end = int(offsets[row]), int(offsets[row + 1])
            if begin != position:
                file.seek(begin)
            yield begin, file.read(end - begin)
            position = end


def parse_object(text: bytes, where: str) -> dict[str, Any] | Broken:
    """The JSON object `text`; Broken where it is none, with the place `where` in the reason."""
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text ({where}: {error.reason} at byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Broken(f"broken JSON ({where}: {error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Broken(f"broken JSON ({where}: {shorten(str(error))})")
    if not isinstance(row, dict):
        return Broken(f"the row is {kind_of_value(row)}, not an object ({where})")
    return row
