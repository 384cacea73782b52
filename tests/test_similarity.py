"""Neighbours against a numpy loop, and the two search libraries against each other."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.errors import ConfigError
from grads_dist.similarity import faiss_index, torch_search
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Backend, choose_backend, knn
from grads_dist.similarity.vectors import identical_rows, unit_vectors

needs_faiss = pytest.mark.skipif(not faiss_index.is_installed(), reason="faiss is not installed")
LIBRARIES = ["torch", pytest.param("faiss", marks=needs_faiss)]


def brute_force(features, k):
    """Cosines float64 [n, n] of centred features, -2 for the row itself and rows without direction."""
    features = features.astype(np.float64)
    finite = np.isfinite(features).all(axis=1)
    centred = features - features[finite].mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    usable = finite & (norms > 1e-9)
    cosine = np.full((len(features), len(features)), -2.0)
    for i in np.flatnonzero(usable):
        for j in np.flatnonzero(usable):
            if i != j:
                cosine[i, j] = centred[i] @ centred[j] / norms[i] / norms[j]
    return cosine, np.sort(cosine, axis=1)[:, ::-1][:, :k]


def check_graph(graph, features, k):
    """Each list holds the k largest cosines, at the rows it names, without the row itself or repeats."""
    cosine, best = brute_force(features, k)
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-2.0)
    for i in range(len(features)):
        listed = graph.ids[i] >= 0
        np.testing.assert_allclose(graph.cosine[i][listed], best[i][best[i] > -2], atol=2e-6)
        np.testing.assert_allclose(cosine[i, graph.ids[i][listed]], graph.cosine[i][listed], atol=2e-6)
        assert i not in graph.ids[i]
        assert len(set(graph.ids[i][listed])) == listed.sum()
        assert np.isnan(graph.cosine[i][~listed]).all()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("n", "dims", "k"), [(123, 7, 10), (40, 3, 1), (5, 4, 10), (2, 2, 3)])
def test_knn_equals_brute_force(library, n, dims, k):
    features = (np.random.default_rng(n).normal(size=(n, dims)) + 2).astype(np.float16)
    graph = knn(features, SimilarityConfig(k=k, library=library, device="cpu"))
    assert graph.ids.shape == graph.cosine.shape == (n, min(k, n - 1))
    assert graph.ids.dtype == np.int64 and graph.cosine.dtype == np.float32
    check_graph(graph, features, k)


@pytest.mark.parametrize("library", LIBRARIES)
def test_groups_of_exact_duplicates_larger_than_k(library):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(170, 8)).astype(np.float16)
    features[40:90] = features[40]
    features[100:150] = features[100]
    order = rng.permutation(170)
    features = features[order]
    graph = knn(features, SimilarityConfig(k=10, library=library, device="cpu"))
    check_graph(graph, features, 10)
    for first in (40, 100):
        members = np.flatnonzero((order >= first) & (order < first + 50))
        assert (graph.group[members] == members.min()).all()
        assert (graph.cosine[members] == 1.0).all()
        assert np.isin(graph.ids[members], members).all()


@needs_faiss
def test_faiss_equals_torch_whatever_the_blocks(monkeypatch):
    features = np.random.default_rng(0).normal(size=(700, 12)).astype(np.float32)
    by_faiss = knn(features, SimilarityConfig(library="faiss", device="cpu"))
    monkeypatch.setattr(torch_search, "_BASE_ROWS", 97)
    monkeypatch.setattr(torch_search, "_QUERY_ROWS", 41)
    by_torch = knn(features, SimilarityConfig(library="torch", device="cpu"))
    np.testing.assert_array_equal(by_faiss.ids, by_torch.ids)
    np.testing.assert_allclose(by_faiss.cosine, by_torch.cosine, atol=2e-6)


def test_blocks_smaller_than_the_number_of_results(monkeypatch):
    features = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    monkeypatch.setattr(torch_search, "_BASE_ROWS", 4)
    check_graph(knn(features, SimilarityConfig(library="torch", device="cpu")), features, 10)


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_without_direction_have_no_neighbours_and_are_nobodys(library, caplog):
    rng = np.random.default_rng(1)
    half = rng.normal(size=(30, 6)).astype(np.float16)
    features = np.concatenate([half, -half, np.zeros((4, 6), np.float16)])
    features[7], features[37] = np.nan, np.inf
    with caplog.at_level(logging.WARNING):
        graph = knn(features, SimilarityConfig(k=5, library=library, device="cpu"))
    bad = [7, 37, 60, 61, 62, 63]
    assert (graph.ids[bad] == -1).all() and np.isnan(graph.cosine[bad]).all()
    assert not np.isin(graph.ids, bad).any()
    assert "6 of 64 rows have no direction" in caplog.text
    assert graph.group[60:].tolist() == [60, 61, 62, 63]
    assert graph.group[[7, 37]].tolist() == [7, 37]
    check_graph(graph, features, 5)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_all_rows_identical_or_hardly_any(n):
    features = np.full((n, 3), 0.1, np.float32)
    graph = knn(features, SimilarityConfig(k=4, library="torch", device="cpu"))
    assert (graph.ids == -1).all() and graph.ids.shape == (n, max(0, min(4, n - 1)))
    assert graph.group.tolist() == list(range(n))


def test_a_k_beyond_the_corpus_takes_no_memory_for_it():
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    graph = knn(features, SimilarityConfig(k=10**15, library="torch", device="cpu"))
    assert graph.ids.shape == (6, 5) and (graph.ids >= 0).all()


def test_unit_vectors_are_centred_over_all_blocks(monkeypatch):
    monkeypatch.setattr("grads_dist.similarity.vectors._BLOCK_ROWS", 13)
    features = (np.random.default_rng(2).normal(size=(100, 5)) + 10).astype(np.float32)
    features[50] = np.nan
    unit, rows = unit_vectors(features)
    assert rows.tolist() == [i for i in range(100) if i != 50]
    centred = features[rows].astype(np.float64) - features[rows].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(unit, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1)), max_size=40), st.sampled_from([2, 4, 8]))
def test_identical_rows_equals_a_loop(rows, size):
    features = np.array(rows, f"f{size}").reshape(-1, 2)
    expected = [rows.index(row) for row in rows]
    assert identical_rows(features).tolist() == expected


def test_identical_rows_survive_hash_collisions(monkeypatch):
    monkeypatch.setattr("grads_dist.similarity.vectors._hash", lambda block: np.zeros(len(block), np.uint64))
    features = np.array([[1.0], [2.0], [1.0], [3.0]], np.float32)
    assert identical_rows(features).tolist() == [0, 1, 0, 3]


def test_negative_zero_is_zero():
    assert identical_rows(np.array([[0.0, 1.0], [-0.0, 1.0]], np.float16)).tolist() == [0, 0]


def test_a_memory_map_is_read(tmp_path):
    features = np.random.default_rng(5).normal(size=(60, 4)).astype(np.float16)
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r", allow_pickle=False)
    config = SimilarityConfig(k=3, library="torch", device="cpu")
    np.testing.assert_array_equal(knn(mapped, config).ids, knn(features, config).ids)


@pytest.mark.parametrize(
    ("index", "device", "installed", "gpus", "cuda", "expected"),
    [
        ("auto", "auto", True, 0, False, ("faiss", "cpu")),
        ("auto", "auto", True, 1, True, ("faiss", "cuda")),
        ("auto", "auto", True, 0, True, ("torch", "cuda")),
        ("auto", "cpu", True, 1, True, ("faiss", "cpu")),
        ("auto", "auto", False, 0, False, ("torch", "cpu")),
        ("auto", "auto", False, 0, True, ("torch", "cuda")),
        ("faiss", "auto", True, 0, True, ("faiss", "cpu")),
        ("torch", "auto", True, 1, True, ("torch", "cuda")),
        ("faiss", "auto", False, 0, False, "similarity.library"),
        ("faiss", "cuda", True, 0, True, "similarity.device"),
        ("torch", "cuda", True, 0, False, "similarity.device"),
    ],
)
def test_choice_of_the_backend(monkeypatch, index, device, installed, gpus, cuda, expected):
    monkeypatch.setattr(faiss_index, "is_installed", lambda: installed)
    monkeypatch.setattr(faiss_index, "num_gpus", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    config = SimilarityConfig(library=index, device=device)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            choose_backend(config)
    else:
        backend = choose_backend(config)
        assert isinstance(backend, Backend)
        assert (backend.library, backend.device) == expected


@needs_faiss
def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        knn(np.eye(4, dtype=np.float32), SimilarityConfig(k=2, device="cpu"))
    assert "4 x 4 features with faiss on cpu (faiss is there and serves cpu)" in caplog.text


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"k": 0}, "similarity.k: 0"),
        ({"library": "annoy"}, "similarity.library: 'annoy'"),
        ({"device": "tpu"}, "similarity.device: 'tpu'"),
        ({"features": "../x"}, "similarity.features: '../x'"),
    ],
)
def test_config_refuses(values, field):
    with pytest.raises(ConfigError) as caught:
        SimilarityConfig(**values)
    assert str(caught.value).startswith(field) and "\n" not in str(caught.value)
