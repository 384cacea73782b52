"""Joins the shards that all ranks wrote into one score table and one feature matrix, and counts the rows."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grads_dist.errors import DataError
from grads_dist.runtime.rundir import RunDir, atomic_write
from grads_dist.table.notes import Notes, read_notes

MERGE_ROWS = 1 << 20
"""Rows of the score table in memory at a time while merging."""


@dataclass(frozen=True)
class Merged:
    """What a merged table holds."""

    index: np.ndarray
    """Its corpus rows, ascending, each once."""
    num_rows: int
    """Its rows: as many for every corpus row as there are checkpoints."""
    num_nonfinite: int
    notes: Notes
    """Those of all shards; the rejected rows are in no table."""


def merge_scores(
    rundir: RunDir,
    expected_index: np.ndarray,
    rows_at_a_time: int = MERGE_ROWS,
    num_checkpoints: int = 1,
) -> Merged:
    """Write scores.parquet, sorted by (`index`, `checkpoint`), without the rows that a shard rejects.

    The shards are first dealt out to buckets of consecutive row numbers, then each bucket is sorted, so that
    memory does not grow with the table.

    Args:
        expected_index: numbers of the corpus rows that must be there, ascending.
        rows_at_a_time: rows of one bucket.
        num_checkpoints: how many rows each of them must have, one for each checkpoint.

    Raises DataError when a row is missing, or there twice.
    """
    paths = sorted(rundir.scores_dir.glob("shard-*.parquet"))
    if not paths:
        raise DataError(f"{rundir.scores_dir}: no shard of the score table is there; run the probe first")
    return join_tables(
        paths, rundir.scores, expected_index, str(rundir.scores_dir), rows_at_a_time, num_checkpoints
    )


def join_tables(
    paths: Sequence[Path],
    output: Path,
    expected_index: np.ndarray,
    where: str,
    rows_at_a_time: int = MERGE_ROWS,
    num_checkpoints: int = 1,
) -> Merged:
    """`merge_scores` for any files of the score table's schema; `where` names them in errors."""
    notes = read_notes(paths)
    index = np.setdiff1d(expected_index, np.fromiter(notes.rejected, np.int64, len(notes.rejected)))
    found = np.concatenate([_keys(path, num_checkpoints) for path in paths])
    # A row rejected at one checkpoint counts at none.
    found = found[~np.isin(found // num_checkpoints, list(notes.rejected))] if notes.rejected else found
    expected = (index[:, None] * num_checkpoints + np.arange(num_checkpoints)).ravel()
    _check_rows(np.sort(found), expected, where, num_checkpoints)
    bounds = index[rows_at_a_time::rows_at_a_time]
    num_nonfinite = 0
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge-") as folder:
        buckets = _deal_out(paths, bounds, Path(folder)) if len(bounds) else [paths]
        with atomic_write(output) as path:
            with pq.ParquetWriter(path, pq.read_schema(paths[0]).remove_metadata()) as writer:
                for bucket in buckets:
                    table = pa.concat_tables(pq.read_table(p).replace_schema_metadata() for p in bucket)
                    if notes.rejected:
                        table = table.filter(pc.invert(pc.is_in(table["index"], pa.array(notes.rejected))))
                    num_nonfinite += pc.sum(pc.not_equal(table["status"], "ok")).as_py() or 0
                    writer.write_table(table.sort_by([("index", "ascending"), ("checkpoint", "ascending")]))
    return Merged(index, len(expected), num_nonfinite, notes)


def _keys(path: Path, num_checkpoints: int) -> np.ndarray:
    """One number for each (corpus row, checkpoint) of a shard, in the order of both."""
    table = pq.read_table(path, columns=["index", "checkpoint"])
    checkpoint = table["checkpoint"].to_numpy()
    if len(checkpoint) and not 0 <= checkpoint.min() <= checkpoint.max() < num_checkpoints:
        raise DataError(f"{path}: checkpoint {checkpoint.max()} is not one of {num_checkpoints}")
    return table["index"].to_numpy() * num_checkpoints + checkpoint


def _deal_out(paths: Sequence[Path], bounds: np.ndarray, folder: Path) -> list[list[Path]]:
    """Split every shard by `bounds` of the row number; one file a bucket, in order."""
    schema = pq.read_schema(paths[0]).remove_metadata()
    files = [folder / f"{bucket:06d}.parquet" for bucket in range(len(bounds) + 1)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(file, schema)) for file in files]
        # Shards of the epoch have rows of every bucket: many are split at a time, since each piece that is
        # written costs memory in its writer.
        for group in _groups(paths):
            table = pa.concat_tables(pq.read_table(path).replace_schema_metadata() for path in group)
            bucket_of_row = np.searchsorted(bounds, table["index"].to_numpy(), side="right")
            for bucket in np.unique(bucket_of_row).tolist():
                writers[bucket].write_table(table.filter(pa.array(bucket_of_row == bucket)))
    return [[file] for file in files]


def _groups(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The shards in groups of about MERGE_ROWS rows."""
    group: list[Path] = []
    rows = 0
    for path in paths:
        group.append(path)
        rows += pq.read_metadata(path).num_rows
        if rows >= MERGE_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def merge_features(
    rundir: RunDir, name: str, expected_index: np.ndarray, rejected: Collection[int] = ()
) -> None:
    """Write features/<name>.npy, row k for the k-th of `expected_index`, one shard in memory at a time.

    Rows in `rejected` may have features, which are left out. Raises DataError when another row is missing, or
    there twice.
    """
    folder = rundir.features_dir(name)
    paths = sorted(p for p in folder.glob("shard-*.npy") if not p.name.endswith(".index.npy"))
    if not paths:
        raise DataError(f"{folder}: no shard of features is there; run the probe first")
    indices = [np.load(_index_of(path), allow_pickle=False) for path in paths]
    kept = [~np.isin(index, list(rejected)) for index in indices]
    found = np.concatenate([index[keep] for index, keep in zip(indices, kept, strict=True)])
    _check_rows(np.sort(found), expected_index, str(folder))
    width = np.load(paths[0], mmap_mode="r", allow_pickle=False).shape[1]
    with atomic_write(rundir.features(name)) as path:
        merged = np.lib.format.open_memmap(path, "w+", np.float16, (len(expected_index), width))
        for shard, index, keep in zip(paths, indices, kept, strict=True):
            merged[np.searchsorted(expected_index, index[keep])] = np.load(shard, allow_pickle=False)[keep]
        merged.flush()
        del merged


def _index_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".npy") + ".index.npy")


def _check_rows(found: np.ndarray, expected: np.ndarray, where: str, num_checkpoints: int = 1) -> None:
    """`found` ascending; exactly the expected keys must be there, each once."""
    if np.array_equal(found, expected):
        return

    def row(key: int) -> str:
        at = f" at checkpoint {key % num_checkpoints}" if num_checkpoints > 1 else ""
        return f"row {key // num_checkpoints}{at}"

    doubled = found[1:][found[1:] == found[:-1]]
    if len(doubled):
        raise DataError(f"{where}: {row(doubled[0])} is there twice ({len(doubled)} such rows)")
    missing = np.setdiff1d(expected, found)
    if len(missing):
        raise DataError(f"{where}: {row(missing[0])} is missing ({len(missing)} such rows)")
    raise DataError(f"{where}: {row(np.setdiff1d(found, expected)[0])} does not belong to this corpus")
