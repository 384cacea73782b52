"""Numbers of a run as JSON lines, one file a rank, appended as they come."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from grads_dist.errors import DataError, GradsDistError

Value = float | int | str | None
_TAIL_BYTES = 1 << 16


def metrics_path(folder: Path, rank: int) -> Path:
    """The file of a rank's metrics."""
    return folder / f"metrics-{rank:05d}.jsonl"


class Metrics:
    """Appends records to the file of this rank, each in one write to the system, so that a kill costs none.

    Args:
        folder: where the files of all ranks lie.
        rank: this rank.
        append: whether what an earlier start of the run wrote stays.

    Raises:
        GradsDistError: the file cannot be written, as on a full disk; from `write`, too.
    """

    def __init__(self, folder: Path, rank: int, append: bool) -> None:
        self.path = metrics_path(folder, rank)
        self._rank = rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if append else os.O_TRUNC), 0o666)
            _cut_torn_line(self._file)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, record: Mapping[str, Value]) -> None:
        """Append the record with the time (`time`, ISO 8601, UTC) and `rank`; NaN and infinities as null."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": now, "rank": self._rank} | {name: _finite(value) for name, value in record.items()}
        line = memoryview(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _unwritable(self, error: OSError) -> GradsDistError:
        return GradsDistError(f"metrics: {str(self.path)!r} cannot be written ({error.strerror})")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in order; a last line that a kill or a full disk has cut off is left out.

    Raises DataError when the file cannot be read or another line is no record.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"metrics: {str(path)!r} cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"metrics: line {number} of {str(path)!r} is no JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"metrics: line {number} of {str(path)!r} is no record")
        records.append(record)
    return records


def last_record(path: Path) -> dict[str, Any] | None:
    """The last whole record of a file, of which only the end is read; None where there is none.

    Raises DataError when the file cannot be read or the line is no record.
    """
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"metrics: {str(path)!r} cannot be read ({error.strerror})") from error
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        return None
    try:
        record = json.loads(whole[-1])
    except ValueError as error:
        raise DataError(f"metrics: the last line of {str(path)!r} is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"metrics: the last line of {str(path)!r} is no record")
    return record


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(file: int) -> None:
    """Go to the end of the file, and first cut off a last line without an end: it is no record."""
    end = os.fstat(file).st_size
    while end:
        start = max(end - _TAIL_BYTES, 0)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < os.fstat(file).st_size:
        os.ftruncate(file, end)
    os.lseek(file, end, os.SEEK_SET)
