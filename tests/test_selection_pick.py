"""Budgets, near-duplicates, copies and controls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_tables import TARGETS, score_table, with_column

from grads_dist.errors import ConfigError
from grads_dist.selection.budget import Budget, resolve_budget, take
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import control_score, gradient_norm, length_bins
from grads_dist.selection.duplicates import candidates
from grads_dist.selection.pick import top_k
from grads_dist.selection.ranks import ranking

# ---- budget


@pytest.mark.parametrize(
    ("options", "num_scored", "expected"),
    [
        ({}, 1000, Budget("rows", 100)),
        ({"fraction": 0.29}, 100, Budget("rows", 29)),
        ({"fraction": 0.1}, 4995, Budget("rows", 500)),
        ({"fraction": 0.1}, 4994, Budget("rows", 499)),
        ({"fraction": 1e-9}, 50, Budget("rows", 1)),
        ({"fraction": 1.0}, 50, Budget("rows", 50)),
        ({"rows": 7}, 50, Budget("rows", 7)),
        ({"tokens": 7}, 50, Budget("tokens", 7)),
        ({"gradient": "zscore"}, 50, Budget("none")),
        ({"gradient": "zscore", "rows": 3}, 50, Budget("rows", 3)),
    ],
)
def test_resolve_budget(options, num_scored, expected):
    assert resolve_budget(SelectionConfig(**options), num_scored) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 40))
def test_tokens_take_the_longest_prefix_that_fits(tokens, limit):
    tokens = np.array(tokens, np.int32)
    order = np.arange(len(tokens))[::-1]
    taken = take(order, tokens, Budget("tokens", limit))
    assert (taken == order[: len(taken)]).all()
    assert tokens[taken].sum() <= limit
    assert len(taken) == len(order) or tokens[order[: len(taken) + 1]].sum() > limit


def test_top_k_is_exact_and_breaks_ties_by_row():
    score = np.array([1.0, 2.0, 2.0, 0.0, 2.0])
    tokens = np.full(5, 10)
    allowed = np.array([True, True, False, True, True])
    assert top_k(score, allowed, tokens, Budget("rows", 1)).nonzero()[0].tolist() == [1]
    assert top_k(score, allowed, tokens, Budget("rows", 3)).nonzero()[0].tolist() == [0, 1, 4]
    assert top_k(score, allowed, tokens, Budget("rows", 9)).nonzero()[0].tolist() == [0, 1, 3, 4]
    assert top_k(score, allowed, tokens, Budget("tokens", 29)).nonzero()[0].tolist() == [1, 4]
    assert top_k(score, allowed, tokens, Budget("none")).nonzero()[0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"fraction": 0}, "selection.fraction: 0 "),
        ({"fraction": 2}, "selection.fraction: 2 "),
        ({"fraction": float("nan")}, "selection.fraction: nan"),
        ({"rows": 0}, "selection.rows: 0"),
        ({"tokens": -1}, "selection.tokens: -1"),
        ({"fraction": 0.1, "rows": 5}, "selection.rows: 5 is not allowed beside selection.fraction"),
        ({"criterion": "best"}, "selection.criterion: 'best'"),
        ({"gradient": "big"}, "selection.gradient: 'big'"),
        ({"signal": "mean"}, "selection.signal: 'mean'"),
        ({"signal": []}, "selection.signal: []"),
        ({"bandwidth": "scott"}, "selection.bandwidth: 'scott'"),
        ({"pick": "best"}, "selection.pick: 'best'"),
        ({"pick": "mmr", "criterion": "loss"}, "selection.pick: mmr weighs the terms"),
        ({"pick": "facility_location", "criterion": "random"}, "selection.pick: facility_location weighs"),
        ({"band": [0.7, 0.2]}, "selection.band: [0.7, 0.2]"),
        ({"band": [0.7]}, "selection.band: [0.7]"),
        ({"zscore": 0}, "selection.zscore: 0"),
        ({"zscore": float("inf")}, "selection.zscore: inf"),
        ({"zscore": float("nan")}, "selection.zscore: nan"),
        ({"dedup_threshold": 1.5}, "selection.dedup_threshold: 1.5"),
        ({"seed": -1}, "selection.seed: -1"),
        ({"seed": 2**63}, "selection.seed: 9223372036854775808"),
        ({"name": "x" * 101}, "selection.name: 'xxx"),
        ({"name": "../x"}, "selection.name: '../x'"),
        ({"name": ""}, "selection.name: ''"),
        ({"name": ".."}, "selection.name: '..'"),
    ],
)
def test_config_refuses(values, start):
    with pytest.raises(ConfigError) as caught:
        SelectionConfig(**values)
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


# ---- copies


def test_candidates_are_finite_and_the_first_of_their_copies():
    table = score_table(8)
    table = with_column(table, "status", ["ok", "nonfinite", "ok", "ok", "ok", "ok", "nonfinite", "ok"])
    table = with_column(table, "token_hash", [7, 5, 5, 7, 7, 5, 9, 1])
    table = with_column(table, "num_tokens", [10, 10, 10, 10, 11, 10, 10, 10])
    found = candidates(table, keep_duplicates=False)
    assert found.rows.tolist() == [0, 2, 4, 7]
    assert found.copies.tolist() == [3, 5] and found.originals.tolist() == [0, 2]
    assert found.num_nonfinite == 2
    kept = candidates(table, keep_duplicates=True)
    assert kept.rows.tolist() == [0, 2, 3, 4, 5, 7] and kept.copies.tolist() == [3, 5]


def test_candidates_come_by_corpus_index_whatever_the_order_of_the_table():
    table = with_column(score_table(60), "token_hash", np.arange(60) % 17)
    table = with_column(table, "num_tokens", np.full(60, 9))
    expected = candidates(table, keep_duplicates=False)
    order = np.random.default_rng(0).permutation(60)
    shuffled = table.take(order)
    found = candidates(shuffled, keep_duplicates=False)
    index = shuffled.column("index").to_numpy()
    assert index[found.rows].tolist() == expected.rows.tolist() == list(range(17))
    assert found.copies.tolist() == expected.copies.tolist() == list(range(17, 60))
    assert found.originals.tolist() == [i % 17 for i in range(17, 60)]


# ---- controls


def test_random_control_is_seeded_and_fair():
    table = score_table(3000)
    one = control_score("random", table, TARGETS, 0, None)
    np.testing.assert_array_equal(one, control_score("random", table, TARGETS, 0, None))
    other = control_score("random", table, TARGETS, 1, None)
    chosen = np.zeros(3000, bool)
    chosen[ranking(one)[:300]] = True
    assert chosen[ranking(other)[:300]].sum() == pytest.approx(30, abs=18)
    assert np.flatnonzero(chosen).mean() == pytest.approx(1500, abs=160)


def test_length_matched_random_repeats_the_lengths_and_not_the_rows():
    table = score_table(4000)
    lengths = table.column("num_label_tokens").to_numpy()
    rng = np.random.default_rng(0)
    reference = rng.random(4000) < lengths / 800
    score = control_score("length_matched_random", table, TARGETS, 0, reference)
    picked = np.zeros(4000, bool)
    picked[ranking(score)[: reference.sum()]] = True
    bins = length_bins(lengths)
    np.testing.assert_array_equal(np.bincount(bins[picked]), np.bincount(bins[reference]))
    picked_quantiles = np.quantile(lengths[picked], [0.1, 0.5, 0.9])
    np.testing.assert_allclose(picked_quantiles, np.quantile(lengths[reference], [0.1, 0.5, 0.9]), atol=8)
    shared = (picked & reference).sum() / reference.sum()
    assert shared == pytest.approx((lengths / 800)[reference].mean(), abs=0.06)


def test_length_bins_are_runs_of_lengths_with_enough_rows():
    lengths = np.random.default_rng(1).integers(1, 300, 5000) ** 2
    bins = length_bins(lengths)
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    for length in np.unique(lengths):
        assert len(set(bins[lengths == length])) == 1
    sizes = np.unique(bins, return_counts=True)[1]
    assert np.median(sizes) >= 45 and sizes.max() < 150


def test_loss_and_grand():
    table = score_table(50)
    assert control_score("loss", table, TARGETS, 0, None).tolist() == table.column("loss").to_pylist()
    squares = [table.column(f"{target}.sumsq").to_numpy() for target in TARGETS]
    np.testing.assert_allclose(gradient_norm(table, TARGETS), np.sqrt(squares[0] + squares[1]), rtol=1e-12)
    tied = score_table(50, targets=["embedding", "lm_head", "tied", "layers.0"])
    expected = tied.column("tied.sumsq").to_numpy() + tied.column("layers.0.sumsq").to_numpy()
    grand = control_score("grand", tied, ["embedding", "lm_head", "tied", "layers.0"], 0, None)
    np.testing.assert_allclose(grand, np.sqrt(expected), rtol=1e-12)
    with pytest.raises(ConfigError, match="selection.criterion: grand needs"):
        control_score("grand", table, [], 0, None)
    with pytest.raises(ConfigError, match="selection.criterion: 'x.sumsq'"):
        control_score("grand", table, ["x"], 0, None)
