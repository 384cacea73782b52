"""The benchmark of the data stage measures what it says, and refuses a rival that computes something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from grads_dist.data.store import TokenStore

NUM_ROWS = 30


@pytest.fixture(scope="module")
def steps():
    """The script as a module, with its neighbours importable as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import data_steps

        yield data_steps


@pytest.fixture(scope="module")
def folder(steps, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import chat_corpus

    root = tmp_path_factory.mktemp("bench")
    chat_corpus.write_jsonl(root / "1 jsonl", NUM_ROWS, 1)
    chat_corpus.write_jsonl(root / "7 jsonl", NUM_ROWS, 7)
    chat_corpus.write_parquet(root / "1 parquet", NUM_ROWS)
    chat_corpus.make_tokenizer(root / "tokenizer")
    steps.measure_tokenize(root, "1 jsonl", 1)
    return root


def test_all_forms_hold_the_same_rows(folder: Path) -> None:
    one = (folder / "1 jsonl" / "000000.jsonl").read_text()
    files = sorted((folder / "7 jsonl").iterdir())
    assert len(files) == 7 and "".join(file.read_text() for file in files) == one
    rows = [json.loads(line) for line in one.splitlines()]
    assert len(rows) == NUM_ROWS
    assert pq.read_table(folder / "1 parquet" / "corpus.parquet").to_pylist() == rows


def test_every_step_gives_its_numbers(steps, folder: Path) -> None:
    opened, again = steps.measure_open(folder, "7 jsonl", 1)
    assert (opened["step"], again["step"]) == ("open", "reopen")
    (tokenized,) = steps.measure_tokenize(folder, "1 parquet", 1)
    store = TokenStore.open(Path((folder / "store.txt").read_text()))
    assert tokenized["num_tokens"] == int(store.num_tokens.sum())
    assert tokenized["disk_bytes"] > 5 * tokenized["num_tokens"]  # an id of 4 bytes, a mask of 1
    for mode in ("train", "frozen"):
        found = {one["step"]: one for one in steps.measure_rank(store.path, mode)}
        assert set(found) == {"open store", f"{mode} plan", f"{mode} batches"}
        assert all(one["seconds"] > 0 for one in found.values())


def test_a_drawn_store_is_one(steps, tmp_path: Path) -> None:
    from drawn_store import make_store

    store = TokenStore.open(make_store(tmp_path / "store", 12))
    assert (store.num_rows, store.ids[11]) == (12, "000000011")
    for i in range(12):
        assert len(store.tokens(i)) == len(store.loss_mask(i)) == store.num_tokens[i]
        assert store.loss_mask(i).sum() == store.num_label_tokens[i] and not store.loss_mask(i)[0]


def test_the_rival_computes_the_same(steps, folder: Path) -> None:
    loaded, mapped = steps.measure_map(folder, "1 jsonl", 1)
    assert loaded["step"] == "load_dataset" and mapped["seconds"] > 0


@pytest.mark.parametrize("wrong", ["input_ids", "assistant_masks"])
def test_a_rival_that_computes_something_else_is_refused(steps, folder: Path, wrong: str) -> None:
    store = TokenStore.open(Path((folder / "store.txt").read_text()))
    encoded = [
        {"input_ids": store.tokens(i).tolist(), "assistant_masks": store.loss_mask(i).astype(int).tolist()}
        for i in range(NUM_ROWS)
    ]
    steps.check_equal(store, encoded)
    encoded[-1][wrong][3] = 1 - encoded[-1][wrong][3]
    with pytest.raises(AssertionError):
        steps.check_equal(store, encoded)


def test_memory_of_this_process_alone_is_counted(steps, tmp_path: Path) -> None:
    size = 64 << 20
    np.zeros(size, np.uint8).tofile(tmp_path / "file")
    with steps.MemoryWatch() as watch:
        held = np.ones(size, np.uint8)
        mapped = int(np.memmap(tmp_path / "file", np.uint8, "r").sum())
        held_mib = watch.grown_mib
        del held
    assert mapped == 0
    assert held_mib == pytest.approx(64, abs=8) and watch.peak_mib == pytest.approx(64, abs=8)
