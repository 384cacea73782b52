"""Exact cosines between chosen rows, and clusters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from similarity_data import all_cosines, clustered

from grads_dist.similarity import clusters, exact, faiss_index
from grads_dist.similarity.clusters import kmeans, learn_centres
from grads_dist.similarity.exact import close_pairs, nearest_cosine
from grads_dist.similarity.points import unit_rows

LIBRARIES = [
    pytest.param(
        True, marks=pytest.mark.skipif(not faiss_index.is_installed(), reason="no faiss"), id="faiss"
    ),
    pytest.param(False, id="torch"),
]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(exact, "_QUERY_ROWS", 13)
    monkeypatch.setattr(exact, "_BASE_ROWS", 29)
    monkeypatch.setattr(exact, "_PAIRS", 7)


# ---- exact


def test_nearest_cosine_equals_all_cosines(small_blocks):
    features = clustered(200)
    rng = np.random.default_rng(0)
    queries, base = rng.permutation(200)[:90], np.sort(rng.permutation(200)[:70])
    expected = all_cosines(features)[np.ix_(queries, base)].max(axis=1)
    found = nearest_cosine(unit_rows(features), queries, base)
    np.testing.assert_array_equal(found, np.where(expected == -2, np.nan, expected).astype(np.float32))
    assert found.dtype == np.float32 and (found[np.isin(queries, base) & (expected > -2)] == 1).all()


def test_nearest_cosine_without_a_base_or_queries():
    points = unit_rows(clustered(30))
    none = np.empty(0, np.int64)
    assert np.isnan(nearest_cosine(points, np.arange(5), none)).all()
    assert np.isnan(nearest_cosine(points, np.arange(5), np.array([28, 29]))).all()
    assert nearest_cosine(points, none, np.arange(5)).shape == (0,)


@pytest.mark.parametrize("threshold", [0.999, 0.9, 0.5, 1.0, -1.0])
def test_close_pairs_equal_all_cosines(small_blocks, threshold):
    features = clustered(150)
    members = np.random.default_rng(1).permutation(150)[:110]
    cosine = all_cosines(features)
    cosine[cosine == -2] = np.nan
    expected = [
        (i, j)
        for i in sorted(members)
        for j in sorted(members)
        if i < j and np.float32(cosine[i, j]) >= np.float32(threshold)
    ]
    one, other = close_pairs(unit_rows(features), members, threshold)
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == expected
    assert one.dtype == other.dtype == np.int64 and len(expected) > 0


def test_a_cosine_at_the_threshold_is_close():
    """cos = 0.6 by construction; a float32 sum may fall on either side of it."""
    features = np.array([[5, 0], [3, 4], [-5, 0], [-3, -4]], np.float32)
    one, other = close_pairs(unit_rows(features), np.arange(4), 0.6)
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == [(0, 1), (2, 3)]
    assert len(close_pairs(unit_rows(features), np.arange(4), 0.600001)[0]) == 0


def test_no_members_no_pairs():
    one, other = close_pairs(unit_rows(clustered(30)), np.empty(0, np.int64), 0.5)
    assert one.shape == other.shape == (0,)


# ---- clusters


@pytest.mark.parametrize("with_faiss", LIBRARIES)
def test_clusters_that_lie_apart_are_found(with_faiss, monkeypatch):
    monkeypatch.setattr(faiss_index, "is_installed", lambda: with_faiss)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 400)
    centres = np.array([[9, 0, 0], [-9, 0, 0], [0, 9, 0], [0, -9, 0]])
    points = unit_rows((centres[truth] + rng.normal(size=(400, 3))).astype(np.float16))
    best = max((kmeans(points, 4, seed) for seed in range(8)), key=lambda labels: len(np.unique(labels)))
    pairs = set(zip(truth.tolist(), best.tolist(), strict=True))
    assert len(pairs) == 4 and set(best) == {0, 1, 2, 3}


@pytest.mark.parametrize("with_faiss", LIBRARIES)
def test_same_labels_on_any_number_of_threads_and_in_any_blocks(with_faiss, monkeypatch):
    monkeypatch.setattr(faiss_index, "is_installed", lambda: with_faiss)
    points = unit_rows(clustered(700))
    first = kmeans(points, 20, seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr("grads_dist.similarity.points._BLOCK_NUMBERS", 8 * 128)
        np.testing.assert_array_equal(kmeans(points, 20, seed=3), first)
    finally:
        torch.set_num_threads(threads)
    assert (kmeans(points, 20, seed=4) != first).any()
    assert (first[-2:] == -1).all() and first[:-2].min() == 0


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(0, 30), num_clusters=st.integers(1, 40), seed=st.integers(0, 3))
def test_labels_are_consecutive_and_no_more_than_asked_for(num_rows, num_clusters, seed):
    features = np.random.default_rng(seed).integers(-1, 2, (num_rows, 2)).astype(np.float16)
    points = unit_rows(features)
    labels = kmeans(points, num_clusters, seed)
    np.testing.assert_array_equal(labels == -1, ~points.has_direction)
    used = np.unique(labels[labels >= 0])
    assert used.tolist() == list(range(len(used)))
    assert len(used) <= min(num_clusters, points.has_direction.sum())
    assert (len(used) > 0) == points.has_direction.any()


def test_as_many_clusters_as_different_rows():
    points = unit_rows(np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32))
    assert sorted(kmeans(points, 50, 0)) == list(range(12))


def test_a_cluster_that_loses_its_rows_gets_others():
    """Most rows are copies, so that most of the first centres are the same one."""
    rng = np.random.default_rng(0)
    units = np.concatenate([np.tile([[1.0, 0, 0]], (90, 1)), rng.normal(size=(10, 3))])
    units = (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)
    centres = learn_centres(units, 6, seed=0)
    labels = (units @ centres.T).argmax(axis=1)
    assert len(np.unique(labels)) >= 4
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)


def test_centres_are_means_of_their_rows(monkeypatch):
    monkeypatch.setattr(clusters, "_ITERATIONS", 50)
    units = unit_rows(clustered(300)).block(0, 298)
    centres = learn_centres(units, 5, seed=1)
    labels = (units @ centres.T).argmax(axis=1)
    for label in range(5):
        mean = units[labels == label].mean(axis=0)
        np.testing.assert_allclose(centres[label], mean / np.linalg.norm(mean), atol=1e-5)
