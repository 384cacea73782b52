"""Shares of the budget: largest remainders, strata and what they do with rows, tokens and gaps."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_tables import TARGETS, clustered_features, score_table

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection.config import SelectionConfig, Weights
from grads_dist.selection.controls import length_bins
from grads_dist.selection.facility import facility_values
from grads_dist.selection.mmr import mmr_values
from grads_dist.selection.quota import Quotas, divide, take_parts
from grads_dist.selection.score import Terms
from grads_dist.selection.select import needed_columns, select
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import knn
from grads_dist.similarity.points import unit_rows

SIMILARITY = SimilarityConfig(device="cpu", library="torch")
NO_GRAPH = Weights(1, 0, 0)

PARTS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=8)


def in_order(total, share, capacity):
    """Largest remainders by exact fractions, those at capacity first."""
    given = [0] * len(share)
    opened = {i for i, c in enumerate(capacity) if c > 0}
    rest = min(total, sum(capacity))
    while True:
        whole = sum(share[i] for i in opened)
        exact = {i: Fraction(rest * share[i], whole) for i in opened}
        full = {i for i in opened if capacity[i] <= exact[i]}
        if not full:
            break
        for i in full:
            given[i] = capacity[i]
        rest -= sum(capacity[i] for i in full)
        opened -= full
    for i in opened:
        given[i] = int(exact[i])
    left = rest - sum(given[i] for i in opened)
    for i in sorted(opened, key=lambda i: (given[i] - exact[i], i))[:left]:
        given[i] += 1
    return given


@settings(max_examples=50, deadline=None)
@given(PARTS, st.integers(0, 200))
def test_shares_are_largest_remainders(parts, total):
    share, capacity = (np.array(x) for x in zip(*parts, strict=True))
    found = divide(np.array([total]), share, capacity)
    assert found.sum() == min(total, capacity.sum()) and (found <= capacity).all()
    exact = in_order(total, share.tolist(), capacity.tolist())
    np.testing.assert_array_equal(found, exact)
    if (capacity > total).all():
        assert (np.abs(found - total * share / share.sum()) < 1).all()


def test_ties_of_remainders_go_to_the_first_however_large_the_numbers_are():
    capacity = np.full(3, 10**12)
    assert divide(np.array([2]), np.array([4, 1, 1]), capacity).tolist() == [2, 0, 0]
    # 10^12 / 3 + 1/3 each; the products are beyond 64 bits.
    share = np.array([10**11, 10**11, 10**11])
    found = divide(np.array([10**12]), share, capacity)
    assert found.tolist() == [333_333_333_334, 333_333_333_333, 333_333_333_333]


@settings(max_examples=30, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.data())
def test_shares_of_several_parents_are_each_one_alone(families, data):
    totals = np.array([data.draw(st.integers(0, 120)) for _ in families])
    alone = [
        divide(np.array([total]), *(np.array(x) for x in zip(*parts, strict=True)))
        for total, parts in zip(totals, families, strict=True)
    ]
    share, capacity = (np.array(x) for x in zip(*sum(families, []), strict=True))
    parent = np.repeat(np.arange(len(families)), [len(parts) for parts in families])
    np.testing.assert_array_equal(divide(totals, share, capacity, parent), np.concatenate(alone))


def stratified(labels, features=None, table=None, **options):
    table = score_table(len(labels)) if table is None else table
    table = table.append_column("kind", pa.array(labels))
    options = {"weights": NO_GRAPH, "stratify_by": "kind"} | options
    return select(table, features, SelectionConfig(**options), SIMILARITY, TARGETS)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_strata_keep_their_shares(n, num_strata, seed, fraction):
    labels = np.random.default_rng(seed).integers(0, num_strata, n)
    found = stratified(labels, fraction=fraction)
    budget = max(1, int(np.floor(fraction * n + 0.5)))
    assert found.selected.sum() == budget
    for label in np.unique(labels):
        inside = labels == label
        assert abs(found.selected[inside].sum() - budget * inside.sum() / n) < 1
        if 0 < found.selected[inside].sum() < inside.sum():
            assert found.score[inside & found.selected].min() >= found.score[inside & ~found.selected].max()


@pytest.mark.parametrize("pick", ["topk", "mmr", "facility_location", "cluster", "gumbel"])
def test_every_pick_keeps_the_shares(pick):
    labels = np.random.default_rng(0).choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    found = stratified(labels, clustered_features(300), weights=Weights(), pick=pick, rows=50)
    assert found.selected.sum() == 50
    for label in "abc":
        inside = labels == label
        assert abs(found.selected[inside].sum() - 50 * inside.mean()) < 1


@pytest.mark.parametrize("pick", ["mmr", "facility_location"])
def test_a_stratum_is_picked_as_if_it_were_alone(pick):
    """But for D and tau, which are of the corpus: without them the strata are corpora of their own."""
    features, rng = clustered_features(120), np.random.default_rng(0)
    features[::9] = features[0]
    gradient, part = rng.random(120), rng.integers(0, 2, 120)
    graph = knn(unit_rows(features), SIMILARITY)

    def values(allowed, part):
        if pick == "facility_location":
            return facility_values(gradient, Weights(), graph, allowed, part)
        return mmr_values(
            Terms(gradient, gradient, gradient, part, 0.3, gradient), Weights(), graph, allowed, part
        )

    both = values(np.ones(120, bool), part)
    for label in (0, 1):
        inside = part == label
        apart = values(inside, part)
        np.testing.assert_array_equal(both[inside], apart[inside])


def test_tokens_are_shared_by_tokens():
    table = score_table(400)
    tokens = table.column("num_tokens").to_numpy()
    labels = np.where(tokens > np.median(tokens), "long", "short")
    found = stratified(labels, table=table, tokens=20000)
    spent = tokens[found.selected].sum()
    assert 20000 - tokens.max() < spent <= 20000
    for label in ("long", "short"):
        share = tokens[labels == label].sum() / tokens.sum()
        assert abs(tokens[found.selected & (labels == label)].sum() - 20000 * share) < 2 * tokens.max()


def test_what_no_part_can_pay_for_goes_to_the_next_rows_the_best_first():
    value = np.array([5.0, 1.0, 4.0, 3.0, 2.0])
    part, cost = np.array([0, 0, 1, 1, 2]), np.array([6, 6, 6, 6, 6])
    # 17 tokens in shares 7, 7, 3: one row each of the first two, 5 left; with 18 the best next row fits.
    few = take_parts(value, np.ones(5, bool), Quotas(part, np.array([7, 7, 3]), cost))
    assert few.tolist() == [True, False, True, False, False]
    more = take_parts(value, np.ones(5, bool), Quotas(part, np.array([7, 7, 4]), cost))
    assert more.tolist() == [True, False, True, True, False]


def test_what_a_stratum_cannot_fill_goes_to_the_others():
    labels = np.repeat(["a", "b", "c"], [100, 60, 40])
    features = clustered_features(200)
    features[:100] = features[0]
    found = stratified(labels, features, rows=50, dedup_threshold=0.9999)
    assert found.selected.sum() == 50
    counts = [found.selected[labels == label].sum() for label in "abc"]
    assert counts[0] == 1 and abs(counts[1] - 49 * 0.6) < 1 and abs(counts[2] - 49 * 0.4) < 1


def test_missing_values_are_a_stratum():
    labels = [None if i % 4 == 0 else ("x" if i % 2 else "y") for i in range(200)]
    found = stratified(labels, rows=40)
    missing = np.array([label is None for label in labels])
    assert found.selected[missing].sum() == 10 and found.selected.sum() == 40


def test_strata_from_outside_the_table():
    table, labels = score_table(120), np.arange(120) % 3
    inside = stratified(labels, table=table, rows=30)
    options = SelectionConfig(weights=NO_GRAPH, stratify_by="language", rows=30)
    outside = select(table, None, options, SIMILARITY, TARGETS, strata=labels)
    np.testing.assert_array_equal(inside.selected, outside.selected)
    names = select(table, None, options, SIMILARITY, TARGETS, strata=np.array(["x", "y", "z"])[labels])
    np.testing.assert_array_equal(names.selected, outside.selected)
    with pytest.raises(ConfigError, match="selection.stratify_by: 'language' is no column"):
        select(table, None, options, SIMILARITY, TARGETS)
    with pytest.raises(DataError, match="7 strata do not belong to a table of 120 rows"):
        select(table, None, options, SIMILARITY, TARGETS, strata=labels[:7])
    assert "language" in needed_columns(options, TARGETS)


def test_the_length_matched_control_of_a_stratified_selection_has_its_lengths():
    table, labels = score_table(600), np.arange(600) % 5
    lengths = table.column("num_label_tokens").to_numpy()
    reference = stratified(labels, table=table, rows=90)
    control = stratified(labels, table=table, rows=90, criterion="length_matched_random")
    bins = length_bins(lengths)
    np.testing.assert_array_equal(np.bincount(bins[control.selected]), np.bincount(bins[reference.selected]))
