"""Near-duplicates: what `dedup_threshold` keeps, checked row by row and against all cosines."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_tables import TARGETS, clustered_features, score_table, with_column

from grads_dist.selection import choose, near_duplicates
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.near_duplicates import NearDuplicates
from grads_dist.selection.pick import Picked
from grads_dist.selection.ranks import ranking
from grads_dist.selection.select import select
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Neighbours, Search, knn
from grads_dist.similarity.points import unit_rows

SIMILARITY = SimilarityConfig(k=3, library="torch", device="cpu")


def all_cosines(features):
    """Cosines between all rows, float32, rounded as the graph rounds them; NaN without direction."""
    points = unit_rows(features)
    unit = points.take(np.arange(len(features))).astype(np.float64)
    cosine = np.round(unit @ unit.T, 6).astype(np.float32)
    cosine[~points.has_direction] = cosine[:, ~points.has_direction] = np.nan
    return cosine


def walk(score, allowed, cosine, threshold):
    """The definition: from the best, keep what is far from all that is kept."""
    close = cosine >= np.float32(threshold)
    kept = np.zeros(len(score), bool)
    for i in ranking(score):
        kept[i] = allowed[i] and not (close[i] & kept).any()
    return kept


def drop(features, score, allowed, threshold, similarity=SIMILARITY):
    points = unit_rows(features)
    return NearDuplicates(knn(points, similarity), points, threshold).drop(score, allowed)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_what_is_kept_is_what_a_walk_over_all_cosines_keeps(n, seed, threshold):
    rng = np.random.default_rng(seed)
    # Few directions: groups of equal rows, more close rows than are listed, ties of score and cosine.
    features = rng.integers(-1, 2, (n, 3)).astype(np.float16)
    score = rng.integers(0, 4, n) / 4
    allowed = rng.random(n) < 0.8
    cosine = all_cosines(features)
    found = drop(features, score, allowed, threshold)
    assert found.exact
    # Cosines of the two libraries may differ in the last decimal: only clear cases are compared.
    if not (np.abs(cosine - threshold) < 2e-6).any() or threshold == 1.0:
        np.testing.assert_array_equal(found.kept, walk(score, allowed, cosine, threshold))


@pytest.mark.parametrize("slab", [1, 7, 4096])
def test_slabs_of_crowded_rows_change_nothing(slab, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_SLAB_ROWS", slab)
    rng = np.random.default_rng(slab)
    centres = rng.normal(size=(6, 8))
    features = (centres[rng.integers(0, 6, 150)] + rng.normal(0, 0.12, (150, 8))).astype(np.float16)
    score, allowed = rng.random(150), rng.random(150) < 0.9
    cosine = all_cosines(features)
    for threshold in (0.97, 0.9, 0.5):
        found = drop(features, score, allowed, threshold)
        expected = walk(score, allowed, cosine, threshold)
        np.testing.assert_array_equal(found.kept, expected)
        assert 0 < found.kept.sum() < 120


def test_of_a_group_of_copies_larger_than_k_the_best_is_kept():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 8)).astype(np.float16)
    features[20:70] = features[20]
    score = rng.random(100)
    score[55] = 2.0
    kept = drop(features, score, np.ones(100, bool), 0.999).kept
    assert kept.sum() == 51 and kept[20:70].nonzero()[0].tolist() == [35]


def test_a_chain_drops_every_other_row():
    ids = np.array([[max(i - 1, 0), min(i + 1, 5)] for i in range(6)], np.int32)
    graph = Neighbours(ids, np.full((6, 2), 0.95, np.float32), np.arange(6))
    ids[0], ids[5] = [1, -1], [4, -1]
    graph.cosine[[0, 5], 1] = np.nan
    graph.cosine[1:5, 1] = 0.94999
    found = NearDuplicates(graph, None, 0.95).drop(np.arange(6.0)[::-1], np.ones(6, bool))
    assert found.kept.tolist() == [True, False, True, False, True, False]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["topk", "mmr", "facility_location", "cluster", "gumbel"]),
    st.sampled_from([0.4, 0.8]),
)
def test_no_two_selected_rows_reach_the_threshold(seed, pick, threshold):
    features = clustered_features(90, seed=seed, num_clusters=5)
    features[10:40] = features[10] + np.random.default_rng(seed).normal(0, 0.05, (30, 16)).astype(np.float16)
    options = SelectionConfig(pick=pick, rows=30, dedup_threshold=threshold)
    found = select(score_table(90), features, options, SIMILARITY, TARGETS)
    cosine = all_cosines(features)[np.ix_(found.selected, found.selected)]
    np.fill_diagonal(cosine, 0)
    assert np.round(cosine, 6).astype(np.float32).max() < np.float32(threshold)
    assert found.selected.sum() == min(30, found.summary["counts"]["allowed"])
    assert found.summary["near_duplicates"] == {"threshold": threshold, "exact": True}


def blind(graph):
    """The graph of a search that misses nearly everything."""
    ids, cosine = np.full_like(graph.ids, -1), np.full_like(graph.cosine, np.nan)
    search = Search("faiss", "cpu", "IVF8,Flat", "", False, 0.1, {})
    return dataclasses.replace(graph, ids=ids, cosine=cosine, search=search)


def test_what_an_approximate_graph_misses_is_found_among_the_picked(monkeypatch, caplog):
    monkeypatch.setattr("grads_dist.selection.scored.knn", lambda *args: blind(knn(*args)))
    features = clustered_features(120, num_clusters=8)
    options = SelectionConfig(rows=40, dedup_threshold=0.8)
    found = select(score_table(120), features, options, SIMILARITY, TARGETS)
    cosine = all_cosines(features)[np.ix_(found.selected, found.selected)]
    np.fill_diagonal(cosine, 0)
    assert cosine.max() < 0.8 and found.summary["near_duplicates"]["exact"]
    # The best row is kept, and the budget is filled up from behind as far as there are rows.
    assert found.selected[np.argmin(found.rank)]
    assert found.selected.sum() == 40
    monkeypatch.setattr(near_duplicates, "MOST_PRODUCTS", 1)
    with caplog.at_level(logging.WARNING):
        unchecked = select(score_table(120), features, options, SIMILARITY, TARGETS)
    assert not unchecked.summary["near_duplicates"]["exact"] and "misses some" in caplog.text


def test_a_row_that_was_checked_is_checked_again_when_it_comes_back(monkeypatch):
    """As a greedy pick may have it, whose rows change when one is dropped."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 16)).astype(np.float32)
    features[[2, 3]], features[4] = features[1] * [[1.01], [1.02]], features[0] * 1.01
    # 3 goes for 2, then 4 for 0; then 2 is back, beside 1.
    picks = iter([[0, 2, 3], [0, 1, 4], [0, 1, 2], [0, 1, 5]])

    def scripted(scored, score, *args):
        return Picked(score, np.isin(np.arange(40), next(picks)))

    monkeypatch.setattr("grads_dist.selection.scored.knn", lambda *args: blind(knn(*args)))
    monkeypatch.setattr(choose, "pick", scripted)
    table = with_column(score_table(40), "loss", np.arange(40, 0, -1, dtype=np.float32))
    options = SelectionConfig(criterion="loss", rows=3, dedup_threshold=0.95)
    found = select(table, features, options, SIMILARITY, TARGETS)
    assert found.selected.nonzero()[0].tolist() == [0, 1, 5]
