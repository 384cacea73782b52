"""One streaming pass over a corpus file: its content hash and, for text, where each row starts.

Both are kept in the cache under the file's path, size and times, so that a file is read through once.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from grads_dist.data.cache import publish
from grads_dist.data.csv_records import record_starts
from grads_dist.data.json_array import element_starts
from grads_dist.data.records import BYTE_ORDER_MARK, LayoutError, Starts
from grads_dist.errors import DataError

logger = logging.getLogger(__name__)

Layout = Literal["lines", "array", "records"]
"""How rows lie in a text file: a line each, elements of a JSON array, or CSV records."""

_VERSION = 3
_STARTS_PER_WRITE = 1 << 16
_BLOCK_BYTES = 1 << 22
_NEWLINE = 10
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True)
class Scan:
    """What the pass found: sha256, size in bytes, and of text the num_rows + 1 row starts, the last is the
    end."""

    sha256: str
    size: int
    starts: Starts | None


def scan_file(path: Path, cache_folder: Path, layout: Layout | None) -> Scan:
    """Scan `path`, or take an earlier scan of it from the cache; without a layout for its hash alone.

    Raises DataError when the file cannot be read, has not this layout or changes meanwhile, ConfigError when
    the cache cannot be written.
    """
    try:
        state = _state(path)
        folder = cache_folder / "scans" / _key(path, state, layout)
        if not folder.exists():
            logger.info("reading through %s (%.1f MB)", path, state[0] / 1e6)
            with publish(folder) as temporary, path.open("rb") as file:
                with (temporary / "starts.i64").open("wb") as target:
                    digest = _pass(file, target, layout)
                (temporary / "scan.json").write_text(json.dumps({"sha256": digest, "path": str(path)}))
                if _state(path) != state:
                    raise DataError(f"data.path: {str(path)!r} changed while it was read")
    except OSError as error:
        raise DataError(
            f"data.path: {str(path)!r} cannot be read into the cache {str(cache_folder)!r} ({error.strerror})"
        ) from error
    except LayoutError as fault:
        raise DataError(f"data.path: {str(path)!r} {fault}") from fault
    try:
        digest = json.loads((folder / "scan.json").read_text())["sha256"]
        starts = Starts(folder / "starts.i64") if layout else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.cache_dir: {str(folder)!r} is damaged ({error}); delete it") from error
    return Scan(digest, state[0], starts)


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _key(path: Path, state: tuple[int, int, int], layout: Layout | None) -> str:
    text = json.dumps([_VERSION, str(path.resolve()), *state, layout])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _pass(file: BinaryIO, starts: BinaryIO, layout: Layout | None) -> str:
    """Read all of `file`; write the rows' starts, then where they end, to `starts`. Returns the sha256."""
    digest = hashlib.sha256()
    position = 0
    # The start of a line that so far holds only white space, carried from block to block.
    pending: int | None = 0
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        if layout == "lines":
            if position == 0 and block.startswith(BYTE_ORDER_MARK):
                block, position, pending = block[3:], 3, 3
            found, pending = _row_starts(np.frombuffer(block, np.uint8), position, pending)
            found.tofile(starts)
        position += len(block)
    if layout == "lines":
        np.array([position], dtype=np.int64).tofile(starts)
    elif layout is not None:
        file.seek(0)
        _write(element_starts(file) if layout == "array" else record_starts(file), starts)
    return digest.hexdigest()


def _write(found: Iterator[int], starts: BinaryIO) -> None:
    while some := list(islice(found, _STARTS_PER_WRITE)):
        np.array(some, dtype=np.int64).tofile(starts)


def _row_starts(block: np.ndarray, position: int, pending: int | None) -> tuple[np.ndarray, int | None]:
    """Starts of the lines in uint8 `block` (at `position` in the file) that hold more than white space.

    A line whose first visible byte is beyond the block is handed back as the new `pending`.
    """
    newlines = np.flatnonzero(block == _NEWLINE)
    search = newlines + 1
    starts = search + position
    if pending is not None:
        search, starts = np.append(0, search), np.append(pending, starts)
    inside = search < len(block)
    is_row = np.zeros(len(search), dtype=bool)
    is_row[inside] = ~_IS_SPACE[block[search[inside]]]
    doubtful = np.flatnonzero(~is_row)
    is_open = None
    if len(doubtful):
        visible = _next(np.flatnonzero(~_IS_SPACE[block]), search[doubtful])
        line_end = _next(newlines, search[doubtful])
        is_row[doubtful] = visible < line_end
        still_open = doubtful[visible == line_end]
        is_open = int(starts[still_open[-1]]) if len(still_open) else None
    return starts[is_row].astype(np.int64), is_open


def _next(positions: np.ndarray, search: np.ndarray) -> np.ndarray:
    """For each of `search` the first of the sorted `positions` at or after it, a huge number if none is."""
    padded = np.append(positions, np.iinfo(np.int64).max)
    return padded[np.searchsorted(positions, search)]
