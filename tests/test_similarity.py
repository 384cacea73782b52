"""The graph of neighbours against sorting all pairs, whatever searches and however it is cut up."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from similarity_data import all_cosines, clustered, neighbours

from grads_dist.errors import ConfigError, DataError
from grads_dist.similarity import build, exact_search, faiss_index, keys, shares, store, torch_search
from grads_dist.similarity.backend import Backend, choose_backend
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.identical import identical_rows
from grads_dist.similarity.knn import knn
from grads_dist.similarity.points import unit_rows

needs_faiss = pytest.mark.skipif(not faiss_index.is_installed(), reason="faiss is not installed")
LIBRARIES = ["torch", pytest.param("faiss", marks=needs_faiss)]


def graph_of(features, k=10, library="torch", **options):
    return knn(unit_rows(features), SimilarityConfig(k=k, library=library, device="cpu", **options))


def check_graph(graph, features, k):
    ids, cosine = neighbours(features, k)
    np.testing.assert_array_equal(graph.ids, ids)
    np.testing.assert_array_equal(graph.cosine, cosine)
    assert graph.ids.dtype == np.int32 and graph.cosine.dtype == np.float32 and graph.group.dtype == np.int64


# ---- neighbours


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("n", "dims", "k"), [(423, 7, 10), (90, 3, 1), (60, 4, 100), (40, 2, 3), (50, 1, 4)])
def test_knn_equals_sorting_all_pairs(library, n, dims, k):
    features = clustered(n, dims, seed=n)
    graph = graph_of(features, k, library, index="exact")
    assert graph.ids.shape == (n, min(k, n - 1))
    check_graph(graph, features, k)
    assert graph.search.exact and graph.search.recall is None and graph.search.library == library


@pytest.mark.parametrize("library", LIBRARIES)
def test_groups_of_exact_duplicates_larger_than_k(library):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(170, 8)).astype(np.float16)
    features[40:90] = features[40]
    features[100:150] = features[100]
    order = rng.permutation(170)
    features = features[order]
    graph = graph_of(features, 10, library)
    check_graph(graph, features, 10)
    for first in (40, 100):
        members = np.flatnonzero((order >= first) & (order < first + 50))
        assert (graph.group[members] == members.min()).all()
        assert (graph.cosine[members] == 1.0).all()
        assert np.isin(graph.ids[members], members).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_ties_of_many_different_rows_go_to_the_first(library):
    """Rows along a few axes at many lengths: far more rows share a cosine than a library returns."""
    rng = np.random.default_rng(4)
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    features = (
        np.repeat(axes, 60, axis=0) * rng.integers(1, 100, (480, 1)) * (1 + np.arange(480)[:, None] % 2)
    )
    features = np.concatenate([features, -features]).astype(np.float16)
    features = features[rng.permutation(len(features))]
    assert len(np.unique(identical_rows(unit_rows(features)))) > 400
    check_graph(graph_of(features, 5, library), features, 5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_shards_and_threads_change_nothing(library, monkeypatch):
    features = clustered(250, 12)
    whole = graph_of(features, 10, library, index="exact")
    monkeypatch.setattr(torch_search, "_BASE_ROWS", 13)
    monkeypatch.setattr(torch_search, "_QUERY_ROWS", 41)
    monkeypatch.setattr(faiss_index, "_QUERY_ROWS", 37)
    monkeypatch.setattr(exact_search, "_QUERY_ROWS", 53)
    monkeypatch.setattr(exact_search, "_SCAN_ROWS", 31)
    monkeypatch.setattr(exact_search, "_MARGIN", 0)
    monkeypatch.setattr(keys, "_BLOCK_NUMBERS", 1 << 11)
    monkeypatch.setattr("grads_dist.similarity.points._BLOCK_NUMBERS", 12 * 70)
    monkeypatch.setattr(build, "_BLOCK_ROWS", 29)
    monkeypatch.setattr(build, "index_limit", lambda device, ranks: 4 * 12 * 64)
    monkeypatch.setattr(shares, "_MIN_SHARD", 1)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            cut = graph_of(features, 10, library, index="exact")
            np.testing.assert_array_equal(cut.ids, whole.ids)
            np.testing.assert_array_equal(cut.cosine, whole.cosine)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_without_direction_have_no_neighbours_and_are_nobodys(library, caplog):
    rng = np.random.default_rng(1)
    half = rng.normal(size=(30, 6)).astype(np.float16)
    features = np.concatenate([half, -half, np.zeros((4, 6), np.float16)])
    features[7], features[37] = np.nan, np.inf
    with caplog.at_level(logging.WARNING):
        graph = graph_of(features, 5, library)
    bad = [7, 37, 60, 61, 62, 63]
    assert (graph.ids[bad] == -1).all() and np.isnan(graph.cosine[bad]).all()
    assert not np.isin(graph.ids, bad).any()
    assert "6 of 64 rows have no direction" in caplog.text
    assert graph.group[bad].tolist() == bad
    check_graph(graph, features, 5)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_all_rows_identical_or_hardly_any(n):
    graph = graph_of(np.full((n, 3), 0.1, np.float32), 4)
    assert (graph.ids == -1).all() and graph.ids.shape == (n, max(0, min(4, n - 1)))
    assert graph.group.tolist() == list(range(n))


def test_one_different_row_among_copies():
    features = np.array([[1.0, 2.0]] * 30 + [[5.0, 1.0]], np.float16)
    graph = graph_of(features, 3)
    assert graph.ids[0].tolist() == [1, 2, 3] and graph.ids[29].tolist() == [0, 1, 2]
    check_graph(graph, features, 3)


def test_a_k_beyond_the_corpus_takes_no_memory_for_it():
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    graph = graph_of(features, 10**15)
    assert graph.ids.shape == (6, 5) and (graph.ids >= 0).all()


def test_too_many_rows_are_refused(monkeypatch):
    points = unit_rows(np.eye(3))
    monkeypatch.setattr(points, "num_rows", 1 << 31)
    with pytest.raises(DataError, match="2147483648 rows .*; allowed: fewer than 2147483648$"):
        knn(points, SimilarityConfig())


def test_a_share_of_the_rows_is_a_matrix_of_its_own(tmp_path):
    features = clustered(300, 6)
    rows = np.flatnonzero(np.arange(300) % 3)
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r", allow_pickle=False)
    config = SimilarityConfig(k=4, library="torch", device="cpu")
    part = knn(unit_rows(mapped, rows), config)
    check_graph(part, features[rows], 4)
    np.testing.assert_array_equal(part.group, identical_rows(unit_rows(features[rows])))


# ---- unit rows and copies


def test_unit_rows_are_centred_over_all_blocks(monkeypatch):
    monkeypatch.setattr("grads_dist.similarity.points._BLOCK_NUMBERS", 65)
    features = (np.random.default_rng(2).normal(size=(100, 5)) + 10).astype(np.float32)
    features[50] = np.nan
    points = unit_rows(features)
    assert np.flatnonzero(~points.has_direction).tolist() == [50]
    usable = np.delete(features, 50, axis=0).astype(np.float64)
    centred = usable - usable.mean(axis=0)
    expected = np.insert(centred / np.linalg.norm(centred, axis=1, keepdims=True), 50, 0, axis=0)
    np.testing.assert_allclose(points.block(0, 100), expected, atol=1e-6)
    np.testing.assert_array_equal(points.block(40, 60), points.block(0, 100)[40:60])
    np.testing.assert_array_equal(points.take(np.array([99, 50, 3])), points.block(0, 100)[[99, 50, 3]])
    assert points.block(0, 9).dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1)), max_size=40), st.sampled_from([2, 4, 8]))
def test_identical_rows_equals_a_loop(rows, size):
    features = np.array(rows, f"f{size}").reshape(-1, 2)
    points = unit_rows(features)
    points.has_direction[:] = True
    assert identical_rows(points).tolist() == [rows.index(row) for row in rows]


def test_identical_rows_survive_hash_collisions(monkeypatch):
    monkeypatch.setattr("grads_dist.similarity.identical._hash", lambda rows: np.zeros(len(rows), np.uint64))
    features = np.array([[1.0], [3.0], [1.0], [4.0]], np.float32)
    assert identical_rows(unit_rows(features)).tolist() == [0, 1, 0, 3]


def test_negative_zero_is_zero():
    features = np.array([[0.0, 1.0], [-0.0, 1.0], [3.0, 0.0]], np.float16)
    assert identical_rows(unit_rows(features)).tolist() == [0, 0, 2]


# ---- the graph in a folder


def test_a_graph_is_kept_and_found_again(tmp_path, caplog):
    features = clustered(120)
    config = SimilarityConfig(k=4, index="exact", library="torch", device="cpu")
    first = knn(unit_rows(features), config, tmp_path / "graph")
    assert sorted(p.name for p in (tmp_path / "graph").iterdir()) == [
        ".lock",
        "cosine.npy",
        "graph.json",
        "group.npy",
        "ids.npy",
    ]
    with caplog.at_level(logging.INFO):
        again = knn(unit_rows(features.copy()), config, tmp_path / "graph")
    assert "the neighbours of 120 rows are those in" in caplog.text
    assert isinstance(again.ids, np.memmap) and again.search == first.search
    for name in ("ids", "cosine", "group"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    check_graph(again, features, 4)


@pytest.mark.parametrize("change", ["value", "rows", "k", "recall", "index", "library"])
def test_another_graph_is_not_taken_for_it(tmp_path, change):
    features = clustered(120)
    options = {"k": 4, "index": "exact", "recall": 0.9, "library": "torch", "device": "cpu"}
    knn(unit_rows(features), SimilarityConfig(**options), tmp_path)
    before = json.loads((tmp_path / "graph.json").read_text())["key"]
    rows = None
    if change == "value":
        features[5, 0] += 1
    elif change == "rows":
        rows = np.arange(119)
    else:
        options |= {"k": {"k": 5}, "recall": {"recall": 0.8}, "index": {"index": "auto"}}.get(change, {})
        if change == "library":
            if not faiss_index.is_installed():
                pytest.skip("faiss is not installed")
            options["library"] = "faiss"
    graph = knn(unit_rows(features, rows), SimilarityConfig(**options), tmp_path)
    assert json.loads((tmp_path / "graph.json").read_text())["key"] != before
    check_graph(graph, features if rows is None else features[rows], options["k"])


@pytest.mark.parametrize("damage", ["missing", "short", "shape", "json", "no json"])
def test_half_a_graph_does_not_count(tmp_path, damage):
    features = clustered(60)
    points = unit_rows(features)
    config = SimilarityConfig(k=3, library="torch", device="cpu")
    knn(points, config, tmp_path)
    key = json.loads((tmp_path / "graph.json").read_text())["key"]
    assert store.load(tmp_path, key) is not None
    if damage == "missing":
        (tmp_path / "ids.npy").unlink()
    elif damage == "short":
        (tmp_path / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-8])
    elif damage == "shape":
        np.save(tmp_path / "cosine.npy", np.zeros((60, 2), np.float32))
    elif damage == "json":
        (tmp_path / "graph.json").write_text('{"key": ')
    else:
        (tmp_path / "graph.json").unlink()
    assert store.load(tmp_path, key) is None
    check_graph(knn(points, config, tmp_path), features, 3)


def test_a_failed_search_leaves_no_graph(tmp_path, monkeypatch):
    features = clustered(60)
    config = SimilarityConfig(k=3, library="torch", device="cpu")
    knn(unit_rows(features), config, tmp_path)
    monkeypatch.setattr(store, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        knn(unit_rows(features[:50]), config, tmp_path)
    assert not (tmp_path / "graph.json").exists()


def test_two_searches_at_once_do_not_mix_their_graphs(tmp_path, monkeypatch):
    features, written, waits = clustered(120), Event(), Event()
    config = SimilarityConfig(k=4, library="torch", device="cpu")
    finish, flock = store.finish, store.fcntl.flock

    def slow_finish(*args):
        """The arrays are there; what they are is said when the other has been made to wait."""
        written.set()
        assert waits.wait(10)
        finish(*args)

    def noticed_flock(*args):
        try:
            flock(*args)
        except BlockingIOError:
            waits.set()
            raise

    monkeypatch.setattr(store, "finish", slow_finish)
    monkeypatch.setattr(store.fcntl, "flock", noticed_flock)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(knn, unit_rows(features, np.arange(100)), config, tmp_path)
        assert written.wait(30)
        second = pool.submit(knn, unit_rows(features, np.arange(20, 120)), config, tmp_path)
        check_graph(first.result(), features[:100], 4)
        check_graph(second.result(), features[20:], 4)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(store.fcntl, "flock", no_locks)
    features, config = clustered(60), SimilarityConfig(k=3, library="torch", device="cpu")
    check_graph(knn(unit_rows(features), config, tmp_path), features, 3)
    assert "is used without a lock: Operation not supported" in caplog.text


@pytest.mark.parametrize("n", [0, 1])
def test_empty_graphs_are_kept_as_well(tmp_path, n):
    config = SimilarityConfig(k=3, library="torch", device="cpu")
    for _ in range(2):
        graph = knn(unit_rows(np.ones((n, 2), np.float16)), config, tmp_path)
        assert graph.ids.shape == (n, 0) and graph.group.tolist() == list(range(n))


# ---- keys


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 2**31 - 1)), min_size=1, max_size=20))
def test_sorted_keys_are_nearest_first_and_then_by_row(pairs):
    cosine, rows = np.array([c / 10**6 for c, _ in pairs]), np.array([row for _, row in pairs])
    packed = np.sort(keys.pack(cosine, rows))
    expected = sorted(zip(-cosine, rows, strict=True))
    assert keys.rows_of(packed).tolist() == [row for _, row in expected]
    assert keys.cosines_of(packed).tolist() == [np.float32(-c) for c, _ in expected]


def test_no_neighbour_is_behind_every_neighbour():
    packed = np.sort(keys.pack(np.array([-1.0, 0.5]), np.array([2**31 - 1, -1])))
    assert keys.rows_of(packed).tolist() == [2**31 - 1, -1]
    assert keys.cosines_of(packed)[0] == -1 and np.isnan(keys.cosines_of(packed)[1])


def test_merged_lists_name_a_row_once():
    one = np.array([[1, 5, keys.NONE]])
    merged = keys.merge(one, np.array([[1, 2, 7]]), 3)
    assert merged.tolist() == [[1, 2, 5]]
    assert keys.merge(one, one, 3).tolist() == [[1, 5, keys.NONE]]


def test_products_do_not_depend_on_the_block():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(50, 33)).astype(np.float32), rng.normal(size=(50, 9, 33)).astype(np.float32)
    block = keys.row_products(one[:, None], other)
    single = [
        keys.row_products(one[i : i + 1, None], other[i : i + 1, j : j + 1])[0, 0]
        for i in range(50)
        for j in range(9)
    ]
    assert block.ravel().tolist() == single
    assert keys.row_products(one, other[:, 3]).tolist() == block[:, 3].tolist()


# ---- the choice of library and device


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


@pytest.mark.parametrize("installed", [True, False])
def test_an_index_by_name_needs_faiss(monkeypatch, installed):
    monkeypatch.setattr(faiss_index, "is_installed", lambda: installed)
    config = SimilarityConfig(index="IVF4,Flat", library="torch" if installed else "auto", device="cpu")
    with pytest.raises(ConfigError, match="^similarity.index: 'IVF4,Flat' needs faiss") as caught:
        choose_backend(config)
    assert "\n" not in str(caught.value)


@needs_faiss
def test_an_index_by_name_takes_faiss_on_the_cpu_where_it_cannot_use_the_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(faiss_index, "num_gpus", lambda: 0)
    backend = choose_backend(SimilarityConfig(index="IVF4,Flat"))
    assert (backend.library, backend.device) == ("faiss", "cpu")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"k": 0}, "similarity.k: 0"),
        ({"library": "annoy"}, "similarity.library: 'annoy'"),
        ({"device": "tpu"}, "similarity.device: 'tpu'"),
        ({"features": "../x"}, "similarity.features: '../x'"),
        ({"index": "best"}, "similarity.index: 'best'"),
        ({"recall": 0.0}, "similarity.recall: 0.0"),
        ({"recall": 1.1}, "similarity.recall: 1.1"),
    ],
)
def test_config_refuses(values, field):
    with pytest.raises(ConfigError) as caught:
        SimilarityConfig(**values)
    assert str(caught.value).startswith(field) and "\n" not in str(caught.value)


def test_the_plain_cosines_are_themselves_right():
    """What the other tests compare with, at three corners of a square about the origin."""
    features = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1], [0, 0]], np.float32)
    expected = np.array(
        [[1, 0, 0, -1, -2], [0, 1, -1, 0, -2], [0, -1, 1, 0, -2], [-1, 0, 0, 1, -2], [-2] * 5]
    )
    np.testing.assert_allclose(all_cosines(features), expected, atol=1e-7)
