"""`grads-dist select` on tables that no probe wrote, and under several ranks."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selection_tables import TARGETS, clustered_features, score_table
from workspace import run_python

from grads_dist import cli
from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.foreign import fill_missing, infer_targets
from grads_dist.selection.run import run_selection, select_from, share_graph
from grads_dist.selection.select import select
from grads_dist.selection.source import run_source, table_source
from grads_dist.similarity.config import SimilarityConfig

SIMILARITY = SimilarityConfig(device="cpu", library="torch")
NO_GRAPH = ["--selection.weights.d", "0", "--selection.weights.r", "0"]
QUALITY = ["--selection.signal", "[quality]"]


@pytest.fixture
def table(tmp_path):
    """A table with the least that a selection by the user's own numbers needs."""
    quality = np.random.default_rng(0).permutation(40).astype(np.float64)
    pq.write_table(pa.table({"quality": quality}), tmp_path / "own.parquet")
    return tmp_path / "own.parquet"


def command(table, *args, code=0):
    assert (
        cli.main(["select", "--table", str(table), "--output_dir", str(table.parent / "out"), *args]) == code
    )
    return table.parent / "out" / "selection"


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# ---- tables that no probe wrote


def test_a_table_of_one_column_is_enough(table, capsys):
    given = [*QUALITY, *NO_GRAPH, "--selection.gradient", "magnitude", "--selection.rows", "5"]
    folder = command(table, *given) / "default"
    quality = pq.read_table(table).column("quality").to_numpy()
    selected = pq.read_table(folder / "selected.parquet")
    assert selected.column("index").to_pylist() == np.flatnonzero(quality >= 35).tolist()
    assert selected.column("id").to_pylist() == [str(i) for i in selected.column("index").to_pylist()]
    assert sorted(path.name for path in folder.iterdir()) == ["selected.parquet", "summary.json"]
    summary = read_summary(folder)
    assert summary["table"] == {"scores": str(table)}
    assert summary["selection"]["signal"] == ["quality"] and summary["selection"]["rows"] == 5
    counts = summary["counts"]
    assert (counts["scored"], counts["copies"], counts["corpus"], counts["selected"]) == (40, 0, None, 5)
    captured = capsys.readouterr()
    assert captured.out == f"selected 5 of 40 rows: {folder / 'selected.parquet'}\n"
    assert "no column num_label_tokens: length_adjust has nothing to remove" in captured.err
    assert "no column token_hash: no row is known to be a copy" in captured.err


def test_a_copy_of_a_runs_table_selects_what_the_run_does(tmp_path):
    scores, features = score_table(80), clustered_features(80)
    shuffled = np.random.default_rng(0).permutation(80)
    pq.write_table(scores.take(pa.array(shuffled)), tmp_path / "own.parquet")
    np.save(tmp_path / "vectors.npy", features[shuffled])
    features_flag = ["--features", str(tmp_path / "vectors.npy"), "--similarity.library", "torch"]
    folder = command(tmp_path / "own.parquet", *features_flag, "--selection.name", "mine") / "mine"
    expected = select(scores, features, SelectionConfig(), SIMILARITY, TARGETS)
    found = pq.read_table(folder / "selected.parquet")
    assert found.column("index").to_pylist() == expected.selected_index.tolist()
    np.testing.assert_array_equal(found.column("score").to_numpy(), expected.score[expected.selected])
    summary = read_summary(folder)
    assert summary["similarity"]["features"] == "vectors" and set(summary["vendi"]) == {"vectors"}
    assert summary["table"]["vectors"] == str(tmp_path / "vectors.npy")
    assert (tmp_path / "out" / "similarity" / "vectors").is_dir()


