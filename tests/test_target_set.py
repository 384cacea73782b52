"""Criteria that compare with a target set, and the one that is a column: el2n, rds, less."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from selection_tables import TARGETS, clustered_features, score_table, with_column

from grads_dist.config import Config
from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError, DataError
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.check import check_selection
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.run import select_from
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.relevance import relevance

SIMILARITY = SimilarityConfig(device="cpu", library="torch")
NO_GRAPH = Weights(1.0, 0.0, 0.0)
NUM_ROWS = 40


def naive(features: np.ndarray, target: np.ndarray, reduce: str) -> list[float]:
    """Straight from the definition, one pair at a time."""
    rows, others = features.astype(np.float64), target.astype(np.float64)
    cosines = [[x @ y / np.sqrt((x @ x) * (y @ y)) for y in others] for x in rows]
    return [max(row) if reduce == "max" else sum(row) / len(row) for row in cosines]


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_relevance_is_the_reduced_cosine(reduce):
    features, target = clustered_features(50), clustered_features(7, seed=3)
    found = relevance(features, target, reduce)
    np.testing.assert_allclose(found, naive(features, target, reduce), atol=2e-6)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_relevance_in_blocks(monkeypatch, reduce):
    features, target = clustered_features(50), clustered_features(7, seed=3)
    whole = relevance(features, target, reduce)
    monkeypatch.setattr("grads_dist.similarity.relevance._BLOCK_ROWS", 8)
    monkeypatch.setattr("grads_dist.similarity.relevance._TARGET_ROWS", 2)
    np.testing.assert_array_equal(relevance(features, target, reduce), whole)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_rows_without_a_direction(reduce, caplog):
    features = np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [-1.0, 0.0]], np.float16)
    target = np.array([[2.0, 0.0], [0.0, 0.0], [np.inf, 1.0]], np.float16)
    found = relevance(features, target, reduce)
    np.testing.assert_allclose(found, [0.6, 0, np.nan, -1])
    assert "2 of 3 target rows" in caplog.text


def test_a_target_set_that_cannot_be_compared_with():
    with pytest.raises(DataError, match="none of the 2 rows"):
        relevance(clustered_features(3), np.zeros((2, 16)), "max")
    with pytest.raises(DataError, match="width 16.*width 4"):
        relevance(clustered_features(3), np.ones((2, 4)), "max")


# ---- from the files of a probe


def write_run(folder, table, features: dict[str, np.ndarray], **manifest) -> RunDir:
    """What a probe leaves."""
    rundir = RunDir(folder)
    rundir.features("x").parent.mkdir(parents=True)
    pq.write_table(table, rundir.scores)
    content = {"schema": 1, "targets": {name: {"numel": 5000} for name in TARGETS}, **manifest}
    rundir.manifest.write_text(json.dumps(content))
    for name, vectors in features.items():
        np.save(rundir.features(name), vectors)
    return rundir


def configure(criterion, weights=None, **options) -> Config:
    selection = SelectionConfig(criterion=criterion, rows=8, weights=NO_GRAPH, **options)
    probe = ProbeConfig(mode="frozen", checkpoints=["a", "b"] if weights else [], checkpoint_weights=weights)
    return Config(data=DataConfig(path="x"), probe=probe, similarity=SIMILARITY, selection=selection)


@pytest.fixture
def vectors() -> dict[str, np.ndarray]:
    return {
        "content": clustered_features(NUM_ROWS),
        "content.target": clustered_features(5, seed=7),
        "gradient": clustered_features(NUM_ROWS, seed=1, dims=9),
        "gradient.target": clustered_features(5, seed=8, dims=9),
    }


def best(scores: np.ndarray, count: int = 8) -> list[int]:
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:count].tolist())


@pytest.mark.parametrize(
    ("criterion", "name", "reduce"), [("rds", "content", "max"), ("less", "gradient", "mean")]
)
def test_the_closest_rows_are_picked(tmp_path, vectors, criterion, name, reduce):
    rundir = write_run(tmp_path / "run", score_table(NUM_ROWS), vectors)
    found = select_from(configure(criterion), rundir)
    expected = naive(vectors[name], vectors[f"{name}.target"], reduce)
    np.testing.assert_allclose(found.score, expected, atol=2e-6)
    assert found.selected_index.tolist() == best(found.score)
    assert set(found.summary["overlap"]) > {"random", "el2n"}


def test_el2n_is_the_column(tmp_path):
    table = score_table(NUM_ROWS)
    found = select_from(configure("el2n"), write_run(tmp_path / "run", table, {}))
    assert found.selected_index.tolist() == best(table["el2n"].to_numpy())


def test_rows_that_are_not_finite_need_no_features(tmp_path, vectors):
    table = score_table(NUM_ROWS)
    table = with_column(table, "status", ["nonfinite"] + ["ok"] * (NUM_ROWS - 1))
    vectors["gradient"][0] = np.nan
    found = select_from(configure("less"), write_run(tmp_path / "run", table, vectors))
    assert 0 not in found.index and np.isfinite(found.score).all()
    vectors["gradient"][1] = np.nan
    with pytest.raises(DataError, match="gradient features are not finite in 1 rows"):
        select_from(configure("less"), write_run(tmp_path / "other", table, vectors))


def test_copies_and_rejected_rows_keep_the_features_in_line(tmp_path, vectors):
    """Row k of the features is of row k of the table, whatever its number in the corpus."""
    table = score_table(NUM_ROWS)
    table = with_column(table, "index", 3 * np.arange(NUM_ROWS))
    table = with_column(table, "token_hash", np.r_[[5, 5], np.arange(10, NUM_ROWS + 8)])
    table = with_column(table, "num_tokens", np.full(NUM_ROWS, 9))
    found = select_from(configure("rds"), write_run(tmp_path / "run", table, vectors))
    assert found.index.tolist() == [0, *range(6, 3 * NUM_ROWS, 3)]
    expected = np.delete(naive(vectors["content"], vectors["content.target"], "max"), 1)
    np.testing.assert_allclose(found.score, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("criterion", "missing", "words"),
    [
        (
            "rds",
            "content.target",
            r"features/content\.target\.npy.*data\.target set and content in probe\.fea",
        ),
        (
            "less",
            "gradient.target",
            r"features/gradient\.target\.npy.*gradient in probe\.features \(mode froz",
        ),
        ("less", "gradient", r"needs features/gradient\.npy"),
    ],
)
def test_missing_features_are_named_with_the_options_that_make_them(
    tmp_path, vectors, criterion, missing, words
):
    del vectors[missing]
    rundir = write_run(tmp_path / "run", score_table(NUM_ROWS), vectors)
    with pytest.raises(ConfigError, match=words) as caught:
        select_from(configure(criterion), rundir)
    assert "\n" not in str(caught.value)


def test_features_of_other_rows_are_refused(tmp_path, vectors):
    vectors["content"] = vectors["content"][1:]
    with pytest.raises(DataError, match="39 rows do not belong to a table of 40"):
        select_from(configure("rds"), write_run(tmp_path / "run", score_table(NUM_ROWS), vectors))


def test_select_asks_for_the_relevance():
    with pytest.raises(ConfigError, match="rds needs content features of a target set"):
        select(score_table(9), None, SelectionConfig(criterion="rds", weights=NO_GRAPH), SIMILARITY, TARGETS)


GRADIENT = {"mode": "frozen", "features": ["content", "gradient"]}


@pytest.mark.parametrize(
    ("criterion", "target", "probe", "words"),
    [
        ("rds", None, {}, "rds compares content features with a target set; probe with data.target"),
        ("rds", "t", {"mode": "frozen", "features": "gradient"}, "content in probe.features"),
        ("less", "t", {}, "less compares gradient features.*gradient in probe.features"),
        ("less", None, GRADIENT, "data.target set"),
    ],
)
def test_what_a_criterion_needs_is_checked_before_the_probe(criterion, target, probe, words):
    config = configure(criterion)
    config = Config(
        data=DataConfig(path="x", target=target), probe=ProbeConfig(**probe), selection=config.selection
    )
    with pytest.raises(ConfigError, match=words):
        check_selection(config, TARGETS)


@pytest.mark.parametrize(("criterion", "probe"), [("rds", {}), ("less", GRADIENT), ("el2n", {})])
def test_what_the_probe_writes_is_enough(criterion, probe):
    data = DataConfig(path="x", target="t" if criterion != "el2n" else None)
    selection = SelectionConfig(criterion=criterion, weights=NO_GRAPH)
    check_selection(Config(data=data, probe=ProbeConfig(**probe), selection=selection), TARGETS)


def test_a_signal_of_extremes_needs_them_read():
    data, probe = DataConfig(path="x"), ProbeConfig(statistics="moments")
    with pytest.raises(
        ConfigError, match=r"selection.signal: '.*\.(max|min)' is not read with probe.statistics"
    ):
        check_selection(Config(data=data, probe=probe, selection=SelectionConfig(weights=NO_GRAPH)), TARGETS)
    norms = SelectionConfig(signal="norm", weights=NO_GRAPH)
    check_selection(Config(data=data, probe=probe, selection=norms), TARGETS)


def test_similarity_by_gradients():
    probe = ProbeConfig(mode="frozen", features=["gradient"])
    named = {"similarity": SimilarityConfig(features="gradient"), "data": DataConfig(path="x")}
    check_selection(Config(probe=probe, **named), TARGETS)
    several = ProbeConfig(mode="frozen", features=["gradient", "content"], checkpoints=["a", "b"])
    with pytest.raises(ConfigError, match="allowed: content, gradient.0, gradient.1"):
        check_selection(Config(probe=several, **named), TARGETS)
