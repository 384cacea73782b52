"""What a selection reads: the files of a finished probe, or a table that no probe wrote and its features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.checkpoints import fold_checkpoints
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.foreign import check_columns, fill_missing, infer_targets, log_defaults
from grads_dist.selection.select import needed_columns

CANDIDATE_COLUMNS = ("index", "status", "num_tokens", "token_hash")
"""What tells which rows are candidates."""
# UnicodeDecodeError: names of columns that are no UTF-8.
_READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError)


@dataclass(frozen=True)
class Source:
    """Where a selection reads from; nothing is read before it is asked for."""

    scores: Path
    """The score table."""

    columns: list[str]
    """Its columns."""

    targets: list[str]
    """The probed targets."""

    features: dict[str, Path]
    """Feature files by name; row k belongs to the k-th corpus row of the table."""

    output: RunDir
    """Where the selection goes."""

    is_run: bool
    """Whether a probe wrote it: then every column is there, and `output` is the run."""

    def table(self, columns: list[str]) -> tuple[pa.Table, list[str]]:
        """Those of the columns that are there, one row for each row of the corpus, and the targets.

        `checkpoint` is not there in runs of earlier versions, which knew but one.

        Raises DataError for a table that cannot be read.
        """
        present = [name for name in dict.fromkeys([*columns, "checkpoint"]) if name in self.columns]
        try:
            table = pq.read_table(self.scores, columns=present)
        except _READ_ERRORS as error:
            raise _unreadable(self.scores, error) from error
        if not self.is_run:
            table = fill_missing(table, pq.read_metadata(self.scores).num_rows)
        return fold_checkpoints(table, self.targets)

    def selection_table(self, selection: SelectionConfig) -> tuple[pa.Table, list[str]]:
        """The columns that a selection needs, as `table` gives them; `select` names one that is missing."""
        also = [] if selection.stratify_by is None else [selection.stratify_by]
        return self.table([*needed_columns(selection, self.targets), *also])

    def read_features(self, name: str) -> np.ndarray:
        """The features `name`, [rows, dim], as a memory map.

        Raises DataError for a file that is no matrix of numbers.
        """
        path = self.features[name]
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"features: {str(path)!r} cannot be read ({error})") from error
        if features.ndim != 2 or features.dtype.kind != "f" or not features.shape[1]:
            raise DataError(
                f"features: {str(path)!r} holds {features.dtype} of shape {list(features.shape)}; "
                "allowed: floating point numbers, a row for each row of the table"
            )
        return features

    def graph_folder(self, features: str) -> Path:
        """Where the neighbours by these features are kept."""
        return self.output.similarity_dir(features)


def run_source(rundir: RunDir) -> Source:
    """The files of a finished probe.

    Raises:
        ConfigError: the folder holds none, or links among its own files.
        DataError: the score table cannot be read.
    """
    rundir.check_links()
    for path in (rundir.scores, rundir.manifest):
        if not path.exists():
            raise ConfigError(f"output_dir: {str(rundir.root)!r} has no {path.name}; probe first")
    targets = list(rundir.read_manifest()["targets"])
    found = sorted(rundir.features("content").parent.glob("*.npy"))
    features = {path.stem: path for path in found if not path.stem.endswith(".target")}
    columns = _schema(rundir.scores).names
    return Source(rundir.scores, columns, targets, features, rundir, is_run=True)


def table_source(scores: Path, features: Path | None, selection: SelectionConfig, output: RunDir) -> Source:
    """A Parquet table that no probe wrote, and the features of its rows, if there are any.

    Raises:
        ConfigError: a file is not there, or lacks what the selection reads, or a run has a selection of this
            name.
        DataError: the table is no Parquet file.
    """
    for flag, path in {"table": scores, "features": features}.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"{flag}: {str(path)!r} is not there; allowed: a file")
    if output.manifest.exists() and output.selection_dir(selection.name).exists():
        raise ConfigError(
            f"output_dir: {str(output.root)!r} is a run and has a selection {selection.name!r}; "
            "allowed: another folder, or another --selection.name"
        )
    output.check_links()
    columns = {field.name: field.type for field in _schema(scores)}
    check_columns(columns, selection, features is not None)
    log_defaults(columns)
    files = {} if features is None else {features.stem: features}
    return Source(scores, list(columns), infer_targets(list(columns)), files, output, is_run=False)


def _schema(scores: Path) -> pa.Schema:
    try:
        return pq.read_schema(scores)
    except _READ_ERRORS as error:
        raise _unreadable(scores, error) from error


def _unreadable(scores: Path, error: Exception) -> DataError:
    return DataError(f"table: {str(scores)!r} is no readable Parquet file ({error})")