def test_the_subset_is_written_where_there_is_a_corpus(table, tmp_path):
    lines = [json.dumps({"text": f"row {i}", "topic": "ab"[i % 2]}) for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = ["--data.path", str(tmp_path / "corpus.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    given = [*QUALITY, *NO_GRAPH, *corpus, "--selection.rows=6", "--selection.stratify_by", "topic"]
    folder = command(table, *given) / "default"
    index = pq.read_table(folder / "selected.parquet").column("index").to_pylist()
    assert (folder / "subset.jsonl").read_text(encoding="utf-8").splitlines() == [lines[i] for i in index]
    summary = read_summary(folder)
    assert summary["counts"]["corpus"] == 40
    strata = summary["strata"]["largest"]
    assert {name: (s["candidates"], s["selected"]) for name, s in strata.items()} == {
        "a": (20, 3),
        "b": (20, 3),
    }


def test_rows_beyond_the_corpus_are_bad_data(table, tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_text('{"text": "x"}\n' * 3, encoding="utf-8")
    corpus = ["--data.path", str(tmp_path / "corpus.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    command(table, *QUALITY, *NO_GRAPH, *corpus, code=3)
    assert "is not in the corpus, which has 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            NO_GRAPH,
            "table: column '<target>.max' is missing, which selection.signal paper reads; "
            "allowed: --selection.signal '[column, ...]' of its numeric columns: quality",
        ),
        (
            ["--selection.signal", "[fun]", *NO_GRAPH],
            "table: column 'fun' is missing, which selection.signal",
        ),
        (QUALITY, "features: not given, but the selection compares rows by them"),
        (
            [*QUALITY, *NO_GRAPH, "--selection.tokens", "9"],
            "table: column 'num_tokens' is missing, which selection.tokens reads",
        ),
        ([*QUALITY, *NO_GRAPH, "--selection.detrend", "true"], "table: column 'step' is missing"),
        ([*QUALITY, *NO_GRAPH, "--selection.criterion", "loss"], "table: column 'loss' is missing"),
        ([*QUALITY, *NO_GRAPH, "--selection.criterion", "rds"], "selection.criterion: rds compares with"),
        ([*QUALITY, "--features", "none.npy"], "features: "),
        ([*QUALITY, "--data.limit", "3"], "data.path: not given, but --data.limit is; allowed:"),
        ([*QUALITY, *NO_GRAPH, "--model.name_or_path", "x"], "model.name_or_path: no such flag"),
        (
            [*QUALITY, *NO_GRAPH, "--selection.stratify_by", "topic"],
            "selection.stratify_by: 'topic' is no column of the score table, nor of the corpus, as --data"
            ".path is not given; allowed: quality",
        ),
    ],
)
def test_what_a_table_lacks_is_one_line(table, capsys, args, message):
    command(table, *args, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"grads-dist: error: {message}")
    assert not (table.parent / "out").exists()


def test_a_signal_of_texts_is_refused(tmp_path, capsys):
    pq.write_table(pa.table({"topic": ["a", "b"], "quality": [1.0, 2.0]}), tmp_path / "own.parquet")
    command(tmp_path / "own.parquet", "--selection.signal", "[topic]", *NO_GRAPH, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "'topic', which selection.signal ['topic'] reads, holds string, not numbers; allowed: " in error
    assert error.endswith(": quality")


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "own.parquet").write_text("quality\n1\n")
    command(tmp_path / "own.parquet", code=3)
    assert "own.parquet' is no readable Parquet file" in capsys.readouterr().err
    command(tmp_path / "gone.parquet", code=2)
    assert "table: " in capsys.readouterr().err
    pq.write_table(pa.table({"quality": [1.0, 2.0]}), tmp_path / "own.parquet")
    flag = ["--features", str(tmp_path / "own.npy")]
    for content, words in {
        "text": "own.npy' cannot be read",
        "row": "holds float64 of shape [2]",
        "whole": "holds int64 of shape [2, 3]",
        "narrow": "holds float64 of shape [2, 0]",
        "short": "features of shape [1, 3] do not belong to a table of 2 rows",
    }.items():
        vectors = {"row": np.ones(2), "whole": np.ones((2, 3), int), "short": np.ones((1, 3))}
        vectors["narrow"] = np.ones((2, 0))
        if content == "text":
            (tmp_path / "own.npy").write_text("no array")
        else:
            np.save(tmp_path / "own.npy", vectors[content])
        command(tmp_path / "own.parquet", *QUALITY, *flag, code=3)
        assert words in capsys.readouterr().err


def test_selections_of_a_run_are_not_replaced(table, capsys):
    output = RunDir(table.parent / "out")
    output.selection_dir("default").mkdir(parents=True)
    output.manifest.touch()
    command(table, *QUALITY, *NO_GRAPH, code=2)
    assert "is a run and has a selection 'default'; allowed: another folder" in capsys.readouterr().err
    command(table, *QUALITY, *NO_GRAPH, "--selection.name", "mine")
    command(table, *QUALITY, *NO_GRAPH, "--selection.name", "mine", code=2)


def test_features_need_a_table(capsys):
    assert cli.main(["select", "--features", "x.npy"]) == 2
    assert "features: 'x.npy' is given without a table" in capsys.readouterr().err


def test_targets_are_inferred_from_the_columns():
    columns = ["index", "loss", "lm_head.sumsq", "lm_head.max", "a.b.norm", "note.text", ".max"]
    assert infer_targets(columns) == ["lm_head", "a.b"]


def test_columns_get_the_types_of_a_score_table():
    given = pa.table(
        {
            "index": pa.array([5.0, 2.0, 9.0]),
            "id": [7, 8, None],
            "status": pa.array(["ok", None, "bad"]).dictionary_encode(),
            "num_tokens": pa.array([1, 2, 3], pa.uint8()),
            "token_hash": ["x", "x", None],
        }
    )
    filled = fill_missing(given, 3)
    assert filled.column("index").to_pylist() == [5, 2, 9]
    assert filled.column("id").to_pylist() == ["7", "8", ""]
    assert filled.column("status").to_pylist() == ["ok", "", "bad"]
    assert filled.column("num_tokens").to_pylist() == [1, 2, 3]
    assert filled.column("num_label_tokens").to_pylist() == [1, 1, 1]
    first, second, third = filled.column("token_hash").to_pylist()
    assert first == second != third
    assert fill_missing(pa.table({}), 2).column("status").to_pylist() == ["ok", "ok"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"index": [0, 0]}, "column 'index' has a row number twice"),
        ({"index": [0.5, 1.0]}, "column 'index' holds double, not whole numbers"),
        ({"index": [-1, 1]}, "column 'index' has values below 0"),
        ({"num_tokens": [1, None]}, "column 'num_tokens' has no value in 1 rows"),
        ({"status": [["ok"], ["ok"]]}, "column 'status' holds list<"),
    ],
)
def test_values_that_a_column_cannot_have(columns, words):
    with pytest.raises(DataError, match=words):
        fill_missing(pa.table(columns), 2)


