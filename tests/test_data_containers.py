"""Kinds of files: rows found, numbered, read and copied, whatever holds them."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from data_helpers import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.locate import absolute, is_hub_id, locate
from grads_dist.data.rows import Broken
from grads_dist.errors import ConfigError, DataError, GradsDistError
from grads_dist.runtime.rundir import MARKER

ROWS = [{**chat(f"question {k}", f'answer, "{k}"\n🤷 [{{}}]'), "id": str(k)} for k in range(7)]
TABLE = pa.Table.from_pylist(ROWS)


def open_corpus(folder: Path, path: Any, **options: Any) -> Corpus:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return Corpus.open(DataConfig(path, cache_dir=str(folder / "cache"), **options))


def contents(corpus: Corpus) -> list[Any]:
    return [row for _, row in corpus.iter_rows(0, corpus.num_rows)]


def write(folder: Path, kind: str, rows: list[dict[str, Any]], name: str = "a") -> Path:
    """The rows in a file of this kind."""
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    path = folder / f"{name}.{kind.partition('-')[0]}"
    if kind == "jsonl" or kind == "json-lines":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows
            )
    else:
        make = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with make(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=3)
    return path


KINDS = ["jsonl", "json", "json-lines", "csv", "parquet", "arrow-file", "arrow-stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows_by_the_same_numbers(tmp_path: Path, kind: str) -> None:
    corpus = open_corpus(tmp_path, write(tmp_path, kind, ROWS))
    rows = contents(corpus)
    if kind == "csv":
        rows = [{**row, "messages": json.loads(row["messages"])} for row in rows]
    assert rows == ROWS and corpus.num_rows == 7
    assert [index for index, _ in corpus.iter_rows(2, 5)] == [2, 3, 4]
    assert corpus.row(4)["id"] == "4" and corpus.columns() == ["messages", "id"]
    assert open_corpus(tmp_path, corpus.files[0], limit=2).num_rows == 2


# JSON arrays

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(['"', "\\", '\\"', "],[", "}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    values=st.lists(JSON_VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    around=st.sampled_from(["", " ", "\n", "\r\n\t"]),
    mark=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_elements_of_an_array_are_those_that_json_finds(
    values: list[Any], indent: int | None, ascii_only: bool, around: str, mark: bool
) -> None:
    text = json.dumps([{"v": value} for value in values] + values, indent=indent, ensure_ascii=ascii_only)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.json").write_bytes(b"\xef\xbb\xbf" * mark + (around + text + around).encode("utf-8"))
        if not values:
            with pytest.raises(DataError, match="no rows in"):
                open_corpus(folder, folder / "a.json")
            return
        corpus = open_corpus(folder, folder / "a.json")
        rows = contents(corpus)
        lines = corpus.write_subset(np.arange(len(values)), folder).read_bytes()
    assert rows[: len(values)] == [{"v": value} for value in values]
    assert [isinstance(row, Broken) for row in rows[len(values) :]] == [
        not isinstance(v, dict) for v in values
    ]
    assert [json.loads(line) for line in lines.splitlines()] == rows[: len(values)]


def test_broken_elements_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, {"text": tru}, , 7, {"text": "\xff"}, {"text": "b"},\n]')
    rows = contents(open_corpus(tmp_path, path))
    assert [row for row in rows if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]
    reasons = [row.reason for row in rows if isinstance(row, Broken)]
    assert reasons == [
        "broken JSON (a.json, element at byte 15: Expecting value at column 10)",
        "broken JSON (a.json, element at byte 30: Expecting value at column 1)",
        "the row is a number (7), not an object (a.json, element at byte 32)",
        "not UTF-8 text (a.json, element at byte 35: invalid start byte at byte 10 of the line)",
    ]


def test_subset_of_an_array_keeps_the_text_of_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  {\n    "n": 1.50,\r\n    "t": "\\u00e9  \\n"\n  },\n  {"n":2}\n]')
    corpus = open_corpus(tmp_path, path)
    assert corpus.write_subset(np.array([0, 1]), tmp_path).read_text() == (
        '{ "n": 1.50, "t": "\\u00e9  \\n" }\n{"n":2}\n'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"text": "a"}]}', "is one object with its rows under 'data'; allowed: an array of rows"),
        (
            '{\n "data": [\n{"text": "a"}]}',
            "is one JSON object over several lines; allowed: an array of rows",
        ),
        ('"text"', "is neither an array nor JSON lines"),
        ('[{"text": "a"}, {"te', "is an array with a text that has no end; allowed: a whole file"),
        ('[{"text": "a"}, {"text": 1', "is an array without an end; allowed: a whole file"),
        ('[{"text": "a"}] [', "goes on after its array, at byte 15"),
        ("[]", "no rows in"),
        (" \n", "no rows in"),
    ],
)
def test_json_files_that_hold_no_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as failure:
        open_corpus(tmp_path, tmp_path / "a.json")
    assert message in str(failure.value) and "a.json" in str(failure.value) and "\n" not in str(failure.value)


def test_a_file_of_one_row_is_no_wrapper(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0]))
    assert contents(open_corpus(tmp_path, tmp_path / "a.json")) == ROWS[:1]


# CSV

FIELDS = st.text(st.sampled_from(list('ab ,"\n\r;é🤷\x85\u2028')), max_size=8)


@given(
    rows=st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=5),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank=st.booleans(),
    mark=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_records_are_those_that_python_finds(
    rows: list[list[str]], ending: str, quoting: Any, blank: bool, mark: bool
) -> None:
    if quoting == csv.QUOTE_MINIMAL:
        # Python writes a lone carriage return without quotes, and does not read it back.
        rows = [[field.replace("\r", "") for field in row] for row in rows]
    pieces = []
    for row in [["prompt", "completion"], *rows]:
        line = io.StringIO()
        csv.writer(line, lineterminator=ending, quoting=quoting).writerow(row)
        pieces.append(line.getvalue().encode("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head = b"\xef\xbb\xbf" * mark
        (folder / "a.csv").write_bytes(
            head + (ending.encode() * blank).join(pieces).removesuffix(ending.encode())
        )
        corpus = open_corpus(folder, folder / "a.csv")
        found = contents(corpus)
        chosen = np.arange(0, len(rows), 2)
        subset = corpus.write_subset(chosen, folder)
        assert subset.name == "subset.csv"
        # The last ending was taken off; it comes back as a plain one.
        last = pieces[-1].removesuffix(ending.encode()) + b"\n"
        kept = [pieces[1:-1][k] if k + 1 < len(rows) else last for k in chosen]
        assert subset.read_bytes() == head + pieces[0] + b"".join(kept)
    assert found == [dict(zip(("prompt", "completion"), row, strict=True)) for row in rows]


def test_broken_records_cost_only_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\n"x"y,z\nonly\n1,2,3\n\xff,b\n5" pipe,"long\ntext"\n"open,c\n')
    rows = contents(open_corpus(tmp_path, path))
    assert [row for row in rows if isinstance(row, dict)] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": '5" pipe', "completion": "long\ntext"},
    ]
    reasons = [row.reason for row in rows if isinstance(row, Broken)]
    assert [reason.partition(" (")[0] for reason in reasons] == [
        "broken CSV", "1 fields under a header of 2", "3 fields under a header of 2", "broken CSV",
        "broken CSV",
    ]  # fmt: skip
    assert "a.csv, record at byte 22: ',' expected after" in reasons[0]
    assert "unexpected end of data" in reasons[4]


def test_a_quote_that_nothing_closes_costs_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\n"open,c\nd,e\n\nf,g\n')
    corpus = open_corpus(tmp_path, path)
    first, broken, *others = contents(corpus)
    assert isinstance(broken, Broken) and "record at byte 22: unexpected end of data" in broken.reason
    assert [row["completion"] for row in (first, *others)] == ["b", "e", "g"]
    assert corpus.write_subset(np.array([2, 3]), tmp_path).read_bytes() == b"prompt,completion\nd,e\nf,g\n"


def test_fields_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\ny\n")
    assert [len(row["text"]) for row in contents(open_corpus(tmp_path, tmp_path / "a.csv"))] == [200_000, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows in"),
        (b"text\n", "no rows in"),
        (b"text,id,text\na,b,c\n", "has two columns 'text'"),
        (b"\xff\na\n", "has a header that cannot be read"),
    ],
)
def test_csv_files_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError) as failure:
        open_corpus(tmp_path, tmp_path / "a.csv")
    assert message in str(failure.value) and "\n" not in str(failure.value)


# Tables


@pytest.mark.parametrize("kind", ["arrow-file", "arrow-stream"])
def test_subset_of_arrow_has_equal_values_and_schema(tmp_path: Path, kind: str) -> None:
    first, second = (write(tmp_path, kind, ROWS, name) for name in "ab")
    corpus = open_corpus(tmp_path, [first, second])
    indices = np.array([0, 2, 3, 6, 7, 13])
    subset = pq.read_table(corpus.write_subset(indices, tmp_path))
    assert subset.schema.equals(TABLE.schema)
    assert subset.equals(pa.concat_tables([TABLE, TABLE]).take(pa.array(indices)))


def test_fields_that_a_table_pads_with_nulls_are_absent_in_rows_and_kept_in_the_subset(
    tmp_path: Path,
) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [{"z": 2}, {"w": 3}]}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}], "note": None} for call in calls]
    path = write(tmp_path, "parquet", rows)
    corpus = open_corpus(tmp_path, path)
    assert contents(corpus) == rows
    assert pq.read_table(corpus.write_subset(np.arange(2), tmp_path)).equals(pq.read_table(path))


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("a.arrow", "b.parquet"):
        (tmp_path / name).write_bytes(b"ARROW1 and nothing more")
        with pytest.raises(DataError, match="is no readable (Arrow|Parquet)") as failure:
            open_corpus(tmp_path, tmp_path / name)
        assert "\n" not in str(failure.value)
    whole = write(tmp_path, "arrow-stream", ROWS, "c").read_bytes()
    (tmp_path / "c.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is no readable Arrow"):
        open_corpus(tmp_path, tmp_path / "c.arrow")


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet' has two columns 'text'"):
        open_corpus(tmp_path, tmp_path / "a.parquet")


def test_subset_of_types_that_cannot_be_gathered(tmp_path: Path) -> None:
    """As Polars writes text."""
    table = pa.table({"text": pa.array(["a", "b" * 20, None, "d"], pa.string_view())})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    corpus = open_corpus(tmp_path, tmp_path / "a.arrow")
    subset = pq.read_table(corpus.write_subset(np.array([1, 3]), tmp_path))
    assert subset.column("text").to_pylist() == ["b" * 20, "d"]


# Several kinds


def test_files_of_several_kinds_are_one_corpus(tmp_path: Path) -> None:
    rows = [{"prompt": f"é {k}", "completion": "1.0"} for k in range(8)]
    folder = tmp_path / "mixed"
    for k, kind in enumerate(["csv", "json", "jsonl", "parquet"]):
        write(folder, kind, rows[2 * k : 2 * k + 2], f"part-{k}")
    (folder / "README.md").write_text("about")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jsonl").write_text("{}")
    corpus = open_corpus(tmp_path, folder)
    assert contents(corpus) == rows
    assert contents(open_corpus(tmp_path, folder / "part-*")) == rows
    subset = corpus.write_subset(np.array([1, 3, 5, 7]), tmp_path)
    assert subset.name == "subset.jsonl"
    assert [json.loads(line) for line in subset.read_text(encoding="utf-8").splitlines()] == rows[1::2]


@pytest.fixture
def with_runs(tmp_path: Path) -> Path:
    """A corpus of two files, with a run, a run of a run and the cache among them."""
    folder = tmp_path / "data"
    write(folder, "jsonl", ROWS[:2], "a")
    write(folder / "more", "jsonl", ROWS[2:3], "b")
    for run in (folder / "run", folder / "run" / "run", folder / "more" / "run"):
        (run / "selection" / "default").mkdir(parents=True)
        (run / MARKER).touch()
        (run / "environment.json").write_text('{\n"versions": {}\n}')
        write(run / "selection" / "default", "jsonl", ROWS[5:6], "subset")
    write(folder / "cache", "jsonl", ROWS[6:], "x")
    return folder


@pytest.mark.parametrize("path", ["", "*", "**/*.jsonl", "**/*.json*", "[am]*"])
def test_what_this_program_wrote_is_not_part_of_a_corpus(with_runs: Path, path: str) -> None:
    """Its runs and its cache, below a folder or among what a glob matches."""
    found = locate(DataConfig(str(with_runs / path), cache_dir=str(with_runs / "cache")))
    wanted = ["a.jsonl", "b.jsonl"]
    assert sorted(source.path.name for source in found) == wanted


@pytest.mark.parametrize(
    ("path", "num_files"),
    [
        ("run/selection/default", 1), ("*/selection/default/subset.jsonl", 1), ("run/*.json", 1),
        ("**/subset.jsonl", 3), ("run/selection/*/*", 1), ("run/**/default/*.jsonl", 2), ("cache", 1),
    ],
)  # fmt: skip
def test_what_is_named_inside_a_run_is_read(with_runs: Path, path: str, num_files: int) -> None:
    found = locate(DataConfig(str(with_runs / path), cache_dir=str(with_runs / "cache")))
    assert len(found) == num_files


def test_a_glob_of_runs_alone_matches_nothing(with_runs: Path) -> None:
    with pytest.raises(ConfigError, match="matches no file"):
        locate(DataConfig(str(with_runs / "r*"), cache_dir=str(with_runs / "cache")))


def test_subset_takes_the_form_that_all_files_share(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    for kind in ("csv", "json", "jsonl", "parquet"):
        write(tmp_path, kind, rows)
    write(tmp_path, "csv", rows, "b")
    write(tmp_path, "csv", [{"completion": "c", "prompt": "d"}], "c")
    write(tmp_path, "arrow-file", rows, "d")

    def subset(*names: str) -> tuple[str, bytes]:
        path = open_corpus(tmp_path, [tmp_path / name for name in names]).write_subset(np.arange(2), tmp_path)
        return path.name, path.read_bytes()

    assert subset("a.csv", "b.csv") == ("subset.csv", b"prompt,completion\r\na,b\r\na,b\r\n")
    assert subset("a.csv", "c.csv")[0] == subset("a.json", "a.jsonl")[0] == "subset.jsonl"
    assert subset("a.parquet", "d.arrow")[0] == "subset.parquet"


def test_tables_beside_other_files_must_fit_into_json(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"text": "a"}])
    table = pa.table(
        {"text": ["a"], "more": pa.array([[{"when": 1}]], pa.list_(pa.struct([("when", pa.date32())])))}
    )
    pq.write_table(table, tmp_path / "b.parquet")
    assert open_corpus(tmp_path, tmp_path / "b.parquet").num_rows == 1
    with pytest.raises(DataError, match=r"data\.path: column 'more' of .*b\.parquet' is list<.*one kind"):
        open_corpus(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.parquet"])


def test_links_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    write(folder, "jsonl", [{"text": "a"}])
    write(tmp_path / "other", "jsonl", [{"text": "b"}])
    (folder / "b.jsonl").symlink_to(tmp_path / "other" / "a.jsonl")
    (folder / "linked").symlink_to(tmp_path / "other")
    with caplog.at_level("INFO", "grads_dist"):
        assert contents(open_corpus(tmp_path, folder)) == [{"text": "a"}, {"text": "b"}]
    assert "not read: linked" in caplog.text
    (folder / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"c\.jsonl' is no file, or a link to none"):
        open_corpus(tmp_path, folder)


def test_a_broken_record_beside_other_kinds(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"text": "a"}])
    (tmp_path / "b.csv").write_text("text\nb\nc,d\n")
    corpus = open_corpus(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.csv"])
    assert corpus.write_subset(np.array([1]), tmp_path).read_text() == '{"text": "b"}\n'
    with pytest.raises(DataError, match="a broken record cannot become a JSON line; 2 fields under a header"):
        corpus.write_subset(np.array([1, 2]), tmp_path)


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"no file in '.*empty' ends in \.jsonl, \.json, \.csv"):
        open_corpus(tmp_path, tmp_path / "empty")


# Datasets


def dataset_of(rows: list[dict[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    dataset = dataset_of(ROWS)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=dataset, test=dataset.select([5, 2])).save_to_disk(tmp_path / "several")
    corpus = open_corpus(tmp_path, tmp_path / "one")
    assert contents(corpus) == ROWS and len(corpus.files) == 2
    subset = pq.read_table(corpus.write_subset(np.array([1, 4]), tmp_path))
    assert subset.to_pylist() == [ROWS[1], ROWS[4]] and subset.schema.equals(dataset.data.schema)
    assert contents(open_corpus(tmp_path, tmp_path / "several", split="test")) == [ROWS[5], ROWS[2]]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("several", {}, ConfigError, "data.split: unset, but '{}' has several; allowed: train, test"),
        (
            "several",
            {"split": "dev"},
            ConfigError,
            "data.split: 'dev' is no split of '{}'; allowed: train, test",
        ),
        ("one", {"split": "train"}, ConfigError, "data.split: 'train' is given, but '{}' has no splits"),
        ("lacking", {}, DataError, "data.path: '{}' lacks its file 'x.arrow'"),
        ("escaping", {}, DataError, "data.path: '{}' lacks its file '../a.jsonl'"),
        ("away", {}, DataError, "data.path: '{}/dataset_dict.json' names a split outside of it, '../one'"),
        ("old", {}, DataError, "data.path: '{}' keeps its rows' order apart; save it again"),
        ("void", {}, DataError, "data.path: '{}/state.json' names no files"),
        (
            "a.jsonl",
            {"split": "train"},
            ConfigError,
            "data.split: 'train' is given, but data.path names no dataset",
        ),
        ("a.jsonl", {"revision": "v1"}, ConfigError, "data.revision: 'v1' is given, but data.path names no"),
    ],
)
def test_dataset_folders_that_cannot_be_used(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[GradsDistError], message: str
) -> None:
    states = {
        "several/dataset_dict.json": {"splits": ["train", "test"]},
        "one/state.json": {"_data_files": []},
        "void/state.json": {},
        "lacking/state.json": {"_data_files": [{"filename": "x.arrow"}]},
        "escaping/state.json": {"_data_files": [{"filename": "../a.jsonl"}]},
        "away/dataset_dict.json": {"splits": ["../one"]},
        "old/state.json": {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]},
    }
    for file, state in states.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(state))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(error) as failure:
        open_corpus(tmp_path, tmp_path / name, **options)
    assert str(failure.value).startswith(message.format(tmp_path / name))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as it lies on the hub, with nothing reachable outside."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    write(tmp_path / "repo", "parquet", ROWS, "train-00000-of-00001")
    write(tmp_path / "repo", "parquet", ROWS[:2], "test-00000-of-00001")
    return tmp_path / "repo"


def test_a_folder_laid_out_like_a_dataset_of_the_hub(tmp_path: Path, repository: Path) -> None:
    assert open_corpus(tmp_path, repository).num_rows == 9
    corpus = open_corpus(tmp_path, repository, split="train")
    assert contents(corpus) == ROWS and corpus.files[0].suffix == ".arrow"
    part = open_corpus(tmp_path, repository, split="train[2:5]")
    assert contents(part) == ROWS[2:5] and str(part.files[0]).startswith(str(tmp_path / "cache"))
    assert open_corpus(tmp_path, repository, split="train[2:5]").fingerprint == part.fingerprint
    assert open_corpus(tmp_path, repository, split="train[3:6]").fingerprint != part.fingerprint
    with pytest.raises(ConfigError, match="cannot be loaded as a dataset .*nope"):
        open_corpus(tmp_path, repository, split="nope")


def test_a_name_of_the_hub(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    load_dataset = datasets.load_dataset

    def local_load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return load_dataset(str(repository), split=options["split"])

    monkeypatch.setattr(datasets, "load_dataset", local_load)
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus(tmp_path, "org/name", split="test", name="main", revision="v1")
    assert contents(corpus) == ROWS[:2]
    assert asked == [("org/name", {"name": "main", "split": "test", "revision": "v1"})]
    with pytest.raises(ConfigError, match="data.split: unset, but 'org/name' has several; allowed: t"):
        open_corpus(tmp_path, "org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: dataset_of(ROWS[3:5]))
    assert contents(open_corpus(tmp_path, "org/name")) == ROWS[3:5]
    # What exists here comes before the hub.
    write(tmp_path / "org", "jsonl", ROWS[:1])
    (tmp_path / "org" / "a.jsonl").rename(tmp_path / "org" / "name")
    with pytest.raises(ConfigError, match="'org/name' does not end in"):
        open_corpus(tmp_path, "org/name")


def test_a_name_that_is_nowhere(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(ConfigError) as failure:
        open_corpus(tmp_path, "no-org/no-name")
    assert str(failure.value).startswith(
        "data.path: 'no-org/no-name' is no file or folder, and cannot be loaded as a dataset ("
    )
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("pattern", "is_id"),
    [
        ("org/name", True), ("org/name-v1.5", True), ("org/a.jsonl", False), ("org/a.txt", False),
        ("name", False), ("./org/name", False), ("/org/name", False), ("a/b/c", False), ("org/*", False),
        ("~/name", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_the_hub_are_told_from_files(
    pattern: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(pattern) == is_id
    assert absolute(pattern) == (pattern if is_id else str(Path(pattern).expanduser().absolute()))
