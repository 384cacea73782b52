"""Indices that do not compare all rows: their recall, their choice, their refusals."""

import logging

import numpy as np
import pytest
import torch
from similarity_data import all_cosines, clustered, neighbours

from grads_dist.errors import ConfigError
from grads_dist.similarity import approximate, build, faiss_index, memory, shares
from grads_dist.similarity.backend import Backend
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import knn
from grads_dist.similarity.plan import MAX_SECONDS, RATE, Plan, plan_index
from grads_dist.similarity.points import unit_rows

needs_faiss = pytest.mark.skipif(not faiss_index.is_installed(), reason="faiss is not installed")
INDICES = ["IVF32,Flat", "IVF32,SQfp16", "IVF16,PQ4x4fs", "PQ8np", "HNSW8", "PCA6,IVF8,Flat", "Flat"]


def graph_of(features, index, k=5, **options):
    return knn(unit_rows(features), SimilarityConfig(k=k, index=index, device="cpu", **options))


def recall_of(graph, features):
    """Share of listed rows that are as near as the k nearest."""
    cosine = neighbours(features, graph.ids.shape[1])[1]
    known = ~np.isnan(cosine[:, -1])
    return (graph.cosine[known] >= cosine[known][:, -1:]).mean()


# ---- search


@needs_faiss
@pytest.mark.parametrize("index", INDICES)
def test_an_index_reaches_the_recall_and_its_cosines_are_true(index):
    features = clustered(900, 8)
    graph = graph_of(features, index, recall=0.9)
    assert not graph.search.exact and graph.search.index == index
    assert graph.search.recall >= 0.9
    # The sample is all rows that differ; in those that do not, copies are found with certainty.
    assert recall_of(graph, features) >= 0.9
    cosine = all_cosines(features)
    for i in np.flatnonzero(graph.ids[:, 0] >= 0):
        np.testing.assert_array_equal(graph.cosine[i], cosine[i, graph.ids[i]].astype(np.float32))
        order = list(zip(-graph.cosine[i], graph.ids[i], strict=True))
        assert order == sorted(set(order)) and i not in graph.ids[i]


@needs_faiss
def test_copies_are_neighbours_even_where_codes_hide_them():
    features = clustered(600, 8)
    graph = graph_of(features, "PQ1x4fs", k=10, recall=0.01)
    sizes = np.bincount(graph.group)
    copied = np.flatnonzero(np.isfinite(features).all(axis=1) & (sizes[graph.group] > 1))
    assert sizes.max() > 10
    for i in copied:
        others = min(sizes[graph.group[i]] - 1, 10)
        assert (graph.cosine[i, :others] == 1).all()


@needs_faiss
@pytest.mark.parametrize("index", ["IVF32,SQfp16", "IVF16,PQ4x4fs", "HNSW8"])
def test_same_graph_on_any_number_of_threads(index, monkeypatch):
    features = clustered(900, 8)
    monkeypatch.setattr(faiss_index, "_QUERY_ROWS", 64)
    graphs = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            graphs.append(graph_of(features, index))
    finally:
        torch.set_num_threads(threads)
    for graph in graphs[1:]:
        np.testing.assert_array_equal(graph.ids, graphs[0].ids)
        assert graph.search.recall == graphs[0].search.recall


@needs_faiss
def test_an_index_that_does_not_fit_is_searched_in_shards(monkeypatch, caplog):
    features = clustered(900, 8)
    monkeypatch.setattr(build, "index_limit", lambda device, ranks: 300 * (2 * 8 + 8))
    monkeypatch.setattr(shares, "_MIN_SHARD", 1)
    with caplog.at_level(logging.INFO):
        graph = graph_of(features, "IVF8,SQfp16", recall=0.9)
    assert "searched in 3 shards of 300 rows" in caplog.text
    assert recall_of(graph, features) >= 0.9
    assert all(len(set(row)) == 5 for row in graph.ids[:-2].tolist())


@needs_faiss
def test_a_recall_that_is_not_reached_is_said(caplog, monkeypatch):
    monkeypatch.setattr(approximate, "_MAX_CANDIDATES", 1)
    with caplog.at_level(logging.WARNING):
        graph = graph_of(clustered(900, 8), "PQ1x4fs", recall=1.0)
    assert graph.search.recall < 1
    assert "similarity: PQ1x4fs finds 0." in caplog.text and "similarity.recall asks for 1.0" in caplog.text


