"""The greedy picks against sequential greedy, brute force and apricot; gumbel and clusters."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_tables import TARGETS, clustered_features, score_table

from grads_dist.errors import ConfigError
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.controls import length_bins
from grads_dist.selection.facility import facility_values
from grads_dist.selection.mmr import mmr_values
from grads_dist.selection.quota import Enough, Quotas, take_parts
from grads_dist.selection.ranks import ranking
from grads_dist.selection.score import Terms
from grads_dist.selection.select import select
from grads_dist.similarity.clusters import kmeans
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Neighbours
from grads_dist.similarity.points import unit_rows

SIMILARITY = SimilarityConfig(device="cpu", library="torch")


def random_graph(rng, n, k, num_groups=None):
    """A graph whose cosines are symmetric and tie often; rows of one group are at the same place."""
    group = np.arange(n)
    if num_groups is not None:
        place = rng.integers(0, num_groups, n)
        group = np.array([np.flatnonzero(place == p)[0] for p in place])
    between = np.round(rng.uniform(-0.3, 1, (n, n)), 1)
    between = np.minimum(np.triu(between, 1) + np.triu(between, 1).T, 0.9)
    cosine = between[np.ix_(group, group)]
    cosine[group[:, None] == group[None]] = 1.0
    ids = np.full((n, min(k, n - 1)), -1, np.int32)
    listed = np.full(ids.shape, np.nan, np.float32)
    for i in range(n):
        nearest = sorted((j for j in range(n) if j != i), key=lambda j, i=i: (-cosine[i, j], j))
        count = int(rng.integers(0, ids.shape[1] + 1))
        ids[i, :count] = nearest[:count]
        listed[i, :count] = cosine[i, nearest[:count]]
    return Neighbours(ids, listed, group)


def similarity_of(graph, part):
    """The full matrix that a graph stands for, -1 where no link is; identical rows share their links."""
    n = len(graph.ids)
    same = (graph.group[:, None] == graph.group[None]) & (part[:, None] == part[None])
    matrix = np.full((n, n), -1.0)
    for i, (ids, cosines) in enumerate(zip(graph.ids, graph.cosine.astype(np.float64), strict=True)):
        for j, cosine in zip(ids, cosines, strict=True):
            if j >= 0 and part[i] == part[j]:
                block = np.ix_(same[i], same[j])
                matrix[block] = np.maximum(matrix[block], cosine)
    matrix = np.maximum(matrix, matrix.T)
    matrix[same] = 1.0
    return matrix


def sequential(allowed, value_of):
    """Greedy by its definition: rows in the order they are picked, and the values they had."""
    picked, values = [], []
    left = np.flatnonzero(allowed).tolist()
    while left:
        now = {j: value_of(j, picked) for j in left}
        best = min(left, key=lambda j: (-now[j], j))
        picked.append(best)
        values.append(now[best])
        left.remove(best)
    return picked, values


def assert_same_order(values, allowed, picked, expected):
    order = ranking(values)
    assert order[allowed[order]].tolist() == picked
    np.testing.assert_allclose(values[picked], expected, atol=1e-9)
    assert np.isneginf(values[~allowed]).all()


def quotas_of(part, limit, cost=None):
    return Quotas(part, np.full(int(part.max()) + 1, limit), cost)


GRAPHS = given(st.integers(1, 24), st.integers(1, 6), st.integers(0, 10**6), st.booleans(), st.integers(1, 2))


@settings(max_examples=50, deadline=None)
@GRAPHS
def test_mmr_in_rounds_is_sequential_greedy(n, k, seed, grouped, num_parts):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n, k, max(1, n // 3) if grouped else None)
    part, allowed = rng.integers(0, num_parts, n), rng.random(n) < 0.9
    gradient, spread = rng.integers(0, 8, n) / 8, rng.integers(0, 4, n) / 4
    tau = float(rng.choice([0.2, 0.5, 1.0]))
    weights = Weights(1.0, 0.5, float(rng.choice([0.0, 0.5, 2.0])))
    terms = Terms(gradient, spread, spread, np.full(n, -1), tau, gradient)
    matrix = similarity_of(graph, part)

    def value_of(j, picked):
        c = max((matrix[j, i] for i in picked), default=-1.0)
        c = np.float64(np.float32(c))
        reduction = max(0.0, (c - tau) / (1 - tau)) if tau < 1 else float(c >= 1)
        start = np.round(weights.g * gradient[j] + weights.d * spread[j], 12)
        return np.round(start - weights.r * reduction, 12)

    picked, expected = sequential(allowed, value_of)
    values = mmr_values(terms, weights, graph, allowed, part)
    assert_same_order(values, allowed, picked, expected)
    assert_early_stop_picks_the_same(
        rng, values, allowed, part, lambda enough: mmr_values(terms, weights, graph, allowed, part, enough)
    )


def assert_early_stop_picks_the_same(rng, values, allowed, part, values_until):
    """Stopping as soon as the budget is certain changes nothing of what is picked."""
    tokens = rng.integers(1, 9, len(part)) if rng.random() < 0.5 else None
    quotas = quotas_of(part, int(rng.integers(1, len(part) + 1)), tokens)
    early = values_until(eager(quotas))
    np.testing.assert_array_equal(take_parts(early, allowed, quotas), take_parts(values, allowed, quotas))


def eager(quotas):
    """Looks after every round whether the budget is certain."""
    enough = Enough(quotas)
    enough._next = 1
    return enough


@settings(max_examples=50, deadline=None)
@GRAPHS
def test_facility_location_in_rounds_is_sequential_greedy(n, k, seed, grouped, num_parts):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, n, k, max(1, n // 3) if grouped else None)
    part, allowed = rng.integers(0, num_parts, n), rng.random(n) < 0.9
    gradient = rng.integers(0, 8, n) / 8
    weights = Weights(float(rng.choice([0.0, 1.0])), 0.5, 1.0)
    similarity = np.maximum(similarity_of(graph, part), 0)

    def gain(j, picked):
        cover = similarity[:, picked].max(axis=1) if picked else np.zeros(n)
        covered = np.maximum(similarity[:, j] - cover, 0).sum()
        return np.round(weights.g * gradient[j] + weights.d * covered, 9)

    picked, expected = sequential(allowed, gain)
    values = facility_values(gradient, weights, graph, allowed, part)
    assert_same_order(values, allowed, picked, expected)
    assert_early_stop_picks_the_same(
        rng,
        values,
        allowed,
        part,
        lambda enough: facility_values(gradient, weights, graph, allowed, part, enough),
    )


def test_blocks_of_links_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    graph = random_graph(rng, 60, 6)
    gradient, part, everyone = rng.random(60), np.zeros(60, int), np.ones(60, bool)
    terms = Terms(gradient, gradient, gradient, np.full(60, -1), 0.4, gradient)
    one = mmr_values(terms, Weights(), graph, everyone, part)
    two = facility_values(gradient, Weights(), graph, everyone, part)
    monkeypatch.setattr("grads_dist.selection.links._BLOCK_LINKS", 7)
    monkeypatch.setattr("grads_dist.selection.links._BLOCK_ROWS", 11)
    np.testing.assert_array_equal(mmr_values(terms, Weights(), graph, everyone, part), one)
    np.testing.assert_array_equal(facility_values(gradient, Weights(), graph, everyone, part), two)


def complete_graph(rng, n):
    """Every row lists every other; the matrix is that of facility location."""
    unit = rng.normal(size=(n, 4))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = np.round(unit @ unit.T, 6).astype(np.float32)
    ids = np.array([[j for j in range(n) if j != i] for i in range(n)], np.int32).reshape(n, n - 1)
    similarity = np.maximum(cosine.astype(np.float64), 0)
    np.fill_diagonal(similarity, 1)
    return Neighbours(ids, np.take_along_axis(cosine, ids, 1), np.arange(n)), similarity


def plain_order(graph, n):
    return ranking(facility_values(np.zeros(n), Weights(0, 1, 0), graph, np.ones(n, bool), np.zeros(n, int)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_facility_location_is_within_its_guarantee_of_the_best_subset(n, seed):
    graph, similarity = complete_graph(np.random.default_rng(seed), n)
    order = plain_order(graph, n)
    for size in range(1, n):
        best = max(
            similarity[:, s].max(axis=1).sum() for s in map(list, itertools.combinations(range(n), size))
        )
        assert similarity[:, order[:size]].max(axis=1).sum() >= (1 - 1 / np.e) * best - 1e-9


def test_facility_location_is_that_of_apricot(monkeypatch):
    # It would compile for longer than it then runs.
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    apricot = pytest.importorskip("apricot")
    for seed in range(3):
        graph, similarity = complete_graph(np.random.default_rng(seed), 60)
        reference = apricot.FacilityLocationSelection(10, metric="precomputed", optimizer="naive")
        assert plain_order(graph, 60)[:10].tolist() == reference.fit(similarity).ranking.tolist()


# ---- the rules as options


def chosen(features=None, n=240, table=None, **options):
    table = score_table(n) if table is None else table
    return select(table, features, SelectionConfig(**options), SIMILARITY, TARGETS)


@pytest.mark.parametrize("pick", ["mmr", "facility_location", "cluster", "gumbel"])
def test_budgets_are_met_and_the_first_of_a_pick_are_the_pick_of_fewer(pick):
    features = clustered_features(240)
    tokens = score_table(240).column("num_tokens").to_numpy()
    many = chosen(features, pick=pick, rows=50)
    assert many.selected.sum() == 50
    spent = tokens[chosen(features, pick=pick, tokens=9000).selected].sum()
    assert 9000 - tokens.max() < spent <= 9000
    if pick != "cluster":
        assert set(many.rank[many.selected]) == set(range(1, 51))
        few = chosen(features, pick=pick, rows=20)
        np.testing.assert_array_equal(few.selected, many.rank <= 20)
        assert (few.selected != chosen(features, rows=20).selected).any()


def test_mmr_sees_what_is_picked_and_not_every_better_row():
    features = clustered_features(300, num_clusters=6)
    strong = Weights(1, 0, 3)
    by_score = chosen(features, 300, weights=strong, rows=60)
    greedy = chosen(features, 300, weights=strong, rows=60, pick="mmr")
    np.testing.assert_array_equal(greedy.score, by_score.score)
    assert greedy.gradient[greedy.selected].mean() > by_score.gradient[by_score.selected].mean()
    without = chosen(features, 300, weights=Weights(1, 0.5, 0), rows=60)
    same = chosen(features, 300, weights=Weights(1, 0.5, 0), rows=60, pick="mmr")
    np.testing.assert_array_equal(same.selected, without.selected)


def test_facility_location_without_coverage_is_topk_and_with_it_covers_more():
    features = clustered_features(300, num_clusters=30)
    unit = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)

    def covered(found):
        return np.maximum(unit @ unit[found.selected].T, 0).max(axis=1).mean()

    by_g = chosen(features, 300, weights=Weights(1, 0, 0), rows=30)
    same = chosen(features, 300, weights=Weights(1, 0, 1), rows=30, pick="facility_location")
    np.testing.assert_array_equal(same.selected, by_g.selected)
    spread = chosen(features, 300, weights=Weights(0, 1, 0), rows=30, pick="facility_location")
    assert covered(spread) > covered(by_g) + 0.05


def test_gumbel_draws_by_score():
    table = score_table(4000)
    options = {"weights": Weights(1, 0, 0), "rows": 400, "table": table}
    by_score = chosen(**options)
    cold = chosen(pick="gumbel", temperature=1e-9, **options)
    np.testing.assert_array_equal(cold.selected, by_score.selected)
    hot = chosen(pick="gumbel", temperature=1e9, **options)
    assert (hot.selected & by_score.selected).sum() == pytest.approx(40, abs=25)
    # At temperature T the odds of a row are exp(score / T).
    warm = chosen(pick="gumbel", temperature=0.5, **options)
    top, bottom = warm.score > 0.75, warm.score <= 0.25
    ratio = warm.selected[top].sum() / warm.selected[bottom].sum()
    assert ratio == pytest.approx(np.exp(0.75 / 0.5), rel=0.5)
    again = chosen(pick="gumbel", temperature=0.5, **options)
    np.testing.assert_array_equal(again.selected, warm.selected)
    assert (chosen(pick="gumbel", temperature=0.5, seed=1, **options).selected != warm.selected).any()


def test_cluster_gives_each_cluster_its_share_and_picks_its_best():
    features = clustered_features(300, num_clusters=4) * np.float16(3)
    features[:7] = np.nan
    found = chosen(features, 300, pick="cluster", clusters=4, rows=61)
    assert found.selected.sum() == 61
    labels = kmeans(unit_rows(features, np.arange(300)), 4, 0)
    assert (labels[:7] == -1).all()
    for label in np.unique(labels):
        inside = labels == label
        assert abs(found.selected[inside].sum() - 61 * inside.mean()) < 1
        if found.selected[inside].any():
            assert found.score[inside & found.selected].min() >= found.score[inside & ~found.selected].max()
    assert chosen(features, 300, pick="cluster", rows=61, criterion="loss").selected.sum() == 61


def test_the_length_matched_control_follows_the_pick_that_it_controls():
    features, lengths = clustered_features(240), score_table(240).column("num_label_tokens").to_numpy()
    greedy = chosen(features, pick="mmr", rows=40, weights=Weights(1, 0, 3))
    control = chosen(
        features, pick="mmr", rows=40, weights=Weights(1, 0, 3), criterion="length_matched_random"
    )
    bins = length_bins(lengths)
    np.testing.assert_array_equal(np.bincount(bins[control.selected]), np.bincount(bins[greedy.selected]))


def test_cluster_without_features_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="selection.pick: cluster compares features") as caught:
        chosen(None, pick="cluster", weights=Weights(1, 0, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pick", ["topk", "mmr", "facility_location", "cluster", "gumbel"])
@pytest.mark.parametrize("n", [1, 2, 11])
@pytest.mark.parametrize("kind", ["plain", "identical", "zero", "nan"])
def test_few_and_odd_rows(pick, n, kind):
    features = clustered_features(n)
    features[:] = {"plain": features, "identical": features[0], "zero": 0, "nan": np.nan}[kind]
    found = chosen(features, n, pick=pick, rows=3)
    assert found.selected.sum() == min(n, 3)
    assert np.isfinite(found.score).all() and sorted(found.rank) == list(range(1, n + 1))


@pytest.mark.parametrize("pick", ["topk", "mmr", "facility_location", "cluster", "gumbel"])
def test_groups_of_fifty_copies(pick):
    features = np.repeat(clustered_features(6, num_clusters=6), 50, axis=0)
    found = chosen(features, 300, pick=pick, rows=30)
    assert found.selected.sum() == 30
    if pick in ("mmr", "facility_location"):
        # The best of each group come first, before any second.
        first = [int(np.argmin(found.rank[start : start + 50])) + start for start in range(0, 300, 50)]
        assert sorted(found.rank[first]) == list(range(1, 7))
    distinct = chosen(features, 300, pick=pick, rows=30, dedup_threshold=0.999)
    assert distinct.selected.sum() == 6
