"""The score table of one epoch of somebody else's training: shards on every rank, one table at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from grads_dist.library.rows import RowFacts
from grads_dist.runtime.rundir import RunDir, atomic_write
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import Targets
from grads_dist.table.merge import merge_scores
from grads_dist.table.shards import ScoreShards

NO_LABELS = "no token carries loss"


class SeenRows:
    """The facts of the rows whose statistics are not on disk yet, in the order in which they came."""

    def __init__(self, ids_of: Callable[[Sequence[int]], list[str]]) -> None:
        self._ids_of = ids_of
        self._parts: list[RowFacts] = []
        self._count = 0

    def add(self, facts: RowFacts) -> Tensor:
        """Take in the rows of a batch; returns their positions, int64 [S]."""
        self._parts.append(facts)
        self._count += len(facts.index)
        return torch.arange(self._count - len(facts.index), self._count)

    def clear(self) -> None:
        """Forget all rows."""
        self._parts, self._count = [], 0

    @property
    def index(self) -> np.ndarray:
        """Row number in the dataset, int64."""
        return np.concatenate([part.index for part in self._parts])

    @property
    def ids(self) -> Sequence[str]:
        """Ids."""
        return self._ids_of(self.index.tolist())

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens, int32."""
        return np.concatenate([part.num_tokens for part in self._parts])

    @property
    def num_label_tokens(self) -> np.ndarray:
        """Tokens that carry loss, int32."""
        return np.concatenate([part.num_label_tokens for part in self._parts])

    @property
    def token_hash(self) -> np.ndarray:
        """Hashes of tokens and loss mask, int64."""
        return np.concatenate([part.token_hash for part in self._parts])


@dataclass(frozen=True)
class SeenBatch:
    """Positions of a batch's rows among the seen rows, int64 [S]."""

    rows: Tensor


class EpochTable:
    """Collects this rank's rows of an epoch and writes them as shards.

    Args:
        rundir: where the shards go.
        targets: what the statistics are of.
        ids_of: the ids of dataset rows.
        rank: this rank.
        shard_rows: rows of a shard.
    """

    def __init__(
        self,
        rundir: RunDir,
        targets: Targets,
        ids_of: Callable[[Sequence[int]], list[str]],
        rank: int,
        shard_rows: int,
    ) -> None:
        self._rows = SeenRows(ids_of)
        self._shards = ScoreShards(rundir.scores_dir, self._rows, targets)
        self._rank, self._shard_rows, self._num_shards = rank, shard_rows, 0
        self.rejected: set[int] = set()

    @property
    def num_nonfinite(self) -> int:
        """Rows so far whose loss or gradient is not finite."""
        return self._shards.num_nonfinite

    def add(self, facts: RowFacts, head: HeadResult, stats: dict[str, Statistics], step: int) -> None:
        """Add the rows of one micro-batch; those without a token that carries loss are rejected."""
        usable = np.flatnonzero(facts.num_label_tokens)
        if len(usable) < len(facts.index):
            self.rejected |= set(facts.index[facts.num_label_tokens == 0].tolist())
            if not len(usable):
                return
            kept = torch.from_numpy(usable).to(head.losses.device)
            facts, head = _rows_of(facts, usable), HeadResult(losses=head.losses[kept], el2n=head.el2n[kept])
            stats = {target: _rows_of(found, kept) for target, found in stats.items()}
        self._shards.add(SeenBatch(self._rows.add(facts)), head, stats, step)
        if self._shards.num_rows >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last shard."""
        self._shards.flush(f"rank{self._rank:05d}-{self._num_shards:06d}")
        self._num_shards += 1
        self._rows.clear()


def _rows_of(record: Any, rows: Any) -> Any:
    """The given rows of a dataclass of arrays."""
    return type(record)(**{f.name: getattr(record, f.name)[rows] for f in fields(record)})


def finish_table(
    rundir: RunDir, num_rows: int, rejected: set[int], manifest: dict[str, Any], environment: dict[str, Any]
) -> int:
    """Join all ranks' shards to the score table and write what belongs to it; returns its number of rows.

    Raises DataError when a row is missing.
    """
    _drop_repeated(sorted(rundir.scores_dir.glob("shard-*.parquet")))
    expected = np.setdiff1d(np.arange(num_rows), np.array(sorted(rejected), dtype=np.int64))
    found = merge_scores(rundir, expected).num_rows
    lines = [json.dumps({"index": index, "reason": NO_LABELS}) + "\n" for index in sorted(rejected)]
    _write(rundir.rejected, "".join(lines))
    _write(rundir.environment, json.dumps(environment, indent=2) + "\n")
    _write(rundir.manifest, json.dumps(manifest, indent=2) + "\n")
    return found


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _drop_repeated(paths: list[Path]) -> None:
    """Keep the first record of every row: accelerate fills up the last batches with rows of the first."""
    tables = [pq.read_table(path, columns=["index", "step"]) for path in paths]
    if not tables:
        return
    index = np.concatenate([table["index"].to_numpy() for table in tables])
    step = np.concatenate([table["step"].to_numpy() for table in tables])
    order = np.lexsort((step, index))
    repeated = np.zeros(len(index), dtype=bool)
    repeated[order[1:]] = index[order[1:]] == index[order[:-1]]
    ends = np.cumsum([table.num_rows for table in tables])
    for path, table, end in zip(paths, tables, ends, strict=True):
        drop = repeated[end - table.num_rows : end]
        if drop.any():
            kept = pq.read_table(path).filter(~drop)
            with atomic_write(path) as temporary:
                pq.write_table(kept, temporary)
