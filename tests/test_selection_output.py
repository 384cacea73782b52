"""The files of a selection: rows as they were, in one file or several, with their scores or without."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from output_cases import TEXTS, make_selection, write

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.extra import Extra
from grads_dist.errors import DataError
from grads_dist.model.config import ModelConfig
from grads_dist.selection.write import write_selection

SELECTED = [0, 2, 3, 5, 8]
ROWS = [{"prompt": text, "completion": f"c{i}"} for i, text in enumerate(TEXTS)]
SCORED = [row | {"grads_score": i / 7, "grads_rank": len(ROWS) - i} for i, row in enumerate(ROWS)]
TABLE = pa.table(
    {name: [row[name] for row in ROWS] for name in ("prompt", "completion")}
).replace_schema_metadata({"about": "me"})


def make_corpus(tmp_path: Path, form: str) -> Path:
    path = tmp_path / f"corpus.{form.removesuffix('-stream')}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif form == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif form == "parquet":
        pq.write_table(TABLE, path, row_group_size=4)
    else:
        make = pa.ipc.new_stream if form.endswith("-stream") else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=3)
    return path


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline="")))
    return [json.loads(line) for line in text.split("\n")[:-1]]


def files_of(folder: Path, summary: dict) -> list[Path]:
    return sorted(folder.glob(summary["subset"]))


FORMS = ["jsonl", "json", "csv", "parquet", "arrow", "arrow-stream"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows_per_file", [None, 2, 5, 100])
@pytest.mark.parametrize("scores", [False, True])
def test_every_form_holds_the_rows_in_order(tmp_path, form, rows_per_file, scores):
    folder, summary = write(
        tmp_path, make_corpus(tmp_path, form), SELECTED, scores=scores, rows_per_file=rows_per_file
    )
    files = files_of(folder, summary)
    sizes = [len(read(file)) for file in files]
    assert sizes == {None: [5], 2: [2, 2, 1], 5: [5], 100: [5]}[rows_per_file]
    expected = [(SCORED if scores else ROWS)[i] for i in SELECTED]
    if form == "csv":
        expected = [{name: str(value) for name, value in row.items()} for row in expected]
    assert [row for file in files for row in read(file)] == expected
    kept = {"jsonl": "jsonl", "json": "jsonl", "csv": "csv"}.get(form, "parquet")
    if rows_per_file == 2:
        assert summary["subset"] == f"subset/*.{kept}"
        assert [str(file.relative_to(folder)) for file in files] == [
            f"subset/subset-0000{k}-of-00003.{kept}" for k in range(3)
        ]
    elif rows_per_file is None:
        assert summary["subset"] == f"subset.{kept}"
    selected = pq.read_table(folder / "selected.parquet")
    assert selected.column("index").to_pylist() == SELECTED
    assert selected.column("rank").to_pylist() == [SCORED[i]["grads_rank"] for i in SELECTED]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_tables_keep_their_schema_and_get_two_columns(tmp_path, form):
    folder, _ = write(tmp_path, make_corpus(tmp_path, form), SELECTED, name="plain")
    assert pq.read_table(folder / "subset.parquet").equals(
        TABLE.take(pa.array(SELECTED)), check_metadata=True
    )
    folder, _ = write(tmp_path, make_corpus(tmp_path, form), SELECTED, name="scored", scores=True)
    added = [pa.field("grads_score", pa.float64()), pa.field("grads_rank", pa.int64())]
    schema = pq.read_schema(folder / "subset.parquet")
    assert schema.equals(pa.schema([*TABLE.schema, *added], TABLE.schema.metadata), check_metadata=True)


def test_shards_of_lines_and_records_are_the_original_bytes(tmp_path):
    lines = [b'{"text":"a"}', b' { "text" : "b\\u00e9" }  \r', '{"text": "é"}'.encode(), b'{"text": 1e400}']
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    folder, summary = write(tmp_path, path, [0, 1, 3], rows_per_file=2)
    assert [file.read_bytes() for file in files_of(folder, summary)] == [
        lines[0] + b"\n" + lines[1] + b"\n",
        lines[3] + b"\n",
    ]
    path = tmp_path / "odd.csv"
    path.write_bytes(b'prompt,completion\r\n"a\r\nb",c\r\n\r\nd,"e"\nf,g')
    folder, summary = write(tmp_path, path, [0, 1, 2], rows_per_file=2)
    head = b"prompt,completion\r\n"
    assert [file.read_bytes() for file in files_of(folder, summary)] == [
        head + b'"a\r\nb",c\r\nd,"e"\n',
        head + b"f,g\n",
    ]


def extended(line: bytes, **columns: float) -> bytes:
    arrays = {name: np.array([value]) for name, value in columns.items()}
    return next(Extra(arrays, np.array([4])).json_lines([line]))


@pytest.mark.parametrize(
    ("line", "result"),
    [
        (b'{"a": 1}\n', b'{"a": 1, "s": 0.5, "r": 2}\n'),
        (b'{"a":{}}\n', b'{"a":{}, "s": 0.5, "r": 2}\n'),
        (b"{}\n", b'{"s": 0.5, "r": 2}\n'),
        (b" {\t } \r\n", b' {"s": 0.5, "r": 2\t } \r\n'),
        (b'{"a": "}" }\t\n', b'{"a": "}", "s": 0.5, "r": 2 }\t\n'),
        (b'{"a": {"s": 1}}\n', b'{"a": {"s": 1}, "s": 0.5, "r": 2}\n'),
        (b'{"a": "\\u0073"}\n', b'{"a": "\\u0073", "s": 0.5, "r": 2}\n'),
    ],
)
def test_keys_go_before_the_last_brace_and_all_else_stays(line, result):
    assert extended(line, s=0.5, r=2) == result


@pytest.mark.parametrize("line", [b'{"s": 1}\n', b'{"\\u0073": null}\n', b'{"a": 1, "s" : {}} \n'])
def test_a_row_that_has_the_key_is_named(line):
    with pytest.raises(DataError, match=r"^selection.output.scores: row 4 has a column 's' already$"):
        extended(line, s=0.5)


def test_a_row_that_is_no_object_is_named_and_no_number_is_null():
    for line in (b"[1]\n", b'"}"\n'):
        with pytest.raises(DataError, match="row 4 is no JSON object"):
            extended(line, s=0.5)
    assert extended(b"{}\n", s=float("nan"), t=float("-inf")) == b'{"s": null, "t": null}\n'


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text().filter(lambda key: key not in "sr"), json_values, max_size=4),
    st.sampled_from(["", " ", "\t\r"]),
    st.sampled_from([None, 1]),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_object_gets_the_keys_and_keeps_its_text(row, blank, indent, score):
    text = json.dumps(row, indent=indent).replace("\n", " ") + blank + "\n"
    line = extended(text.encode(), s=score, r=1).decode()
    assert json.loads(line) == row | {"s": score, "r": 1}
    cut = line.rindex(', "s": ') if row else line.index('"s": ')
    added = line[cut:].index('"r": 1') + len('"r": 1')
    assert line[:cut] + line[cut + added :] == text


@pytest.mark.parametrize("form", FORMS)
def test_a_corpus_with_such_a_column_is_refused_and_the_earlier_selection_stays(tmp_path, form):
    folder, _ = write(tmp_path, make_corpus(tmp_path, form), SELECTED, scores=True)
    subset = next(folder.glob("subset.*")).rename(tmp_path / f"again.{form.removesuffix('-stream')}")
    if form.startswith("arrow"):
        pq.write_table(pq.read_table(subset), subset := tmp_path / "again.parquet")
    if form == "json":
        subset = subset.rename(tmp_path / "again.jsonl")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(DataError, match=r"^selection.output.scores: .*'grads_(score|rank)' already$"):
        write(tmp_path, subset, [1, 2], scores=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_nothing_of_an_earlier_selection_stays(tmp_path):
    path = make_corpus(tmp_path, "jsonl")
    folder, _ = write(tmp_path, path, SELECTED, rows_per_file=2)
    (folder / "notes.txt").write_text("the user's")
    (folder / ".tmp-1-subset").mkdir()
    (folder / ".tmp-1-README.md").touch()
    folder, _ = write(tmp_path, path, [1])
    described = ["README.md", "axolotl.yaml", "dataset_info.json"]
    kept = [*described, "notes.txt", "selected.parquet", "subset.jsonl", "summary.json"]
    assert sorted(file.name for file in folder.iterdir()) == kept
    write(tmp_path, path, SELECTED, rows_per_file=4)
    assert sorted(file.name for file in (folder / "subset").iterdir()) == [
        "subset-00000-of-00002.jsonl",
        "subset-00001-of-00002.jsonl",
    ]
    assert not (folder / "subset.jsonl").exists()


@pytest.mark.parametrize("stops_at", ["selected.parquet", "README.md", "axolotl.yaml"])
def test_an_interrupted_write_has_no_summary(tmp_path, monkeypatch, stops_at):
    path = make_corpus(tmp_path, "jsonl")
    folder, _ = write(tmp_path, path, SELECTED)
    replace = os.replace

    def stop(source, target):
        if Path(target).name == stops_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, path, [1])
    assert not (folder / "summary.json").exists() and not (folder / stops_at).exists()


def test_without_a_corpus_only_the_table_is_written(tmp_path):
    summary = write_selection(make_selection(6, [1, 2]), None, tmp_path / "x")
    assert "subset" not in summary
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == ["selected.parquet", "summary.json"]


def test_without_an_origin_the_rows_are_not_described(tmp_path):
    corpus = Corpus.open(
        DataConfig(path=str(make_corpus(tmp_path, "csv")), cache_dir=str(tmp_path / "cache"))
    )
    summary = write_selection(make_selection(len(ROWS), [1]), corpus, tmp_path / "x")
    assert summary["subset"] == "subset.csv"
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        "selected.parquet",
        "subset.csv",
        "summary.json",
    ]


HOSTILE = "x`y```\n---\nconfigs: [1]\n# Title\n<script>|*[a](b) \u202e\x00"


def test_a_card_holds_hostile_names_and_no_folders(tmp_path):
    path = tmp_path / "nasty `name` # [x](y).jsonl"
    rows = [{HOSTILE: "a", "said": "b"}, {HOSTILE: "c", "said": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig(name_or_path=f"/home/me/{HOSTILE.replace('/', '')}", revision=HOSTILE)
    data = {"columns": {"prompt": HOSTILE, "completion": "said"}}
    manifest = {"targets": {HOSTILE: {}}, "config": "abc"}
    folder, _ = write(tmp_path, path, [0], data=data, model=model, manifest=manifest)
    card = (folder / "README.md").read_text(encoding="utf-8")
    header, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "subset.jsonl"}]}
    ]
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["# Selection `mine`", *(f"## {t}" for t in SECTIONS)]
    assert "```` x`y```" in text and "<script>" in text and "/home/me" not in card
    assert str(tmp_path) not in card and "\x00" not in card and "\u202e" not in card
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["grads_mine"]["columns"] == {"prompt": HOSTILE, "response": "said"}


SECTIONS = ["How it was selected", "Where it comes from", "How to load it"]


def test_a_card_tells_where_the_selection_comes_from(tmp_path):
    path = make_corpus(tmp_path, "parquet")
    model = ModelConfig(name_or_path="org/model-1b", revision="abc123")
    manifest = {"targets": {"embedding": {}, "lm_head": {}}, "config": "f00d"}
    folder, _ = write(tmp_path, path, SELECTED, model=model, manifest=manifest, scores=True)
    card = (folder / "README.md").read_text(encoding="utf-8")
    fingerprint = Corpus.open(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"))).fingerprint
    for said in (
        "5 of the 10 rows",
        "criterion `grads`, picked by `topk`, seed 0",
        "signal `paper`, without what answer length explains; gradient criterion `density_magnitude`",
        "score: 1 G + 0.5 D - 1 R",
        "budget: 5 rows",
        "model `org/model-1b` at revision `abc123`",
        "targets: `embedding`, `lm_head`",
        "corpus `corpus.parquet`",
        f"`{fingerprint}`",
        "`f00d`",
        "grads_score",
    ):
        assert said in card, said
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["size_categories"] == ["n<1K"]


@pytest.mark.parametrize(
    ("num_rows", "size"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**9, "1B<n<10B"),
        (10**11, "n>10B"),
    ],
)
def test_sizes_have_the_names_of_the_hub(num_rows, size):
    from grads_dist.selection.card import _size

    assert _size(num_rows) == size
