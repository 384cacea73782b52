"""Rows keep their number on the way through a collator, and an epoch's table has each of them once."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from library_cases import batch_of, collate, dataset_of
from tiny import Rows

from grads_dist.data.encode import token_hash
from grads_dist.errors import ConfigError, DataError
from grads_dist.library.epoch_table import finish_table
from grads_dist.library.rows import KEY, FactsCollator, NumberedRows, facts_of, ids_of
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.schema import score_schema


def test_rows_carry_their_number():
    numbered = NumberedRows(dataset_of(Rows.random(5)))
    assert len(numbered) == 5 and numbered[3][KEY] == 3
    assert [row[KEY] for row in numbered.__getitems__([4, 0])] == [4, 0]
    plain = NumberedRows([{"x": 1}, {"x": 2}])
    assert plain.__getitems__([1, 0]) == [{"x": 2, KEY: 1}, {"x": 1, KEY: 0}]


def test_a_batch_has_the_facts_of_its_rows():
    rows = Rows.random(5)
    numbered, seen = NumberedRows(dataset_of(rows)), []

    def spy(examples):
        seen.extend(examples)
        return collate(examples)

    batch = FactsCollator(spy)(numbered.__getitems__([4, 1]))
    assert not any(KEY in example for example in seen)
    assert batch[KEY].index.tolist() == [4, 1]
    assert batch[KEY].num_tokens.tolist() == [len(rows.ids[4]), len(rows.ids[1])]
    assert batch[KEY].num_label_tokens.tolist() == [rows.masks[4].sum(), rows.masks[1].sum()]


@pytest.mark.parametrize("left", [False, True])
def test_hashes_are_those_of_the_engine(left):
    """Of the tokens without padding, and a label on the first token counts as none: nothing predicts it."""
    rows = Rows.random(4)
    batch = batch_of(rows, left=left)
    if not left:
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
    facts = facts_of(range(4), batch)
    expected = [token_hash(ids, mask) for ids, mask in zip(rows.ids, rows.masks, strict=True)]
    assert facts.token_hash.tolist() == expected
    assert facts.num_label_tokens.tolist() == [mask.sum() for mask in rows.masks]


def test_a_collator_that_joins_rows_is_refused():
    ids = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(ConfigError, match="does not make one row"):
        facts_of([0, 1], {"input_ids": ids, "labels": ids})
    with pytest.raises(ConfigError, match="does not make one row"):
        facts_of([0], {"input_ids": ids})


def test_ids():
    dataset = Dataset.from_dict({"id": [7, 8, 9], "text": ["a", "b", "c"]})
    assert ids_of(dataset, [2, 0]) == ["9", "7"]
    assert ids_of(dataset.remove_columns(["id"]), [2, 0]) == ids_of([1, 2, 3], [2, 0]) == ["2", "0"]


def write_shard(run: RunDir, name: str, index: list[int], step: list[int]) -> None:
    schema = score_schema(["t"])
    zeros = {
        field.name: [""] * len(index) if field.type == pa.string() else [0] * len(index) for field in schema
    }
    run.scores_dir.mkdir(parents=True, exist_ok=True)
    table = pa.table(zeros | {"index": index, "step": step}, schema=schema)
    pq.write_table(table, run.scores_dir / f"shard-{name}.parquet")


def test_repeated_rows_keep_their_first_record(tmp_path):
    run = RunDir(tmp_path)
    write_shard(run, "rank00000-000000", [3, 0, 5], [0, 1, 2])
    write_shard(run, "rank00001-000000", [1, 3, 0, 2], [0, 1, 0, 2])
    assert finish_table(run, 6, {4}, {"schema": 1}, {}) == 5
    table = pq.read_table(run.scores)
    assert table["index"].to_pylist() == [0, 1, 2, 3, 5]
    assert table["step"].to_pylist() == [0, 0, 2, 0, 2]
    assert run.rejected.read_text() == '{"index": 4, "reason": "no token carries loss"}\n'


def test_a_missing_row_makes_no_table(tmp_path):
    run = RunDir(tmp_path)
    write_shard(run, "rank00000-000000", [0, 2], [0, 0])
    with pytest.raises(DataError, match="row 1 is missing"):
        finish_table(run, 3, set(), {}, {})
    assert not run.manifest.exists() and not run.scores.exists()
