"""Shards of the score table and of features, written by every rank while it probes.

A shard appears under its final name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from grads_dist.data.store import TokenStore
from grads_dist.runtime.rundir import atomic_write
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets
from grads_dist.stats.tensors import HostCopy
from grads_dist.table.notes import Notes
from grads_dist.table.schema import STATISTICS, score_schema

FLOAT16_MAX = float(np.finfo(np.float16).max)


class RowSource(Protocol):
    """What the table says of rows besides their gradients, by position; a TokenStore is one."""

    @property
    def index(self) -> np.ndarray:
        """Row number in the corpus, int64."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Ids."""
        ...

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens, int32."""
        ...

    @property
    def num_label_tokens(self) -> np.ndarray:
        """Tokens that carry loss, int32."""
        ...

    @property
    def token_hash(self) -> np.ndarray:
        """Hashes of tokens and loss mask, int64."""
        ...


class RowBatch(Protocol):
    """A batch that knows its rows; a Batch is one."""

    @property
    def rows(self) -> Tensor:
        """Positions in the row source, int64 [S]."""
        ...


class Seen(NamedTuple):
    """What a micro-batch shows while a pass runs, float64 [S] each."""

    loss: np.ndarray
    log_norm: np.ndarray
    """Mean over the targets of the log gradient norms; NaN for a row that is not finite."""


@dataclass(frozen=True)
class SentScores:
    """A micro-batch's columns of the score table on their way to the host."""

    names: tuple[str, ...]
    values: HostCopy
    """Float64 [columns, S]."""
    targets: tuple[str, ...]
    head_counts: tuple[int, int, int]


class ScoreShards:
    """Collects rows of the score table and writes them as Parquet shards into `folder`.

    Args:
        folder: where the shards go.
        store: the rows' tokens and numbers.
        targets: what the statistics are of.
        checkpoint: place of the present weights among the probed checkpoints.
    """

    def __init__(self, folder: Path, store: RowSource, targets: Targets, checkpoint: int = 0) -> None:
        self._folder, self._store, self._targets, self._checkpoint = folder, store, targets, checkpoint
        self._schema = score_schema(targets.members)
        self._parts: list[dict[str, np.ndarray]] = []
        self._notes = Notes()
        self.num_rows = 0
        """Rows added or rejected since the last flush."""
        self.num_nonfinite = 0

    def add(self, batch: RowBatch, head: HeadResult, stats: dict[str, Statistics], step: int) -> Seen:
        """Add the rows of one micro-batch."""
        return self.receive(batch, self.send(head, stats), step)

    def send(self, head: HeadResult, stats: dict[str, Statistics]) -> SentScores:
        """Start what a micro-batch gave on its way to the host; nothing is added yet.

        What memory is needed on the device, this needs.
        """
        named = {"loss": head.losses.double(), "el2n": head.el2n.double()}
        for target, found in stats.items():
            named.update(_columns(target, found, self._targets.numel[target]))
        # One copy from the device for all of them.
        values = HostCopy(torch.stack(list(named.values())))
        counts = (head.num_certified, head.rows_formed, head.num_formed_whole)
        return SentScores(tuple(named), values, tuple(stats), counts)

    def receive(self, batch: RowBatch, sent: SentScores, step: int) -> Seen:
        """Add the rows of a micro-batch when its numbers have come."""
        columns = dict(zip(sent.names, sent.values.numpy(), strict=True))
        columns["row"] = batch.rows.numpy()
        columns["step"] = np.full(len(batch.rows), step, dtype=np.int32)
        columns["checkpoint"] = np.full(len(batch.rows), self._checkpoint, dtype=np.int32)
        columns["finite"] = _finite(columns, sent.targets)
        self._parts.append(columns)
        self.num_nonfinite += int((~columns["finite"]).sum())
        self.num_rows += len(batch.rows)
        self._notes.head_counts += sent.head_counts
        with np.errstate(divide="ignore", invalid="ignore"):
            signal = np.mean([np.log(columns[f"{target}.norm"]) for target in sent.targets], axis=0)
        return Seen(columns["loss"], np.where(columns["finite"], signal, np.nan))

    def reject(self, row: int, reason: str) -> None:
        """Note that the row at this position of the row source cannot be probed."""
        self._notes.rejected[int(self._store.index[row])] = reason
        self.num_rows += 1

    def flush(self, name: str, skipped_steps: int = 0) -> None:
        """Write what was added since the last flush as `shard-<name>.parquet`, if anything was.

        skipped_steps: optimizer steps that were left out so far.
        """
        if not self.num_rows:
            return
        self._notes.skipped_steps = skipped_steps
        table = self._table().cast(self._notes.on(self._schema))
        self._parts, self._notes, self.num_rows = [], Notes(), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._folder / f"shard-{name}.parquet") as path:
            pq.write_table(table, path)

    def _table(self) -> pa.Table:
        if not self._parts:
            return self._schema.empty_table()
        columns = {key: np.concatenate([part[key] for part in self._parts]) for key in self._parts[0]}
        columns.update(_row_columns(self._store, columns["row"], columns["finite"]))
        arrays = [pa.array(_cast(columns[f.name], f.type), type=f.type) for f in self._schema]
        return pa.Table.from_arrays(arrays, schema=self._schema)