@needs_faiss
def test_no_more_effort_than_the_recall_takes():
    features = clustered(900, 8)
    points = unit_rows(features)
    efforts = {}
    for goal in (0.5, 0.99):
        settings = []
        original = approximate.tune

        def tune(*args, original=original, settings=settings):
            settings.append(original(*args))
            return settings[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(approximate, "tune", tune)
            knn(points, SimilarityConfig(k=5, index="IVF64,Flat", recall=goal, device="cpu"))
        efforts[goal] = settings[0].effort
        assert settings[0].recall >= goal
    assert 4 == efforts[0.5] < efforts[0.99] < 64


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("Nonsense", "could not parse index string Nonsense"),
        ("IVF8,PQ7", "should be a multiple of the number of subquantizers"),
        ("IVF500,Flat", "should be at least as large as number of clusters"),
        ("PQ8", "should be at least as large as number of clusters"),
    ],
)
@needs_faiss
def test_an_index_that_cannot_be_is_one_line(index, reason, tmp_path):
    with pytest.raises(ConfigError) as caught:
        knn(unit_rows(clustered(100, 8)), SimilarityConfig(index=index, device="cpu"), tmp_path)
    assert str(caught.value).startswith(f"similarity.index: {index!r} cannot be used: ")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
    assert not (tmp_path / "graph.json").exists()


@needs_faiss
@pytest.mark.parametrize("features", [np.ones((5, 3)), np.ones((1, 3)), np.ones((0, 3))])
def test_where_nothing_can_be_searched_no_index_is_needed(features):
    graph = graph_of(features, "IVF4,Flat")
    assert graph.search.exact and (graph.ids == -1).all()


@needs_faiss
@pytest.mark.parametrize(
    ("index", "taken"),
    [("IVF4,SQfp16", True), ("PCA6,IVF4,Flat", False), ("IVF4_HNSW8,Flat", False), ("SQ8", False)],
)
def test_an_inverted_file_takes_its_centres(index, taken):
    found = faiss_index.FaissIndex.by_name(index, 8)
    centres = unit_rows(clustered(200, 8)).block(0, 4)
    assert found.set_centres(centres) == taken
    if taken:
        found.train(centres)
        found.add([centres])
        assert found.rows_by_list().tolist() == [0, 1, 2, 3]


# ---- choice


def test_auto_is_exact_where_that_is_affordable():
    faiss, torch_ = Backend("faiss", "cpu", ""), Backend("torch", "cpu", "")
    auto = SimilarityConfig()
    assert plan_index(auto, faiss, 100_000, 128).index == "exact"
    large = plan_index(auto, faiss, 1_000_000, 128)
    assert large.index == "IVF4000,SQfp16"
    assert large.reason == "exact is 1.3e+14 multiplications, 1.8 h at 2e+10/s"
    assert plan_index(auto, faiss, 100_000, 4096).index == "IVF1265,SQfp16"
    assert plan_index(auto, Backend("faiss", "cuda", ""), 1_000_000, 256).index == "exact"
    assert plan_index(auto, torch_, 1_000_000, 128).index == "exact"
    assert "other indices need faiss" in plan_index(auto, torch_, 1_000_000, 128).reason
    assert plan_index(SimilarityConfig(index="exact"), faiss, 10**9, 128).index == "exact"
    limit = int((MAX_SECONDS * RATE["cpu"]) ** 0.5)
    assert plan_index(auto, faiss, limit, 1).index == "exact" != plan_index(auto, faiss, limit + 1, 1).index


@needs_faiss
def test_the_choice_is_logged_with_its_reason(caplog):
    with caplog.at_level(logging.INFO):
        graph = graph_of(np.eye(4, dtype=np.float32), "auto")
    line = (
        "4 different rows of 4 x 4 features, index exact (exact is 6.4e+01 multiplications, 0 s at 2e+10/s)"
    )
    assert f"{line} with faiss on cpu (faiss is there and serves cpu)" in caplog.text
    assert graph.search.reason.startswith("exact is 6.4e+01 multiplications")


def test_memory_is_shared_by_the_ranks_of_a_node(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  8192 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.index_limit("cpu", 2) == 2 << 20
    (tmp_path / "memory.max").write_text("5242880\n")
    (tmp_path / "memory.current").write_text("2097152\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1048576\n")
    assert memory.index_limit("cpu", 1) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.index_limit("cpu", 1) == 4 << 20


def test_ranks_that_would_search_differently_are_refused():
    class Ranks:
        def gather(self, way):
            return [way, way.replace("cpu", "cuda")]

        def agree(self, error):
            raise error

    plan, backend = Plan("exact", "why"), Backend("faiss", "cpu", "why")
    told = "rank 0 would search exact with faiss on cpu, rank 1 exact with faiss on cuda"
    with pytest.raises(ConfigError, match=told):
        build._check_alike(Ranks(), plan, backend)
