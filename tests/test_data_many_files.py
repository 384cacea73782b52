"""A corpus of many files: no file stays open, and rows are read from the files that hold them alone."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import build, chat, make_tokenizer, write_jsonl

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.tokenize import tokenize
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.errors import DataError

NUM_FILES = 64
SPARE_FILES = 30
"""How many more files the process may open than it has open; half as many as the corpus has."""


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/dev/fd")}
    free = [number for number in range(soft) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[SPARE_FILES], hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_files(folder: Path, suffix: str = ".jsonl", count: int = NUM_FILES) -> Path:
    """Files of two rows, the text in row i of the corpus being `text <i>`."""
    folder.mkdir()
    for k in range(count):
        texts = [f"text {2 * k}", f"text {2 * k + 1}"]
        path = folder / f"{k:03d}{suffix}"
        if suffix == ".csv":
            path.write_text("text\n" + "\n".join(texts) + "\n")
        elif suffix == ".json":
            path.write_text("[" + ", ".join(f'{{"text": "{text}"}}' for text in texts) + "]")
        else:
            write_jsonl(path, [{"text": text} for text in texts])
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_more_files_than_may_be_open(tmp_path: Path, few_open_files: None, suffix: str) -> None:
    config = DataConfig(str(write_files(tmp_path / "data", suffix)), cache_dir=str(tmp_path / "cache"))
    for corpus in (Corpus.open(config), Corpus.open(config)):  # scanned, and found in the cache
        texts = [row["text"] for _, row in corpus.iter_rows(0, corpus.num_rows) if isinstance(row, dict)]
        assert texts == [f"text {i}" for i in range(2 * NUM_FILES)]
    subset = corpus.write_subset(np.arange(0, 2 * NUM_FILES, 2), tmp_path)
    assert subset.read_bytes().count(b"text ") == NUM_FILES


def test_more_files_than_may_be_open_are_tokenized(tmp_path: Path) -> None:
    rows = [chat(f"what is {k}?", f"it is {k}") for k in range(2 * NUM_FILES)]
    (tmp_path / "many").mkdir()
    for k in range(NUM_FILES):
        write_jsonl(tmp_path / "many" / f"{k:03d}.jsonl", rows[2 * k : 2 * k + 2])
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    model = make_tokenizer(tmp_path / "model")
    expected = build(tmp_path, one, model)
    config = DataConfig(str(tmp_path / "many"), cache_dir=str(tmp_path / "cache"), num_workers=2)
    store = tokenize(config, Corpus.open(config), TokenizerSource(str(model)))
    assert store.num_rows == expected.num_rows == 2 * NUM_FILES
    for i in range(store.num_rows):
        assert store.tokens(i).tolist() == expected.tokens(i).tolist()


def test_rows_are_read_from_their_own_files_alone(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data", count=4)
    (folder / "001.jsonl").write_text("")
    corpus = Corpus.open(DataConfig(str(folder), cache_dir=str(tmp_path / "cache")))
    (folder / "000.jsonl").unlink()
    (folder / "003.jsonl").unlink()
    assert [(index, row) for index, row in corpus.iter_rows(2, 4)] == [
        (2, {"text": "text 4"}),
        (3, {"text": "text 5"}),
    ]
    assert list(corpus.iter_rows(3, 3)) == []


def test_a_cache_that_goes_while_the_corpus_is_open_is_named(tmp_path: Path) -> None:
    corpus = Corpus.open(
        DataConfig(str(write_files(tmp_path / "data", count=1)), cache_dir=str(tmp_path / "cache"))
    )
    for path in (tmp_path / "cache").rglob("starts.i64"):
        path.unlink()
    with pytest.raises(DataError, match="data.cache_dir: .*starts.i64' cannot be read"):
        corpus.row(0)
