"""Rows of corpora: found, numbered, read and copied."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.data import scan
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.rows import Broken
from grads_dist.errors import ConfigError, DataError, GradsDistError


def open_corpus(folder: Path, path: Any, **options: Any) -> Corpus:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return Corpus.open(DataConfig(path, cache_dir=str(folder / "cache"), **options))


def contents(corpus: Corpus) -> list[Any]:
    return [row for _, row in corpus.iter_rows(0, corpus.num_rows)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n  \t\r\n {"text":"\xf0\x9f\xa4\xb7"}\n'
        b'broken\n[1]\n\n{"text": "last"}'
    )
    return path


@given(
    parts=st.lists(st.sampled_from([b"{}", b"\n", b"\r\n", b" ", b"\t \n", b"ab", b"\x0b\n"]), max_size=20),
    block=st.integers(1, 9),
    mark=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_row_starts_equal_a_naive_scan_for_any_block_size(parts: list[bytes], block: int, mark: bool) -> None:
    data = b"".join(parts)
    # The mark is looked for in the first block, which is far longer in use.
    data, block = (b"\xef\xbb\xbf" + data, block + 3) if mark else (data, block)
    expected, position = [], 3 * mark
    for line in data[3 * mark :].split(b"\n"):
        if line.strip():
            expected.append(position)
        position += len(line) + 1
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(scan, "_BLOCK_BYTES", block):
        path = Path(folder, "a.jsonl")
        path.write_bytes(data)
        found = scan.scan_file(path, Path(folder), layout="lines")
        assert found.starts is not None and found.starts.load().tolist() == [*expected, len(data)]
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_rows_of_json_lines(tmp_path: Path, lines: Path) -> None:
    corpus = open_corpus(tmp_path, lines)
    rows = contents(corpus)
    assert corpus.num_rows == 5
    assert [rows[k] for k in (0, 1, 4)] == [{"text": "one"}, {"text": "🤷"}, {"text": "last"}]
    assert rows[2] == Broken("broken JSON (a.jsonl, line at byte 43: Expecting value at column 1)")
    assert rows[3] == Broken("the row is a list, not an object (a.jsonl, line at byte 50)")
    assert corpus.row(4) == {"text": "last"}
    assert corpus.columns() == ["text"]
    with pytest.raises(DataError, match="row 2: broken JSON"):
        corpus.row(2)
    with pytest.raises(DataError, match="row 5 is not in the corpus, which has 5 rows"):
        corpus.row(5)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b'{"text": "a\x00b"}', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b"null", "the row is null, not an object"),
        (b"NaN", "the row is a number (nan), not an object"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"text": "x"}\n')
    broken, good = contents(open_corpus(tmp_path, path))
    assert isinstance(broken, Broken) and broken.reason.startswith(reason)
    assert good == {"text": "x"}


def test_subset_of_json_lines_is_byte_for_byte(tmp_path: Path, lines: Path) -> None:
    other = tmp_path / "b.jsonl"
    other.write_bytes(b'{"b":  1}\n\n{"b":2.50}\n')
    corpus = open_corpus(tmp_path, [lines, other])
    path = corpus.write_subset(np.array([0, 1, 4, 6]), tmp_path)
    assert path == tmp_path / "subset.jsonl"
    assert path.read_bytes() == (
        b'{"text": "one"}\r\n {"text":"\xf0\x9f\xa4\xb7"}\n{"text": "last"}\n{"b":2.50}\n'
    )
    assert [p.name for p in tmp_path.glob(".tmp*")] == []
    assert corpus.write_subset(np.zeros(0, np.int64), tmp_path).read_bytes() == b""
    with pytest.raises(ValueError, match="ascend"):
        corpus.write_subset(np.array([1, 1]), tmp_path)
    with pytest.raises(DataError, match="row 7 is not in the corpus"):
        corpus.write_subset(np.array([7]), tmp_path)


def write_parquet(folder: Path) -> pa.Table:
    table = pa.table(
        {
            "messages": [
                [{"role": "user", "content": str(k), "name": None}, {"role": "tool", "content": "é"}]
                for k in range(3000)
            ],
            "when": pa.array(range(3000), pa.timestamp("ns")),
            "kind": pa.array(["a", "b", None] * 1000).dictionary_encode(),
        }
    ).replace_schema_metadata({"note": "kept"})  # fmt: skip
    pq.write_table(table.slice(0, 1700), folder / "p0.parquet", row_group_size=1200)
    pq.write_table(table.slice(1700), folder / "p1.parquet", row_group_size=100)
    return pa.concat_tables([pq.read_table(folder / "p0.parquet"), pq.read_table(folder / "p1.parquet")])


def test_rows_and_subset_of_parquet(tmp_path: Path) -> None:
    table = write_parquet(tmp_path)
    corpus = open_corpus(tmp_path, tmp_path / "p*.parquet")
    assert corpus.num_rows == 3000 and [p.name for p in corpus.files] == ["p0.parquet", "p1.parquet"]
    asked = corpus.iter_rows(1150, 1850, ["messages", "absent"])
    assert [(k, row["messages"][0]["content"]) for k, row in asked if isinstance(row, dict)] == [
        (k, str(k)) for k in range(1150, 1850)
    ]
    assert corpus.row(2999)["kind"] is None
    indices = np.array([0, 1199, 1200, 1699, 1700, 2998])
    subset = pq.read_table(corpus.write_subset(indices, tmp_path))
    assert subset.schema.equals(table.schema, check_metadata=True)
    assert subset.equals(table.take(pa.array(indices)))


def test_parquet_files_must_have_one_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet' and .*a\.parquet' have different schemas"):
        open_corpus(tmp_path, tmp_path / "*.parquet")


def test_order_is_that_of_the_list_and_sorted_within_a_glob(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "[x].jsonl").write_text('{"text": "brackets"}')
    corpus = open_corpus(tmp_path, [tmp_path / "[x].jsonl", tmp_path / "[bc].jsonl", tmp_path / "a.jsonl"])
    assert [row["text"] for row in contents(corpus)] == ["brackets", "b", "c", "a"]
    assert corpus.rows([3, 0]) == [{"text": "a"}, {"text": "brackets"}]
    assert contents(open_corpus(tmp_path, tmp_path / "?.jsonl", limit=2)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["none.jsonl"], ConfigError, "matches no file"),
        (["*.nothing"], ConfigError, "matches no file"),
        (["a.jsonl", "*.jsonl"], ConfigError, "is named twice"),
        (["gone*.json"], DataError, "cannot be read (No such file or directory)"),
        (["gone*.csv"], DataError, "cannot be read into the cache"),
        (["c.txt"], ConfigError, "does not end in .jsonl, .json, .csv, .parquet, .arrow"),
        (["b.parquet"], DataError, "is no readable Parquet"),
        (["empty.jsonl"], DataError, "no rows in"),
        (["bad.jsonl"], DataError, "none of the 2 rows can be read; row 0: broken JSON"),
    ],
)
def test_paths_that_cannot_be_used(
    tmp_path: Path, names: list[str], error: type[GradsDistError], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.parquet").write_text("not parquet")
    (tmp_path / "c.txt").write_text("a")
    for kind in ("json", "csv"):
        (tmp_path / f"gone.{kind}").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text(" \n\n")
    (tmp_path / "bad.jsonl").write_text("x\ny\n")
    with pytest.raises(error) as failure:
        open_corpus(tmp_path, [tmp_path / name for name in names]).columns()
    assert message in str(failure.value) and "\n" not in str(failure.value)


def test_fingerprint_follows_content_and_not_the_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "a"}\n')
    first, second = (open_corpus(tmp_path, tmp_path / name / "a.jsonl") for name in ("x", "y"))
    assert first.fingerprint == second.fingerprint
    (tmp_path / "y" / "a.jsonl").write_text('{"text": "b"}\n')
    assert open_corpus(tmp_path, tmp_path / "y" / "a.jsonl").fingerprint != first.fingerprint


def test_a_file_is_read_through_once(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_corpus(tmp_path, lines)
    monkeypatch.setattr(scan, "_pass", lambda *_: pytest.fail("the file is read again"))
    second = open_corpus(tmp_path, lines)
    assert second.fingerprint == first.fingerprint and contents(second) == contents(first)


def test_cache_that_cannot_be_written_is_a_configuration_error(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .* cannot be written"):
        open_corpus(tmp_path, lines)


def test_a_damaged_scan_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    config = DataConfig(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    Corpus.open(config)
    next((tmp_path / "cache" / "scans").glob("*/starts.i64")).unlink()
    with pytest.raises(DataError, match=r"data\.cache_dir: .* is damaged \(.*\); delete it"):
        Corpus.open(config)
