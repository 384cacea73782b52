"""What summary.json says of a selection: coverage, redundancy, Vendi scores, strata, overlaps."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_tables import TARGETS, clustered_features, score_table

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError
from grads_dist.selection import coverage, diagnostics
from grads_dist.selection.budget import Budget
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.coverage import describe_coverage, describe_redundancy, nearest_other
from grads_dist.selection.diagnostics import describe_controls, describe_strata, picked_too
from grads_dist.selection.labels import Labels, labels_of_corpus, labels_of_table
from grads_dist.selection.sampling import random_subset, sample
from grads_dist.selection.select import select
from grads_dist.selection.vendi import describe_vendi, vendi_score
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.graph import Neighbours
from grads_dist.similarity.points import unit_rows

SIMILARITY = SimilarityConfig(device="cpu", library="torch")


def cosines(points):
    """All cosines of the rows, float64 [n, n], the diagonal -2."""
    units = points.take(np.arange(points.num_rows)).astype(np.float64)
    products = units @ units.T
    np.fill_diagonal(products, -2.0)
    return products


# ---- samples


def test_a_sample_does_not_depend_on_other_rows():
    index = np.arange(0, 5000, 5)
    all_rows = sample(np.arange(1000), index, 100, seed=3, purpose="x")
    assert len(all_rows) == 100 and (np.diff(all_rows) > 0).all()
    without = np.setdiff1d(np.arange(1000), all_rows[:50])
    again = sample(without, index, 50, seed=3, purpose="x")
    np.testing.assert_array_equal(again, all_rows[50:])
    assert len(np.intersect1d(all_rows, sample(np.arange(1000), index, 100, 3, "y"))) < 40
    np.testing.assert_array_equal(sample(np.arange(7), index, 7, 0, "x"), np.arange(7))


def test_a_random_subset_has_its_size():
    index = np.arange(100)
    chosen = random_subset(index, 37, seed=1)
    assert chosen.sum() == 37
    assert (chosen == random_subset(index, 37, seed=1)).all() and (
        chosen != random_subset(index, 37, 2)
    ).any()
    assert random_subset(index, 100, 1).all() and not random_subset(index, 0, 1).any()


# ---- Vendi score


def test_vendi_of_known_sets():
    alike = np.tile([[0.6, 0.8, 0.0]], (20, 1))
    assert vendi_score(alike) == pytest.approx(1.0)
    assert vendi_score(np.eye(5)) == pytest.approx(5.0)
    assert vendi_score(np.repeat(np.eye(4), 7, axis=0)) == pytest.approx(4.0)
    shares = np.array([0.7, 0.2, 0.1])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert vendi_score(np.repeat(np.eye(3), [7, 2, 1], axis=0)) == pytest.approx(expected)
    assert vendi_score(np.concatenate([np.eye(3), np.zeros((4, 3))])) == pytest.approx(3.0)
    assert vendi_score(np.zeros((4, 3))) is None and vendi_score(np.zeros((0, 3))) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_both_forms_of_vendi_agree_with_the_kernel_form(rows, dims, seed):
    units = np.random.default_rng(seed).normal(size=(rows, dims))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(units @ units.T / rows)
    values = values[values > 1e-12]
    assert vendi_score(units) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_vendi_compares_the_selected_with_as_many_random_rows():
    features = clustered_features(400, num_clusters=8).astype(np.float32)
    features[3] = np.nan
    places, index = np.arange(400), np.arange(400) * 3
    labels = features[:, 0] > np.nanmedian(features[:, 0])
    found = describe_vendi(features, places, index, labels, seed=0)
    assert found["rows_all"] == 399 and found["rows_selected"] == labels.sum() and found["dimensions"] == 16
    assert found["rows_random"] in (labels.sum(), labels.sum() - 1)
    finite = features[np.isfinite(features).all(1)].astype(np.float64)
    units = finite - finite.mean(0)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    assert found["all"] == pytest.approx(vendi_score(units))
    assert 1 < found["selected"] < found["random"]


def test_vendi_reads_the_rows_of_the_candidates():
    features = np.concatenate([np.full((5, 4), 9.0), np.repeat(np.eye(4), 3, axis=0)])
    found = describe_vendi(features, np.arange(5, 17), np.arange(12), np.arange(12) < 6, seed=0)
    assert found["all"] == pytest.approx(3.0)  # four centred corners span three dimensions evenly
    assert found["rows_selected"] == 6


# ---- coverage and redundancy


@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_other_is_the_brute_force_maximum(monkeypatch, block):
    monkeypatch.setattr(coverage, "_BLOCK_ROWS", block)
    points = unit_rows(clustered_features(60))
    products = cosines(points)
    queries, base = np.array([0, 5, 9, 30, 59]), np.arange(0, 60, 3)
    expected = products[np.ix_(queries, base)].max(1)
    np.testing.assert_allclose(nearest_other(points, queries, base), expected, atol=2e-6)


def test_coverage_is_the_share_of_all_rows_near_a_member():
    features = clustered_features(300, num_clusters=40)
    points = unit_rows(features)
    selected = np.arange(300) < 30
    baseline = random_subset(np.arange(300), 30, 0)
    found = describe_coverage(points, np.arange(300), {"selected": selected, "random": baseline}, seed=0)
    products = cosines(points)
    np.fill_diagonal(products, 1.0)
    for name, members in {"selected": selected, "random": baseline}.items():
        nearest = np.round(products[:, members].max(1), 6).astype(np.float32)
        assert found[name] == [float(np.mean(nearest >= np.float32(t))) for t in (0.9, 0.8, 0.7)]
    assert found["thresholds"] == [0.9, 0.8, 0.7]
    assert (found["queries"], found["base_selected"], found["base_random"]) == (300, 30, 30)
    assert 0.1 <= found["selected"][0] < found["selected"][2] < 1


def test_everything_selected_covers_everything():
    points = unit_rows(clustered_features(50))
    found = describe_coverage(points, np.arange(50), {"selected": np.ones(50, bool)}, seed=0)
    assert found["selected"] == [1.0, 1.0, 1.0]


def test_rows_without_a_direction_are_left_out_of_coverage():
    features = clustered_features(50).astype(np.float32)
    features[:10] = np.inf
    points = unit_rows(features)
    lost = describe_coverage(points, np.arange(50), {"selected": np.arange(50) < 10}, seed=0)
    assert lost["selected"] is None and lost["queries"] == 40 and lost["base_selected"] == 0
    rest = describe_coverage(points, np.arange(50), {"selected": np.arange(50) >= 10}, seed=0)
    assert rest["selected"] == [1.0, 1.0, 1.0]


def test_a_search_that_takes_too_long_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(coverage, "_MOST_PRODUCTS", 16 * 1000)
    monkeypatch.setattr(coverage, "_FEWEST_QUERIES", 20)
    points, index = unit_rows(clustered_features(400)), np.arange(400)
    members = {"selected": np.arange(400) < 25, "random": np.arange(400) % 4 == 0}
    found = describe_coverage(points, index, members, seed=0)
    assert (found["queries"], found["base_selected"], found["base_random"]) == (20, 25, 50)
    redundancy = describe_redundancy(points, index, members, None, seed=0)
    assert redundancy["all"] is None and redundancy["random"] is None
    assert redundancy["selected"]["rows"] == 25


def test_redundancy_before_and_after():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 12))
    features[50:80] = features[:30] + 1e-3  # thirty pairs of near-duplicates
    points, index = unit_rows(features), np.arange(100)
    kept = (index < 50) | (index >= 90)
    found = describe_redundancy(points, index, {"selected": kept}, None, seed=0)
    products = cosines(points)
    assert found["near_duplicate"] == 0.95
    assert found["all"]["near_duplicates"] == pytest.approx(np.mean(products.max(1) >= 0.95)) and (
        found["all"]["near_duplicates"] >= 0.6
    )
    assert found["all"]["mean_nearest"] == pytest.approx(products.max(1).mean(), abs=1e-6)
    inside = products[np.ix_(kept, kept)].max(1)
    assert found["selected"]["near_duplicates"] == np.mean(inside >= 0.95) == 0
    assert found["selected"]["mean_nearest"] == pytest.approx(inside.mean(), abs=1e-6)
    assert (found["all"]["rows"], found["selected"]["rows"]) == (100, 60)


def test_redundancy_of_all_rows_is_read_off_the_graph():
    points = unit_rows(np.random.default_rng(0).normal(size=(4, 3)))
    cosine = np.array([[0.97], [0.5], [np.nan], [0.2]], np.float32)
    graph = Neighbours(np.array([[1], [0], [-1], [0]], np.int32), cosine, np.array([0, 1, 2, 1]))
    found = describe_redundancy(points, np.arange(4), {"selected": np.arange(4) < 1}, graph, seed=0)
    # rows 1 and 3 have identical features, which the list of row 3 does not show; row 2 has no neighbour
    assert found["all"]["mean_nearest"] == pytest.approx((0.97 + 1 + 1) / 3)
    assert found["all"]["near_duplicates"] == 1.0 and found["all"]["rows"] == 3
    assert found["selected"] is None


# ---- overlaps and shares


def test_picked_too_counts_rows_or_tokens():
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    selected = np.array([True, False, True, False, False])
    tokens = np.array([1, 5, 5, 1, 1])
    assert picked_too(score, tokens, Budget("rows", 99), selected) == 0.5
    assert picked_too(score, tokens, Budget("none"), selected) == 0.5
    assert picked_too(score, np.array([9, 1, 1, 1, 1]), Budget("tokens", 0), selected) == 0.5
    assert picked_too(-score, tokens, Budget("rows", 0), selected) == 0
    assert picked_too(score, tokens, Budget("rows", 0), np.zeros(5, bool)) is None


def test_controls_are_compared_on_a_sample_of_many_rows(monkeypatch):
    table = score_table(3000)
    selected = table.column("loss").to_numpy() > 2.5
    config, budget = SelectionConfig(), Budget("rows", int(selected.sum()))
    whole = describe_controls(table, TARGETS, config, budget, selected)
    monkeypatch.setattr(diagnostics, "COMPARED_ROWS", 1000)
    sampled = describe_controls(table, TARGETS, config, budget, selected)
    assert whole["loss"] == sampled["loss"] == 1.0
    assert set(whole) == set(sampled)
    assert all(abs(whole[name] - sampled[name]) < 0.06 for name in whole)


def test_controls_that_lack_a_column_are_left_out():
    table = score_table(50).drop_columns(["el2n", "loss", "lm_head.sumsq"])
    found = describe_controls(table, TARGETS, SelectionConfig(), Budget("rows", 5), np.arange(50) < 5)
    assert set(found) == {"expected_by_chance", "random", "length_matched_random"}


def test_shares_of_strata():
    labels = Labels(np.array([1, 0, 1, 2, 1]), ["a", "b", "c", "unused"])
    found = describe_strata(labels, np.array([True, True, False, False, True]))
    assert found["number"] == 3 and list(found["largest"]) == ["b", "a", "c"]
    assert found["largest"]["b"] == {
        "candidates": 3,
        "selected": 2,
        "share_candidates": 0.6,
        "share_selected": pytest.approx(2 / 3),
    }
    assert found["largest"]["c"]["selected"] == 0


# ---- the summary of a selection


def test_the_summary_holds_the_diagnostics_of_features():
    table, features = score_table(300), clustered_features(300)
    result = select(table, features, SelectionConfig(fraction=0.2), SIMILARITY, TARGETS)
    summary = json.loads(json.dumps(result.summary, allow_nan=False))
    assert summary["coverage"]["queries"] == 300 and len(summary["coverage"]["random"]) == 3
    assert set(summary["redundancy"]) == {"near_duplicate", "all", "selected", "random"}
    assert set(summary["vendi"]) == {"content"} and summary["vendi"]["content"]["rows_selected"] == 60
    assert summary["neighbours"]["exact"] is True
    assert "content" in summary["seconds"] and summary["strata"] is None
    selected = table.column("loss").to_numpy()[result.selected].astype(np.float64)
    assert summary["shares"]["loss"]["mean_selected"] == pytest.approx(selected.mean())


def test_diagnostics_do_not_need_the_weights_to_read_features():
    table, features = score_table(200), clustered_features(200)
    alone = SelectionConfig(rows=20, weights=Weights(1, 0, 0))
    one, other = (select(table, given, alone, SIMILARITY, TARGETS) for given in (features, None))
    np.testing.assert_array_equal(one.selected_index, other.selected_index)
    assert "coverage" in one.summary and "coverage" not in other.summary
    assert one.summary["neighbours"] is None
    with_graph = select(table, features, SelectionConfig(rows=20), SIMILARITY, TARGETS).summary
    assert one.summary["redundancy"]["all"]["mean_nearest"] == pytest.approx(
        with_graph["redundancy"]["all"]["mean_nearest"], abs=1e-6
    )


# ---- labels


def make_corpus(tmp_path, rows):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Corpus.open(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache")))


def test_labels_of_a_corpus(tmp_path):
    values = ["b", "a", None, 7, 7.5, True, "7", {}]
    rows = [{"text": "x"} | ({} if value == {} else {"topic": value}) for value in values]
    labels = labels_of_corpus(make_corpus(tmp_path, rows), "topic")
    assert [labels.names[code] for code in labels.codes] == [
        "b",
        "a",
        "null",
        "7",
        "7.5",
        "true",
        "7",
        "null",
    ]
    some = labels_of_corpus(make_corpus(tmp_path, rows), "topic", np.array([3, 0]))
    assert [some.names[code] for code in some.codes] == ["7", "b"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "x"}], "'topic' is no column of the score table, nor of the corpus; allowed: text$"),
        ([{"text": "x", "topic": "a"}, {"topic": ["a"]}], "'topic' holds a list in row 1 of the corpus"),
        ([{"topic": {"a": 1}}], "'topic' holds an object in row 0"),
        (
            [{"topic": i} for i in range(12)],
            "'topic' has 11 and more distinct values; allowed: .* at most 10",
        ),
    ],
)
def test_columns_that_are_no_labels(tmp_path, monkeypatch, rows, words):
    monkeypatch.setattr("grads_dist.selection.labels.MOST_LABELS", 10)
    with pytest.raises(ConfigError, match=words) as error:
        labels_of_corpus(make_corpus(tmp_path, rows), "topic")
    assert str(error.value).startswith("selection.stratify_by: ") and "\n" not in str(error.value)


def test_labels_of_a_table(monkeypatch):
    table = pa.table(
        {
            "text": pa.array(["b", None, "a", "b"]),
            "coded": pa.array(["b", None, "a", "b"]).dictionary_encode(),
            "number": [3, 1, 3, None],
            "list": [[1], [2], [3], [4]],
        }
    )
    for name in ("text", "coded"):
        labels = labels_of_table(table, name)
        assert labels.names == ["a", "b", "null"] and labels.codes.tolist() == [1, 2, 0, 1]
    assert labels_of_table(table, "number").names == ["1", "3", "null"]
    with pytest.raises(ConfigError, match="column 'list' of the score table holds list"):
        labels_of_table(table, "list")
    monkeypatch.setattr("grads_dist.selection.labels.MOST_LABELS", 1)
    with pytest.raises(ConfigError, match="column 'number' has 3 distinct values"):
        labels_of_table(table, "number")
