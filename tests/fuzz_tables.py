"""Hostile tables: corpora of other kinds than JSON lines, and score tables and features given to `select`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_corpus import ROWS, SOUND, TEXTS, VALUES, changed_rows, check_rows, lines, refusal
from hypothesis import strategies as st

from grads_dist.config import TableConfig
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.rows import Broken
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.run import table_selection
from grads_dist.selection.source import table_source
from grads_dist.similarity.config import SimilarityConfig

# ---- corpora


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, bytes]:
    """(format, a .json file): mostly an array of rows."""
    row_format = draw(st.sampled_from(sorted(ROWS)))
    pieces = [json.dumps(SOUND[row_format]).encode(), *draw(st.lists(lines(row_format), max_size=12))]
    opening, between, closing = draw(
        st.sampled_from([
            (b"[", b",", b"]"), (b" [\n", b",\r\n ", b"\n]\n"), (b"[", b",", b""), (b"", b"\n", b""),
            (b"\xef\xbb\xbf[", b", ", b"] x"), (b'{"data": [', b",", b"]}"), (b"[", b",", b",]"),
        ])
    )  # fmt: skip
    return row_format, opening + between.join(pieces) + closing


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(format, a .csv file): a header, sound records, and some that are not."""
    row_format = draw(st.sampled_from(sorted(SOUND)))
    names = list(SOUND[row_format])
    fields = TEXTS | st.sampled_from(["a,b", '"', 'x""y', "'", '"open', "\\", "[1, 2]", "[]", "null", "7"])

    def record(values: list[str]) -> str:
        return ",".join('"' + value.replace('"', '""') + '"' for value in values)

    sound = record([v if isinstance(v, str) else json.dumps(v) for v in SOUND[row_format].values()])
    rows = [",".join(names), sound]
    for _ in range(draw(st.integers(0, 15))):
        values = draw(st.lists(fields, min_size=len(names), max_size=len(names) + 1))
        rows.append(record(values) if draw(st.booleans()) else ",".join(values))
    content = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(rows).encode("utf-8", "surrogatepass")
    position = draw(st.integers(0, len(content)))
    return row_format, content[:position] + draw(
        st.sampled_from([b"", b"", b'"', b"\xff", b"\x00", b"\r"])
    ) + content[position:]


_TYPES = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.int64(), pa.float32(), pa.bool_(), pa.null(), pa.binary(),
        pa.list_(pa.int32()), pa.list_(pa.string()),
        pa.struct([("role", pa.string()), ("content", pa.string())]), pa.map_(pa.string(), pa.int8()),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        pa.dictionary(pa.int32(), pa.string()), pa.timestamp("ns"), pa.decimal128(5, 2),
        pa.list_(pa.list_(pa.float64())), pa.date32(), pa.uint64(), pa.large_list(pa.int64()),
        pa.list_(pa.int32(), 2), pa.duration("s"), pa.string_view(), pa.float16(), pa.time64("us"),
    ]
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, pa.Table]:
    """(format, a table): rows of the format as they are, or columns of any type under their names."""
    row_format = draw(st.sampled_from(sorted(ROWS)))
    if draw(st.booleans()):
        rows = [SOUND[row_format], *draw(st.lists(ROWS[row_format] | changed_rows(row_format), max_size=6))]
        rows = [{_storable(name): value for name, value in row.items()} for row in rows]
        columns: dict[str, pa.Array] = {}
        for name in sorted({name for row in rows for name in row}):
            values = [row.get(name) for row in rows]
            try:
                columns[name] = pa.array(values)
            except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
                columns[name] = pa.array([json.dumps(value) for value in values])
        return row_format, pa.table(columns)
    num_rows = draw(st.integers(0, 5))
    names = [*SOUND[row_format], *draw(st.lists(TEXTS | st.just("id"), max_size=2))]
    made = []
    for _ in names:
        kind = draw(_TYPES)
        values = draw(st.lists(VALUES, min_size=num_rows, max_size=num_rows))
        try:
            # Arrow ends the process where a map is made of other values.
            made.append(pa.nulls(num_rows, kind) if pa.types.is_map(kind) else pa.array(values, kind))
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            made.append(pa.nulls(num_rows, kind))
        if draw(st.integers(0, 7)) == 0:
            made[-1] = _unreadable(num_rows, draw(st.booleans()))
    return row_format, pa.Table.from_arrays(made, names=[_storable(name) for name in names])


