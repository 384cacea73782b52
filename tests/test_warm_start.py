"""Several checkpoints in one table, what follows for the selection, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selection_tables import TARGETS, clustered_features, score_table, with_column
from test_target_set import configure, naive, vectors, write_run  # noqa: F401
from workspace import make_model, make_rows, run_arguments, write_jsonl

from grads_dist.commands import prepare
from grads_dist.errors import ConfigError, DataError
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.checkpoints import fold_checkpoints
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.ranks import z
from grads_dist.selection.run import select_from
from grads_dist.selection.select import select
from grads_dist.selection.signal import compute_signal
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.table.merge import merge_scores
from grads_dist.table.schema import score_schema

SIMILARITY = SimilarityConfig(device="cpu", library="torch")
NUM_ROWS = 40


def at_checkpoints(count: int, num_rows: int = NUM_ROWS) -> tuple[pa.Table, list[pa.Table]]:
    """A table of several checkpoints, its rows shuffled, and the tables of each alone."""
    first = score_table(num_rows)
    parts = []
    for c in range(count):
        part = score_table(num_rows, seed=c)
        for name in ("num_tokens", "num_label_tokens", "token_hash"):
            part = with_column(part, name, first[name])
        parts.append(part)
    numbered = [
        part.append_column("checkpoint", pa.array([c] * num_rows, pa.int32())) for c, part in enumerate(parts)
    ]
    whole = pa.concat_tables(numbered)
    return whole.take(np.random.default_rng(0).permutation(len(whole))), parts


def test_statistics_of_each_checkpoint_are_further_targets():
    table, parts = at_checkpoints(3)
    folded, targets = fold_checkpoints(table, TARGETS)
    assert targets == [f"{name}@{c}" for name in TARGETS for c in range(3)]
    assert folded["index"].to_pylist() == list(range(NUM_ROWS)) and "checkpoint" not in folded.column_names
    for c, part in enumerate(parts):
        assert folded[f"embedding@{c}.max"].equals(part["embedding.max"])
    for name in ("loss", "el2n", "embedding.norm"):
        expected = np.mean([part[name].to_numpy().astype(np.float64) for part in parts], axis=0)
        np.testing.assert_allclose(folded[name], expected, rtol=1e-6)


def test_signal_is_the_mean_over_targets_and_checkpoints():
    table, parts = at_checkpoints(2)
    folded, targets = fold_checkpoints(table, TARGETS)
    config = SelectionConfig(signal="norm", length_adjust=False)
    logs = [np.log(part[f"{name}.norm"].to_numpy().astype(np.float64)) for part in parts for name in TARGETS]
    np.testing.assert_allclose(
        compute_signal(folded, config, targets).values, np.mean([z(x) for x in logs], 0)
    )
    named = SelectionConfig(signal=["embedding.norm"], length_adjust=False)
    means = np.mean([part["embedding.norm"].to_numpy() for part in parts], 0)
    np.testing.assert_allclose(compute_signal(folded, named, targets).values, z(means), rtol=1e-5)


def test_grand_counts_the_tied_weight_once_at_each_checkpoint():
    names = [*TARGETS, "tied"]
    table = score_table(NUM_ROWS, targets=names)
    both = [table.append_column("checkpoint", pa.array([c] * NUM_ROWS, pa.int32())) for c in range(2)]
    folded, targets = fold_checkpoints(pa.concat_tables(both), names)
    options = SelectionConfig(criterion="grand", weights=Weights(1, 0, 0))
    found = select(folded, None, options, SIMILARITY, targets)
    np.testing.assert_allclose(found.score, np.sqrt(2 * table["tied.sumsq"].to_numpy()))


def test_a_row_is_usable_where_all_checkpoints_are():
    table, _ = at_checkpoints(2)
    status = [
        "nonfinite" if key == (3, 1) else "ok"
        for key in zip(*map(pa.ChunkedArray.to_pylist, (table["index"], table["checkpoint"])), strict=True)
    ]
    folded, _ = fold_checkpoints(with_column(table, "status", status), TARGETS)
    assert [i for i, s in enumerate(folded["status"].to_pylist()) if s != "ok"] == [3]


def test_tables_of_one_checkpoint_stay_as_they_are():
    table = score_table(5)
    assert fold_checkpoints(table, TARGETS) == (table, TARGETS)
    one = table.append_column("checkpoint", pa.array([0] * 5, pa.int32()))
    assert fold_checkpoints(one, TARGETS) == (one, TARGETS)


def test_an_incomplete_table_is_refused():
    table, _ = at_checkpoints(2)
    with pytest.raises(DataError, match="once for each of 2 checkpoints"):
        fold_checkpoints(table.slice(1), TARGETS)


def test_one_pick_for_one_row_of_the_corpus(tmp_path, vectors):  # noqa: F811
    table, parts = at_checkpoints(2)
    rundir = write_run(tmp_path / "run", table, vectors, checkpoints=["a", "b"])
    found = select_from(configure("grads"), rundir)
    assert len(found.selected_index) == 8 == len(set(found.selected_index.tolist()))
    assert found.summary["counts"]["scored"] == NUM_ROWS
    by_loss = select_from(configure("loss"), rundir)
    losses = np.mean([part["loss"].to_numpy() for part in parts], axis=0)
    assert by_loss.selected_index.tolist() == sorted(np.argsort(-losses)[:8].tolist())


@pytest.mark.parametrize("weights", [None, [2e-5, 5e-6]])
def test_less_averages_over_checkpoints(tmp_path, vectors, weights):  # noqa: F811
    for c in range(2):
        vectors[f"gradient.{c}"] = clustered_features(NUM_ROWS, seed=20 + c, dims=9)
        vectors[f"gradient.{c}.target"] = clustered_features(4, seed=30 + c, dims=9)
    rundir = write_run(tmp_path / "run", at_checkpoints(2)[0], vectors, checkpoints=["a", "b"])
    found = select_from(configure("less", weights), rundir)
    parts = [naive(vectors[f"gradient.{c}"], vectors[f"gradient.{c}.target"], "mean") for c in range(2)]
    np.testing.assert_allclose(found.score, np.average(parts, axis=0, weights=weights), atol=1e-6)


def test_weights_for_another_number_of_checkpoints(tmp_path, vectors):  # noqa: F811
    rundir = write_run(tmp_path / "run", score_table(NUM_ROWS), vectors)
    with pytest.raises(ConfigError, match="2 weights for the 1 checkpoints of the run"):
        select_from(configure("less", [1.0, 2.0]), rundir)


# ---- merging


def write_shards(rundir: RunDir, shards: list[list[tuple[int, int]]]) -> None:
    schema = score_schema([])
    rundir.scores_dir.mkdir(parents=True)
    for k, keys in enumerate(shards):
        zeros = {field.name: pa.nulls(len(keys), field.type) for field in schema}
        index, checkpoint = zip(*keys, strict=True)
        zeros |= {"index": pa.array(index, pa.int64()), "checkpoint": pa.array(checkpoint, pa.int32())}
        pq.write_table(pa.table(zeros, schema=schema), rundir.scores_dir / f"shard-{k}.parquet")


INDEX = np.array([1, 4])


@pytest.mark.parametrize("rows_at_a_time", [1, 100])
def test_merged_by_row_and_checkpoint(tmp_path, rows_at_a_time):
    rundir = RunDir(tmp_path)
    write_shards(rundir, [[(4, 1), (1, 0)], [(1, 1), (4, 0)]])
    assert merge_scores(rundir, INDEX, rows_at_a_time, num_checkpoints=2).num_rows == 4
    table = pq.read_table(rundir.scores)
    keys = list(zip(table["index"].to_pylist(), table["checkpoint"].to_pylist(), strict=True))
    assert keys == [(1, 0), (1, 1), (4, 0), (4, 1)]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ([[(4, 1), (1, 0)], [(1, 1)]], "row 4 at checkpoint 0 is missing"),
        ([[(4, 1), (1, 0)], [(1, 1), (4, 0), (4, 1)]], "row 4 at checkpoint 1 is there twice"),
        ([[(4, 1), (1, 0), (1, 1), (4, 0)], [(3, 0)]], "row 3 at checkpoint 0 does not belong"),
        ([[(4, 1), (1, 0), (1, 1), (4, 2)]], "checkpoint 2 is not one of 2"),
    ],
)
def test_rows_that_are_lost_or_doubled_at_a_checkpoint(tmp_path, shards, words):
    rundir = RunDir(tmp_path)
    write_shards(rundir, shards)
    with pytest.raises(DataError, match=words):
        merge_scores(rundir, INDEX, num_checkpoints=2)


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"features": "gradient"},
            "probe.features: gradient needs weights that stay the same; set probe.mode fro",
        ),
        (
            {"features": ["gradient", "content"], "warmup": 0.1, "warmup_probe": "rest"},
            "probe.warmup_probe: rest",
        ),
        ({"features": []}, r"probe.features: \[\]"),
        (
            {"features": ["gradients"], "mode": "frozen"},
            "probe.features: .*allowed: none, or a list of content, gr",
        ),
        ({"gradient_dim": 1000}, "probe.gradient_dim: 1000 .*square"),
        ({"gradient_dim": -1}, "probe.gradient_dim: -1 "),
        ({"gradient_targets": []}, "probe.gradient_targets: empty"),
        ({"checkpoints": ["a", "b"]}, "probe.checkpoints: only probe.mode frozen"),
        ({"mode": "frozen", "checkpoint_weights": [1.0]}, "1 weights for 0"),
        ({"mode": "frozen", "checkpoints": ["a"], "checkpoint_weights": [0.0]}, r"\[0.0\] is not allowed"),
        ({"mode": "frozen", "checkpoints": ["a"], "checkpoint_weights": [float("nan")]}, "is not allowed"),
        ({"mode": "frozen", "save_model": True}, "probe.save_model: only probe.mode train"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ProbeConfig(**options)
    assert "\n" not in str(caught.value)


def test_names_of_feature_files():
    assert ProbeConfig().feature_files == ("content",)
    assert ProbeConfig(features="none").feature_files == ()
    both = {"mode": "frozen", "features": ["gradient", "content"]}
    assert ProbeConfig(**both).feature_files == ("content", "gradient")
    assert ProbeConfig(**both, checkpoints=["a"]).feature_files == ("content", "gradient")
    assert ProbeConfig(**both, checkpoints=["a", "b"]).feature_files == (
        "content",
        "gradient.0",
        "gradient.1",
    )
    assert ProbeConfig(features="gradient", warmup=0.2).feature_names == ("gradient",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    make_model(folder / "model")
    make_model(folder / "later", initializer_range=0.02)
    make_model(folder / "wider", hidden_size=32)
    make_model(folder / "other", "qwen2")
    write_jsonl(folder / "corpus.jsonl", make_rows(8))
    write_jsonl(folder / "target.jsonl", make_rows(3, seed=4))
    return folder


def program(folder, command: str, name: str, **options) -> str | None:
    return prepare([command, *run_arguments(folder, name, probe__mode="frozen", **options)])()


def test_a_run_over_two_checkpoints_by_less(folder):
    found = program(
        folder,
        "run",
        "two",
        probe__checkpoints=json.dumps([str(folder / "later"), str(folder / "model")]),
        probe__checkpoint_weights="[1.0, 0.5]",
        probe__features='["content", "gradient"]',
        probe__gradient_dim=16,
        probe__gradient_targets='{"down": ".*down_proj.weight"}',
        data__target=folder / "target.jsonl",
        selection__criterion="less",
        selection__rows=2,
    )
    run = folder / "two"
    assert "probed 8 rows at 2 checkpoints" in found and "selected 2 of 8 rows" in found
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["checkpoints"] == [str(folder / "later"), str(folder / "model")]
    assert manifest["target"]["rows"] == 3 and manifest["target"]["rejected"] == 0
    assert set(manifest["features"]) == {"content", "gradient.0", "gradient.1"}
    about = {"weights": str(folder / "model"), "dim": 16, "seed": 0, "targets": ["down"]}
    assert manifest["features"]["gradient.1"] == about
    shapes = {path.name: np.load(path).shape for path in (run / "features").glob("*.npy")}
    gradients = {
        f"gradient.{c}{part}": (n, 16) for c in range(2) for part, n in ((".npy", 8), (".target.npy", 3))
    }
    assert shapes == {"content.npy": (8, 16), "content.target.npy": (3, 16), **gradients}
    again = ["select", "--output_dir", str(run), "--selection.name", "rds", "--selection.criterion", "rds"]
    assert "selected 2 of 8" in prepare([*again, "--data.target", "gone.jsonl"])()


@pytest.mark.parametrize("name", ["wider", "other", "gone"])
def test_a_checkpoint_of_another_kind_is_refused_before_any_work(folder, name):
    paths = json.dumps([str(folder / "model"), str(folder / name)])
    with pytest.raises(ConfigError, match=f"probe.checkpoints: .*{name}") as caught:
        program(folder, "probe", f"refused-{name}", probe__checkpoints=paths)
    assert "\n" not in str(caught.value) and not (folder / f"refused-{name}").exists()


def test_gradient_targets_are_named_in_their_own_faults(folder):
    with pytest.raises(ConfigError, match="probe.gradient_targets: 'heads' is not known"):
        program(folder, "probe", "x", probe__features="gradient", probe__gradient_targets='["heads"]')


def test_runs_of_earlier_versions_have_no_checkpoint_column(folder):
    program(folder, "probe", "old")
    scores = folder / "old" / "scores.parquet"
    table = pq.read_table(scores)
    pq.write_table(table.drop_columns(["checkpoint"]), scores)
    assert (
        "selected 1 of 8"
        in prepare(["select", "--output_dir", str(folder / "old"), "--selection.rows", "1"])()
    )
