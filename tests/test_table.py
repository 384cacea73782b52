"""Shards of the score table and of features, and their merge: every row once, or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from grads_dist.errors import DataError
from grads_dist.runtime.rundir import RunDir
from grads_dist.stats import ops
from grads_dist.stats.head_request import HeadResult
from grads_dist.stats.targets import Targets
from grads_dist.table.merge import merge_features, merge_scores
from grads_dist.table.shards import FeatureShards, ScoreShards

INDEX = np.array([0, 2, 3, 7, 9])
"""Corpus rows 1, 4, 5, 6 and 8 were rejected."""
TARGETS = Targets({"head": ("lm_head.weight",)}, {"head": 6})


@pytest.fixture
def store() -> Any:
    count = len(INDEX)
    return SimpleNamespace(
        index=INDEX.astype(np.int64),
        ids=[f"row{i}" for i in INDEX],
        num_tokens=np.arange(10, 10 + count, dtype=np.int32),
        num_label_tokens=np.arange(1, 1 + count, dtype=np.int32),
        token_hash=np.arange(count, dtype=np.int64),
    )


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def micro_batch(rows: list[int]) -> Any:
    return SimpleNamespace(rows=torch.tensor(rows))


def gradients(rows: list[int]) -> torch.Tensor:
    return torch.tensor([[row + 1.0, 0, 0, 0, 0, -2.0] for row in rows])


def write_scores(rundir: RunDir, store: Any, shards: list[list[int]]) -> None:
    writer = ScoreShards(rundir.scores_dir, store, TARGETS)
    for k, rows in enumerate(shards):
        losses = torch.tensor([row + 0.5 for row in rows])
        head = HeadResult(losses=losses, el2n=losses / 2)
        writer.add(micro_batch(rows), head, {"head": ops.dense_row_stats(gradients(rows))}, step=k)
        writer.flush(f"{k:06d}")


def test_merged_table_is_sorted_by_index_and_holds_what_was_added(rundir, store):
    write_scores(rundir, store, [[4, 0], [3], [1, 2]])
    assert merge_scores(rundir, INDEX).num_rows == 5
    table = pq.read_table(rundir.scores)
    assert table["index"].to_pylist() == INDEX.tolist()
    assert table["id"].to_pylist() == ["row0", "row2", "row3", "row7", "row9"]
    assert table["loss"].to_pylist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert table["step"].to_pylist() == [0, 2, 2, 1, 0]
    assert table["num_tokens"].to_pylist() == [10, 11, 12, 13, 14]
    assert table["head.max"].to_pylist() == [1, 2, 3, 4, 5]
    assert table["head.sum"].to_pylist() == [-1, 0, 1, 2, 3]
    assert table["head.norm"].to_pylist() == pytest.approx([(k**2 + 4) ** 0.5 for k in range(1, 6)], rel=1e-6)


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3, 5, 100])
def test_merging_piece_by_piece_gives_the_same_table(rundir, store, rows_at_a_time):
    write_scores(rundir, store, [[4, 0], [3], [1, 2]])
    merge_scores(rundir, INDEX)
    whole = pq.read_table(rundir.scores)
    merge_scores(rundir, INDEX, rows_at_a_time)
    assert pq.read_table(rundir.scores).equals(whole)
    assert {path.name for path in rundir.root.iterdir()} == {"scores", "scores.parquet"}


WRONG = {
    "row 7 is missing": ([[0, 1], [2, 4]], INDEX),
    "row 2 is there twice": ([[0, 1], [1, 2], [3, 4]], INDEX),
    "row 9 does not belong": ([[0, 1, 2, 3, 4]], INDEX[:4]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_table_with_wrong_rows_is_refused(rundir, store, message):
    shards, expected = WRONG[message]
    write_scores(rundir, store, shards)
    with pytest.raises(DataError, match=message):
        merge_scores(rundir, expected)
    assert not rundir.scores.exists()


def test_no_shards_at_all(rundir):
    with pytest.raises(DataError, match="no shard"):
        merge_scores(rundir, INDEX)


def write_features(rundir: RunDir, store: Any, shards: list[list[int]]) -> None:
    writer = FeatureShards(rundir.features_dir("content"), store, None)
    for k, rows in enumerate(shards):
        writer.add(micro_batch(rows), torch.tensor([[row, -row] for row in rows]).float())
        writer.flush(f"{k:06d}")


def test_merged_features_are_aligned_with_the_table(rundir, store):
    write_features(rundir, store, [[4, 0], [3], [1, 2]])
    merge_features(rundir, "content", INDEX)
    merged = np.load(rundir.features("content"))
    assert merged.dtype == np.float16
    assert merged.tolist() == [[0, 0], [1, -1], [2, -2], [3, -3], [4, -4]]


@pytest.mark.parametrize("message", WRONG)
def test_features_with_wrong_rows_are_refused(rundir, store, message):
    shards, expected = WRONG[message]
    write_features(rundir, store, shards)
    with pytest.raises(DataError, match=message):
        merge_features(rundir, "content", expected)


def test_features_are_projected_and_kept_within_float16(rundir, store):
    writer = FeatureShards(rundir.features_dir("content"), store, torch.tensor([[1.0], [2.0], [0.0]]))
    writer.add(micro_batch([0, 1]), torch.tensor([[1.0, 10.0, 5.0], [1e6, 0.0, 0.0]]))
    writer.flush("000000")
    found = np.load(rundir.features_dir("content") / "shard-000000.npy")
    assert found.tolist() == [[21.0], [65504.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_with_a_nonfinite_gradient_are_marked(rundir, store, bad):
    writer = ScoreShards(rundir.scores_dir, store, TARGETS)
    g = gradients([0, 1])
    g[1, 2] = bad
    head = HeadResult(losses=torch.ones(2), el2n=torch.ones(2))
    seen = writer.add(micro_batch([0, 1]), head, {"head": ops.dense_row_stats(g)}, step=0)
    writer.flush("000000")
    table = pq.read_table(rundir.scores_dir / "shard-000000.parquet")
    assert table["status"].to_pylist() == ["ok", "nonfinite"]
    assert table["head.nonfinite"].to_pylist() == [0, 1]
    assert np.isfinite(seen.log_norm).tolist() == [True, False]
    assert seen.loss.tolist() == [1, 1]


def test_a_row_with_a_nonfinite_loss_is_marked(rundir, store):
    writer = ScoreShards(rundir.scores_dir, store, TARGETS)
    head = HeadResult(losses=torch.tensor([torch.nan, 1.0]), el2n=torch.ones(2))
    writer.add(micro_batch([0, 1]), head, {"head": ops.dense_row_stats(gradients([0, 1]))}, step=0)
    writer.flush("000000")
    table = pq.read_table(rundir.scores_dir / "shard-000000.parquet")
    assert table["status"].to_pylist() == ["nonfinite", "ok"]


def test_flushing_nothing_writes_nothing(rundir, store):
    ScoreShards(rundir.scores_dir, store, TARGETS).flush("000000")
    FeatureShards(rundir.features_dir("content"), store, None).flush("000000")
    assert list(rundir.root.iterdir()) == []


def test_a_shard_that_fails_to_be_written_is_not_there(rundir, store, monkeypatch):
    def half(table, path):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space"):
        write_scores(rundir, store, [[0, 1]])
    assert list(rundir.scores_dir.iterdir()) == []