def _unreadable(num_rows: int, is_text: bool) -> pa.Array:
    """Every other value is no UTF-8, or a time that Python has not; Arrow checks neither."""
    if not is_text:
        return pa.array([2**60 if k % 2 else 0 for k in range(num_rows)], pa.timestamp("s"))
    values = [b"\xff\xfe" if k % 2 else b"abc" for k in range(num_rows)]
    array = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(array), *array.buffers()[1:], array.buffers()[0])


def _storable(name: str) -> str:
    """A name without half surrogates, which Arrow cannot hold."""
    return name.encode("utf-8", "replace").decode()


def write_table(table: pa.Table, path: Path) -> bool:
    """Write the table in the form of the file's name; False where that form has not its types."""
    try:
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=3)
            return True
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    except (pa.ArrowException, NotImplementedError):
        return False
    return True


def check_file(folder: Path, model: Path, path: Path, row_format: str) -> dict[str, int]:
    """Take one file through the data stage; every row once, and the rows that are kept can be written."""
    config = DataConfig(str(path), cache_dir=str(folder / "cache"), num_workers=1, format=row_format)  # type: ignore[arg-type]
    corpus = refusal(lambda: Corpus.open(config))
    if corpus is None:
        return {"files refused": 1}
    kept = check_rows(config, corpus, model)
    if kept is None:
        return {"rows": corpus.num_rows, "files refused": 1}
    written = refusal(lambda: corpus.write_subset(kept, folder))
    assert written is not None
    again = Corpus.open(DataConfig(str(written), cache_dir=str(folder / "cache"), num_workers=1))
    assert again.num_rows == len(kept)
    wanted = [row for k in kept.tolist() for _, row in corpus.iter_rows(k, k + 1)]
    for (_, found), row in zip(again.iter_rows(0, len(kept)), wanted, strict=True):
        assert isinstance(row, Broken) == isinstance(found, Broken)
        assert isinstance(row, Broken) or repr(found) == repr(row)
    return {"rows": corpus.num_rows, "kept": len(kept)}


# ---- score tables and features

_COLUMNS = [
    "a.max", "a.min", "a.std", "a.mean", "index", "id", "status", "num_tokens", "num_label_tokens",
    "token_hash", "step", "checkpoint", "loss", "b.max", "quality", "",
]  # fmt: skip
_NUMBER_VALUES = st.one_of(
    st.none(), st.integers(-3, 9), st.integers(-(2**63), 2**63 - 1), st.floats(), st.sampled_from([
        float("nan"), float("inf"), 0.0, 1e300,
    ])
)  # fmt: skip


