"""A corpus: the rows of one or more .jsonl or .parquet files, numbered from 0 over all of them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.data.config import DataConfig
from grads_dist.data.jsonl import JsonlFile
from grads_dist.data.parquet import ParquetFile
from grads_dist.data.rows import Broken
from grads_dist.data.scan import scan_file
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import atomic_write

Kind = Literal["jsonl", "parquet"]
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".parquet": "parquet"}
_SAMPLE_ROWS = 100


class Corpus:
    """Read-only rows of the corpus, by number; with `limit` only the first ones belong to it."""

    def __init__(
        self, parts: Sequence[JsonlFile | ParquetFile], kind: Kind, fingerprint: str, limit: int | None
    ) -> None:
        self.kind = kind
        self.fingerprint = fingerprint
        """sha256 over each file's name, size and content, in order."""
        self.files = [part.path for part in parts]
        self._parts = parts
        self._firsts = np.cumsum([0, *(part.num_rows for part in parts)], dtype=np.int64)
        self.num_rows = int(self._firsts[-1]) if limit is None else min(limit, int(self._firsts[-1]))

    @staticmethod
    def open(config: DataConfig) -> Corpus:
        """Open the files of `config.path`; the first time, each is read through for its hash and its rows.

        Raises ConfigError for a path that names no file, or files of several kinds, and DataError for a file
        that cannot be read, for Parquet files of different schemas and for a corpus without rows.
        """
        files = _files(config.patterns)
        kind = _kind(files)
        cache = config.cache_folder()
        scans = [scan_file(path, cache, find_rows=kind == "jsonl") for path in files]
        parts: Sequence[JsonlFile | ParquetFile]
        if kind == "jsonl":
            parts = [JsonlFile(path, scan) for path, scan in zip(files, scans, strict=True)]
        else:
            parts = _parquet_files(files)
        facts = [[path.name, scan.size, scan.sha256] for path, scan in zip(files, scans, strict=True)]
        corpus = Corpus(parts, kind, hashlib.sha256(json.dumps(facts).encode()).hexdigest(), config.limit)
        if corpus.num_rows == 0:
            names = ", ".join(map(str, files[:3])) + (" ..." if len(files) > 3 else "")
            raise DataError(f"data.path: no rows in {names}")
        return corpus

    def columns(self) -> list[str]:
        """Names of the columns: of the schema, or of the first 100 rows that can be parsed.

        Raises DataError when no row can be parsed.
        """
        if self.kind == "parquet":
            return list(self._schema.names)
        names: dict[str, None] = {}
        num_parsed, first_reason = 0, ""
        for index, row in self.iter_rows(0, self.num_rows):
            if isinstance(row, Broken):
                first_reason = first_reason or f"row {index}: {row.reason}"
                continue
            names.update(dict.fromkeys(row))
            num_parsed += 1
            if num_parsed == _SAMPLE_ROWS:
                break
        if num_parsed == 0:
            raise DataError(f"data.path: none of the {self.num_rows} rows can be read; {first_reason}")
        return list(names)

    def iter_rows(
        self, start: int, stop: int, columns: list[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
        """(index, row) for the rows `start` to `stop`; a row that cannot be read comes as Broken.

        `columns`: what of a Parquet row is read; all by default.
        """
        self._check([start, stop - 1] if start < stop else [])
        for k, part in enumerate(self._parts):
            first = int(self._firsts[k])
            low, high = max(start, first), min(stop, int(self._firsts[k + 1]))
            if low < high:
                yield from enumerate(part.rows(low - first, high - first, columns), low)

    def row(self, index: int) -> dict[str, Any]:
        """The row `index`. Raises DataError if it is not in the corpus or cannot be read."""
        _, row = next(self.iter_rows(index, index + 1))
        if isinstance(row, Broken):
            raise DataError(f"row {index}: {row.reason}")
        return row

    def rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows of these indices, in their order; for a few rows, since each is looked up alone."""
        return [self.row(int(index)) for index in indices]

    def write_subset(self, indices: np.ndarray, folder: Path) -> Path:
        """Write the rows of the ascending `indices` to subset.jsonl or subset.parquet in `folder`.

        Returns the path. JSON lines are copied byte for byte (a missing last newline is added); Parquet rows
        have equal values and schema. Raises DataError for an index that is not in the corpus, ValueError when
        they do not ascend.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if np.any(np.diff(indices) <= 0):
            raise ValueError("indices do not ascend")
        self._check(indices[[0, -1]].tolist() if len(indices) else [])
        path = Path(folder) / f"subset.{self.kind}"
        with atomic_write(path) as temporary:
            if self.kind == "jsonl":
                with temporary.open("wb") as lines:
                    self._copy(indices, lines)
            else:
                with pq.ParquetWriter(temporary, self._schema) as table:
                    self._copy(indices, table)
        return path

    @property
    def _schema(self) -> pa.Schema:
        part = self._parts[0]
        assert isinstance(part, ParquetFile)
        return part.schema

    def _copy(self, indices: np.ndarray, target: Any) -> None:
        cuts = np.searchsorted(indices, self._firsts)
        for part, first, low, high in zip(self._parts, self._firsts[:-1], cuts[:-1], cuts[1:], strict=True):
            if low < high:
                part.copy_rows(indices[low:high] - first, target)

    def _check(self, indices: list[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_rows:
                raise DataError(f"row {index} is not in the corpus, which has {self.num_rows} rows")


def _files(patterns: list[str]) -> list[Path]:
    """The files, in the order of the patterns and sorted within each."""
    files: list[Path] = []
    for pattern in patterns:
        # A file whose own name looks like a glob is that file.
        plain = Path(pattern).expanduser()
        names = [str(plain)] if plain.exists() else sorted(glob.glob(str(plain), recursive=True))
        if not names:
            raise ConfigError(f"data.path: {pattern!r} matches no file")
        files.extend(map(Path, names))
    seen: set[Path] = set()
    for path in files:
        if not path.is_file():
            raise ConfigError(f"data.path: {str(path)!r} is not a file; for a folder's files write a glob")
        if path.resolve() in seen:
            raise ConfigError(f"data.path: {str(path)!r} is named twice")
        seen.add(path.resolve())
    return files


def _kind(files: list[Path]) -> Kind:
    suffixes = {path.suffix.lower(): path for path in files}
    for suffix, path in suffixes.items():
        if suffix not in _KINDS:
            raise ConfigError(f"data.path: {str(path)!r} does not end in {' or '.join(_KINDS)}")
    if len(suffixes) > 1:
        raise ConfigError(f"data.path: {' and '.join(map(repr, sorted(suffixes)))} files cannot be mixed")
    return _KINDS[next(iter(suffixes))]


def _parquet_files(files: list[Path]) -> list[ParquetFile]:
    parts = [ParquetFile(path) for path in files]
    for part in parts[1:]:
        if not part.schema.equals(parts[0].schema):
            raise DataError(f"data.path: {str(part.path)!r} and {str(files[0])!r} have different schemas")
    return parts