def test_a_table_of_several_checkpoints_is_folded(tmp_path):
    columns = {"index": [0, 0, 1, 1], "checkpoint": pa.array([0, 1, 0, 1], pa.int32())}
    pq.write_table(pa.table(columns | {"quality": [1.0, 3.0, 5.0, 9.0]}), tmp_path / "own.parquet")
    config = SelectionConfig(signal=["quality"], weights=Weights(1, 0, 0))
    source = table_source(tmp_path / "own.parquet", None, config, RunDir(tmp_path / "out"))
    folded, targets = source.selection_table(config)
    assert folded.column("quality").to_pylist() == [2.0, 7.0] and targets == []


# ---- what is imported


ALONE = """
import sys
from grads_dist.cli import main
code = main(sys.argv[1:]) or main(["select", "--compare", *sys.argv[-2:]])
print(sorted({"deepspeed", "transformers", "accelerate", "datasets"} & set(sys.modules)))
print("torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized())
raise SystemExit(code)
"""


def test_a_table_needs_neither_deepspeed_nor_transformers(table):
    np.save(table.parent / "vectors.npy", clustered_features(40))
    given = ["--features", str(table.parent / "vectors.npy"), "--selection.dedup_threshold", "0.9"]
    given += [*QUALITY, "--output_dir", str(table.parent / "out")]
    done = run_python("-c", ALONE, "select", "--table", str(table), *given)
    assert done.returncode == 0, done.stderr
    assert "selected 4 of 40 rows" in done.stdout and "near-duplicates: share" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["[]", "False"]


