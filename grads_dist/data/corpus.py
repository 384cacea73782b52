"""A corpus: the rows of one or more files, numbered from 0 over all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.data.config import COLUMNS, DataConfig
from grads_dist.data.csv_records import CsvFile
from grads_dist.data.extra import Extra
from grads_dist.data.json_array import JsonArrayFile, check_lone, is_array
from grads_dist.data.jsonl import JsonlFile
from grads_dist.data.locate import Source, locate
from grads_dist.data.records import LayoutError, Starts
from grads_dist.data.rows import Broken
from grads_dist.data.scan import Scan, scan_file
from grads_dist.data.subset import Chosen, Form, Part, subset_form, write_rows, write_shards
from grads_dist.data.tables import TableFile
from grads_dist.errors import DataError

_SAMPLE_ROWS = 100
_THREADS = 8


class Corpus:
    """Read-only rows of the corpus, by number; with `limit` only the first ones belong to it."""

    def __init__(
        self, sources: list[Source], parts: Sequence[Part], fingerprint: str, limit: int | None
    ) -> None:
        self.sources = sources
        self.fingerprint = fingerprint
        """sha256 over each file's name, size and content, in order."""
        self.files = [part.path for part in parts]
        self._parts = parts
        self._form = subset_form(parts)
        self._firsts = np.cumsum([0, *(part.num_rows for part in parts)], dtype=np.int64)
        self.num_rows = int(self._firsts[-1]) if limit is None else min(limit, int(self._firsts[-1]))

    @staticmethod
    def open(config: DataConfig) -> Corpus:
        """Open the files of `config.path`; the first time, each is read through for its hash and its rows.

        Raises ConfigError for a path that names no file, and DataError for a file that cannot be read, for
        tables of different schemas and for a corpus without rows.
        """
        return Corpus.of(locate(config), config)

    @staticmethod
    def of(sources: list[Source], config: DataConfig) -> Corpus:
        """Open these files, as `open` does, wherever `config.path` leads by now."""
        # Most of a small file's time is that of the disk, which may serve several of them at once.
        with ThreadPoolExecutor(_THREADS) as pool:
            opened = list(pool.map(partial(_open, config=config), sources))
        facts = [
            [source.path.name, scan.size, scan.sha256]
            for source, (_, scan) in zip(sources, opened, strict=True)
        ]
        fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        corpus = Corpus(sources, [part for part, _ in opened], fingerprint, config.limit)
        if corpus.num_rows == 0:
            names = ", ".join(map(str, corpus.files[:3])) + (" ..." if len(sources) > 3 else "")
            raise DataError(f"data.path: no rows in {names}")
        return corpus

    @property
    def form(self) -> Form:
        """The kind of file that a subset is written as."""
        return self._form

    def columns(self) -> list[str]:
        """Names of the columns of all files: of the schema, or of the first 100 rows that can be parsed.

        Raises DataError when no row can be parsed.
        """
        names: dict[str, None] = {}
        for part in range(len(self._parts)):
            names.update(dict.fromkeys(self.part_columns(part) or []))
        if names:
            return list(names)
        first = next((row for _, row in self.iter_rows(0, self.num_rows) if isinstance(row, Broken)), None)
        if first is None:
            return []
        raise DataError(f"data.path: none of the {self.num_rows} rows can be read; row 0: {first.reason}")

    def part_columns(self, part: int) -> list[str] | None:
        """Names of the columns of one file; None where none of its rows can be read."""
        start, stop = self.part_range(part, 0, self.num_rows)
        if start >= stop:
            return None
        schema = self._parts[part].schema
        if schema is not None:
            return list(schema.names)
        names: dict[str, None] = {}
        num_parsed = 0
        for _, row in self.iter_rows(start, stop):
            if isinstance(row, Broken):
                continue
            names.update(dict.fromkeys(row))
            num_parsed += 1
            if num_parsed == _SAMPLE_ROWS:
                break
        return list(names) if num_parsed else None

    def has_schema(self, part: int) -> bool:
        """Whether the columns of this file are those of all its rows."""
        return self._parts[part].schema is not None

    def part_range(self, part: int, start: int, stop: int) -> tuple[int, int]:
        """Which of the rows `start` to `stop` lie in this file: the first one and the end; maybe none."""
        return max(start, int(self._firsts[part])), min(stop, int(self._firsts[part + 1]), self.num_rows)

    def iter_rows(
        self, start: int, stop: int, columns: list[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
        """(index, row) for the rows `start` to `stop`; a row that cannot be read comes as Broken.

        `columns`: what of a table's row is read; all by default.
        """
        self._check([start, stop - 1] if start < stop else [])
        # The files that hold them, and no others: asked for each file's rows in turn, this stays linear.
        held = np.searchsorted(self._firsts, [start, stop - 1], side="right") - 1
        for k in range(int(held[0]), int(held[1]) + 1) if start < stop else ():
            first, (low, high) = int(self._firsts[k]), self.part_range(k, start, stop)
            if low < high:
                yield from enumerate(self._parts[k].rows(low - first, high - first, columns), low)

    def row(self, index: int) -> dict[str, Any]:
        """The row `index`. Raises DataError if it is not in the corpus or cannot be read."""
        _, row = next(self.iter_rows(index, index + 1))
        if isinstance(row, Broken):
            raise DataError(f"row {index}: {row.reason}")
        return row

    def rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows of these indices, in their order; for a few rows, since each is looked up alone."""
        return [self.row(int(index)) for index in indices]

    def write_subset(
        self,
        indices: np.ndarray,
        folder: Path,
        rows_per_file: int | None = None,
        columns: dict[str, np.ndarray] | None = None,
    ) -> Path:
        """Write the rows of the ascending `indices` to subset.jsonl, .csv or .parquet in `folder`.

        JSON lines and CSV records are copied byte for byte (a missing last newline is added), elements of
        JSON arrays with their own text on a line; rows of tables have equal values and schema; of files of
        several kinds, JSON lines of equal values.

        Args:
            indices: int64, rows of the corpus.
            folder: where to.
            rows_per_file: if given, files of so many rows in the folder `subset`, which must not be there.
            columns: columns that the rows get behind their own, a value for each of the indices.

        Returns:
            The path of the file, or of the folder of files.

        Raises:
            DataError: an index is not in the corpus, or a row has one of the columns already.
            ValueError: the indices do not ascend.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if np.any(np.diff(indices) <= 0):
            raise ValueError("indices do not ascend")
        self._check(indices[[0, -1]].tolist() if len(indices) else [])
        cuts = np.searchsorted(indices, self._firsts)
        rows = [
            (part, indices[low:high] - first)
            for part, first, low, high in zip(self._parts, self._firsts, cuts, cuts[1:], strict=False)
            if low < high
        ]
        chosen = Chosen(rows, self._form, self._parts, Extra(columns, indices) if columns else None)
        if rows_per_file is None:
            path = Path(folder) / f"subset.{self._form}"
            write_rows(chosen, path)
        else:
            path = Path(folder) / "subset"
            write_shards(chosen, path, rows_per_file)
        return path

    def _check(self, indices: list[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_rows:
                raise DataError(f"row {index} is not in the corpus, which has {self.num_rows} rows")


def _open(source: Source, config: DataConfig) -> tuple[Part, Scan]:
    path, cache = source.path, config.cache_folder()
    try:
        if source.kind in ("parquet", "arrow"):
            scan = scan_file(path, cache, None)
            return TableFile(path), scan
        if source.kind == "csv":
            scan = scan_file(path, cache, "records")
            return CsvFile(path, _starts(scan)), scan
        if source.kind == "json":
            return _open_json(path, config)
    except LayoutError as fault:
        raise DataError(f"data.path: {str(path)!r} {fault}") from fault
    except OSError as error:
        raise DataError(f"data.path: {str(path)!r} cannot be read ({error.strerror})") from error
    scan = scan_file(path, cache, "lines")
    return JsonlFile(path, _starts(scan)), scan


def _open_json(path: Path, config: DataConfig) -> tuple[Part, Scan]:
    if is_array(path):
        scan = scan_file(path, config.cache_folder(), "array")
        return JsonArrayFile(path, _starts(scan)), scan
    scan = scan_file(path, config.cache_folder(), "lines")
    part = JsonlFile(path, _starts(scan))
    if part.num_rows == 1:
        check_lone(next(part.rows(0, 1, None)), {config.column(name) for name in COLUMNS})
    return part, scan


def _starts(scan: Scan) -> Starts:
    assert scan.starts is not None
    return scan.starts