def _columns(target: str, found: Statistics, numel: int) -> dict[str, Tensor]:
    values = {
        "sum": found.sum,
        "sumsq": found.sumsq,
        "min": found.min,
        "max": found.max,
        "mean": found.mean(numel),
        "std": found.std(numel),
        "norm": found.norm(),
        "nonfinite": found.nonfinite.double(),
    }
    assert values.keys() == STATISTICS.keys()
    return {f"{target}.{name}": value for name, value in values.items()}


def _finite(columns: dict[str, np.ndarray], targets: Sequence[str]) -> np.ndarray:
    """Rows whose loss and gradients are finite throughout."""
    finite = np.isfinite(columns["loss"]) & np.isfinite(columns["el2n"])
    for target in targets:
        finite &= (columns[f"{target}.nonfinite"] == 0) & np.isfinite(columns[f"{target}.sumsq"])
    return finite


def _cast(values: np.ndarray, kind: pa.DataType) -> np.ndarray:
    """Columns travel as float64; the table keeps what its schema says, infinity beyond float32's range."""
    if values.dtype != np.float64:
        return values
    with np.errstate(over="ignore"):
        return values.astype(kind.to_pandas_dtype())


def _row_columns(store: RowSource, rows: np.ndarray, finite: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "index": store.index[rows],
        "id": np.array([store.ids[int(row)] for row in rows], dtype=object),
        "status": np.where(finite, "ok", "nonfinite"),
        "num_tokens": store.num_tokens[rows],
        "num_label_tokens": store.num_label_tokens[rows],
        "token_hash": store.token_hash[rows],
    }


class FeatureShards:
    """Collects feature vectors and writes them as float16 .npy shards, their corpus rows beside them."""

    def __init__(self, folder: Path, store: TokenStore, projection: Tensor | None) -> None:
        self._folder, self._store, self._projection = folder, store, projection
        self._rows: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self.num_rows = 0

    def add(self, batch: RowBatch, features_SD: Tensor) -> None:
        """Add the features of one micro-batch."""
        self.receive(batch, self.send(features_SD))

    def send(self, features_SD: Tensor) -> HostCopy:
        """Start a micro-batch's features on their way to the host, as they are written: projected if they
        have more dimensions than wanted. Nothing is added yet."""
        if self._projection is not None:
            features_SD = features_SD @ self._projection
        return HostCopy(features_SD.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16))

    def receive(self, batch: RowBatch, sent: HostCopy) -> None:
        """Add the features of a micro-batch when they have come."""
        self._rows.append(batch.rows.numpy())
        self._features.append(sent.numpy())
        self.num_rows += len(batch.rows)

    def flush(self, name: str) -> None:
        """Write what was added since the last flush; nothing if there is nothing."""
        if not self._rows:
            return
        index = self._store.index[np.concatenate(self._rows)]
        features = np.concatenate(self._features)
        self._rows, self._features, self.num_rows = [], [], 0
        self._folder.mkdir(parents=True, exist_ok=True)
        # The features last: they are what counts as complete.
        for suffix, array in ((".index.npy", index), (".npy", features)):
            with atomic_write(self._folder / f"shard-{name}{suffix}") as path:
                np.save(path, array, allow_pickle=False)