# ---- a run


@pytest.fixture
def finished(tmp_path):
    """The configuration of a run whose probe is done: 60 rows, two feature files."""
    rows = [json.dumps({"text": f"row {i}", "topic": i % 3, "tags": []}) for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = Config(
        data=DataConfig(path=str(tmp_path / "corpus.jsonl"), cache_dir=str(tmp_path / "cache")),
        similarity=SIMILARITY,
        selection=SelectionConfig(fraction=0.2),
        output_dir=str(tmp_path / "run"),
    )
    rundir = RunDir(tmp_path / "run")
    rundir.features("content").parent.mkdir(parents=True)
    pq.write_table(score_table(60), rundir.scores)
    np.save(rundir.features("content"), clustered_features(60))
    np.save(rundir.features("gradient"), clustered_features(60, seed=5, dims=9))
    np.save(rundir.features("content.target"), clustered_features(4))
    fingerprint = Corpus.open(config.data).fingerprint
    rundir.manifest.write_text(json.dumps({"corpus": fingerprint, "targets": {name: {} for name in TARGETS}}))
    save_config(config, rundir.config)
    return config


def run_of(config, **options):
    changed = Config(
        data=config.data,
        similarity=config.similarity,
        selection=SelectionConfig(**options),
        output_dir=config.output_dir,
    )
    return run_selection(changed, RunDir(Path(config.output_dir)), Corpus.open(config.data))


def test_a_run_tells_of_all_its_features_and_target_sets(finished):
    summary = run_of(finished, rows=12)
    assert set(summary["vendi"]) == {"content", "gradient"}
    assert summary["vendi"]["gradient"]["rows_all"] == 60
    assert set(summary["overlap"]) >= {"random", "rds"} and "less" not in summary["overlap"]
    assert run_of(finished, rows=12, criterion="rds")["overlap"].keys() == summary["overlap"].keys() - {"rds"}
    assert {"read", "content", "diagnostics"} <= set(summary["seconds"])


def test_features_that_only_the_diagnostics_read_are_read(finished):
    summary = run_of(finished, rows=12, weights=Weights(1, 0, 0))
    assert summary["coverage"]["queries"] == 60 and summary["neighbours"] is None
    assert not RunDir(Path(finished.output_dir)).similarity_dir("content").exists()
    RunDir(Path(finished.output_dir)).features("content").write_bytes(b"not an array")
    with pytest.raises(DataError, match="features: '.*content.npy' cannot be read"):
        run_of(finished, rows=12, weights=Weights(1, 0, 0))


def test_a_run_that_is_damaged_or_cannot_be_written_is_one_line(finished):
    rundir = RunDir(Path(finished.output_dir))
    (rundir.root / "selection").touch()
    with pytest.raises(ConfigError, match="output_dir: '.*default' cannot be written"):
        run_of(finished, rows=12)
    content = rundir.scores.read_bytes()
    for damaged in (content[:100], content[:4] + bytes(len(content) // 2) + content[len(content) // 2 + 4 :]):
        rundir.scores.write_bytes(damaged)
        with pytest.raises(DataError, match="table: '.*scores.parquet' is no readable Parquet file"):
            run_of(finished, rows=12)


def test_strata_come_from_the_corpus(finished):
    summary = run_of(finished, rows=12, stratify_by="topic")
    assert {name: s["selected"] for name, s in summary["strata"]["largest"].items()} == {
        "0": 4,
        "1": 4,
        "2": 4,
    }
    rundir = RunDir(Path(finished.output_dir))
    stratified = Config(
        data=finished.data, similarity=SIMILARITY, selection=SelectionConfig(stratify_by="topic")
    )
    assert select_from(stratified, rundir).summary["strata"]["number"] == 3
    with pytest.raises(ConfigError, match="column 'tags' holds a list in row 0"):
        run_of(finished, stratify_by="tags")
    with pytest.raises(ConfigError, match="'colour' is no column .*; allowed: text, topic, tags"):
        run_of(finished, stratify_by="colour")


def test_neighbours_are_kept_and_go_with_the_run(finished):
    rundir = RunDir(Path(finished.output_dir))
    first = run_of(finished, rows=12)
    files = {path: path.stat().st_mtime_ns for path in rundir.similarity_dir("content").iterdir()}
    again = run_of(finished, rows=12, name="again")
    assert files and files == {path: path.stat().st_mtime_ns for path in files}
    assert first["terms"] == again["terms"] and first["coverage"] == again["coverage"]
    rundir.marker.touch()
    rundir.create(overwrite=True)
    assert not rundir.similarity_dir("content").exists()


def test_a_run_that_is_not_probed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no scores.parquet; probe first"):
        run_source(RunDir(tmp_path))


# ---- several ranks


MAIN = [sys.executable, "-m", "grads_dist", "select"]


def test_two_ranks_select_what_one_does(finished, bare_ranks):
    expected = run_of(finished, fraction=0.2)
    run = Path(finished.output_dir)
    alone = (run / "selection" / "default" / "selected.parquet").read_bytes()
    for path in RunDir(run).similarity_dir("content").iterdir():
        path.unlink()
    results = bare_ranks(2, [*MAIN, "--output_dir", str(run)])
    assert [code for code, _, _ in results] == [0, 0], results
    subset = run / "selection" / "default" / "subset.jsonl"
    assert results[0][1] == f"selected 12 of 60 rows: {subset}\n" and results[1][1] == ""
    assert (run / "selection" / "default" / "selected.parquet").read_bytes() == alone
    assert read_summary(subset.parent)["terms"] == expected["terms"]


class OtherSees:
    """Rank 1, beside a rank 0 that sees features or not."""

    rank = 1

    def __init__(self, sees):
        self.sees = sees

    def gather(self, mine):
        return [self.sees, mine]

    @staticmethod
    def agree(error):
        if error is not None:
            raise error


def test_a_rank_that_does_not_see_the_features_ends_all(finished):
    rundir = RunDir(Path(finished.output_dir))
    for path in rundir.features("content").parent.iterdir():
        path.unlink()
    source = run_source(rundir)
    with pytest.raises(DataError, match="rank 1 does not see the files of 'content'"):
        share_graph(source, finished.selection, SIMILARITY, OtherSees(True))
    # Where nobody sees them, selecting says what is missing.
    share_graph(source, finished.selection, SIMILARITY, OtherSees(False))
    share_graph(source, SelectionConfig(weights=Weights(1, 0, 0)), SIMILARITY, None)


@pytest.mark.parametrize("fault", ["features", "stratify_by"])
def test_an_error_under_two_ranks_is_one_line(finished, bare_ranks, fault):
    run, args = Path(finished.output_dir), []
    if fault == "features":
        RunDir(run).features("content").write_bytes(b"no array")
    else:
        args = ["--selection.stratify_by", "colour"]
    results = bare_ranks(2, [*MAIN, "--output_dir", str(run), *args])
    code = {"features": 3, "stratify_by": 2}[fault]
    assert [code for code, _, _ in results] == [code, code], results
    errors = [line for _, _, err in results for line in err.splitlines() if line.startswith("grads-dist:")]
    assert len(errors) == 1 and fault.partition("_")[0] in errors[0]
    assert not any("Traceback" in err for _, _, err in results)
