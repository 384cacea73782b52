"""What the text files of a corpus share: rows are slices of bytes, found once and read where they lie."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.data.rows import Broken, kind_of_value, shorten

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


class LayoutError(Exception):
    """A file is not laid out as its name says; the text goes on after its name."""


def read_slices(path: Path, starts: np.ndarray, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of the `rows`: what lies between starts[row] and starts[row + 1] (int64 each)."""
    # Buffered, so that rows next to each other cost no seek.
    position = -1
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        for row in rows:
            begin, end = int(starts[row]), int(starts[row + 1])
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