@st.composite
def score_tables(draw: st.DrawFn, num_rows: int) -> bytes:
    """A Parquet table that no probe wrote; or what is none."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=30) | st.just(b"PAR1" + b"\x00" * 40 + b"PAR1"))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    columns = {name: pa.array(rng.normal(size=num_rows)) for name in ("quality", "a.max", "a.std", "a.mean")}
    columns["a.min"] = pa.array(-rng.random(num_rows))
    for name in ("a.norm", "a.sumsq", "a.sum", "loss"):
        columns[name] = pa.array(rng.random(num_rows))
    for name in draw(st.lists(st.sampled_from(_COLUMNS) | TEXTS, max_size=4, unique=True)):
        columns[_storable(name)] = draw(_columns(name, num_rows))
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), sink)
    except (pa.ArrowException, NotImplementedError):
        return b""
    content = sink.getvalue()
    if draw(st.integers(0, 15)) == 0:
        position = draw(st.integers(0, len(content) - 1))
        return content[:position] + draw(st.binary(min_size=1, max_size=2)) + content[position + 1 :]
    return content


@st.composite
def _columns(draw: st.DrawFn, name: str, num_rows: int) -> pa.Array:
    sound = {"index": list(range(num_rows))[::-1], "status": ["ok"] * num_rows, "num_tokens": [5] * num_rows}
    if name in sound and draw(st.integers(0, 2)):
        return pa.array(sound[name])
    numeric = [pa.float64(), pa.float32(), pa.int64(), pa.int32(), pa.int8(), pa.uint64(), pa.float16()]
    kind = draw(st.sampled_from([*numeric, pa.string()]) | _TYPES)
    values = draw(st.lists(_NUMBER_VALUES, min_size=num_rows, max_size=num_rows))
    try:
        return pa.nulls(num_rows, kind) if pa.types.is_map(kind) else pa.array(values, kind)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return pa.array([None if value is None else float(value) for value in values])


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@st.composite
def feature_files(draw: st.DrawFn, num_rows: int, mark: Path) -> bytes:
    """A .npy file, or what is none; objects in it touch `mark` if they are ever unpickled."""
    sound = ["f4", "f2", "f8"] * 4
    kind = draw(st.sampled_from([*sound, "i4", "O", "?", "c8", "S3", "V4", "cut", "odd", "huge"]))
    num_rows, dims = num_rows + draw(st.sampled_from([0, 0, 0, 0, 1])), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    sink = io.BytesIO()
    if kind == "O":
        np.save(
            sink, np.array([[Trap(mark)] * max(dims, 1)] * max(num_rows, 1), dtype=object), allow_pickle=True
        )
    elif kind == "odd":
        return draw(st.binary(max_size=40) | st.just(b"\x93NUMPY\x01\x00\xff\xff"))
    elif kind == "huge":
        head = {"descr": "<f4", "fortran_order": False, "shape": (draw(st.sampled_from([2**40, 2**62])), 4)}
        np.lib.format.write_array_header_1_0(sink, head)
    else:
        array = rng.normal(size=(num_rows, dims)) * draw(st.sampled_from([0, 1, 1, 1e30]))
        if draw(st.integers(0, 4)) == 0 and array.size:
            array.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        with np.errstate(all="ignore"):
            array = (
                array.astype("f4" if kind == "cut" else kind)
                if kind not in "S3 V4"
                else np.zeros((num_rows, dims), kind)
            )
        np.save(sink, array if dims == 0 or draw(st.integers(0, 9)) else array[:, 0])
    content = sink.getvalue()
    return content[: draw(st.integers(0, len(content)))] if kind == "cut" else content


@st.composite
def selection_cases(draw: st.DrawFn, mark: Path) -> tuple[bytes, bytes | None, SelectionConfig]:
    """A table, its features if there are any, and what is selected of it."""
    num_rows = draw(st.integers(0, 12))
    features = None if draw(st.booleans()) else draw(feature_files(num_rows, mark))
    return draw(score_tables(num_rows)), features, draw(selections(features is not None))


@st.composite
def selections(draw: st.DrawFn, has_features: bool) -> SelectionConfig:
    """A selection of a small table; without features it mostly needs none."""
    needs_some = has_features or draw(st.integers(0, 9)) == 0
    weights = draw(st.sampled_from([Weights(), Weights(d=0, r=0)])) if needs_some else Weights(d=0, r=0)
    return SelectionConfig(
        signal=draw(st.sampled_from(["paper", "norm", ["quality"], ["quality"], ["quality", "a.max"]])),
        gradient=draw(
            st.sampled_from(
                ["density", "magnitude", "density_magnitude", "flatten", "rare", "band", "zscore"]
            )
        ),
        criterion=draw(
            st.sampled_from(["grads", "grads", "random", "loss", "grand", "length_matched_random"])
        ),
        pick=draw(st.sampled_from(["topk", "topk", "gumbel"])),
        weights=weights,
        rows=draw(st.sampled_from([None, 1, 3, 100])),
        detrend=draw(st.integers(0, 9)) == 0,
        dedup_threshold=draw(st.sampled_from([None, 0.9])) if needs_some else None,
        stratify_by=draw(st.sampled_from([None, None, "status", "quality", ""])) or None,
        length_adjust=draw(st.booleans()),
    )


def check_selection(folder: Path, table: bytes, features: bytes | None, selection: SelectionConfig) -> bool:
    """Select from a table; whether it could be done. No row is selected that the table has not."""
    scores, vectors = folder / "own.parquet", folder / "vectors.npy"
    scores.write_bytes(table)
    if features is not None:
        vectors.write_bytes(features)
    similarity = SimilarityConfig(device="cpu", library="torch", k=2, features="vectors")
    config = TableConfig(selection=selection, similarity=similarity, output_dir=str(folder / "out"))

    def selected() -> dict[str, Any]:
        given = None if features is None else vectors
        return table_selection(config, table_source(scores, given, selection, RunDir(folder / "out")), None)

    summary = refusal(selected)
    if summary is None:
        return False
    json.dumps(summary, allow_nan=False)
    chosen = pq.read_table(folder / "out" / "selection" / "default" / "selected.parquet")
    index = chosen.column("index").to_pylist()
    assert len(index) == len(set(index)) == summary["counts"]["selected"]
    allowed: Any = range(pq.read_metadata(scores).num_rows)
    if "index" in pq.read_schema(scores).names:
        allowed = pq.read_table(scores, columns=["index"]).column("index").to_pylist()
    assert set(index) <= set(allowed)
    return True
