"""The plan holds every row once, keeps the budgets, and knows nothing of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.probe.plan import Plan, frozen_plan, share_units, train_plan

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60).map(np.array)


def batches(plan: Plan) -> list[np.ndarray]:
    return [plan.batch(k) for k in range(len(plan.batch_offsets) - 1)]


def plans(num_tokens: np.ndarray, group: int, budget: int) -> list[Plan]:
    everything = np.arange(len(num_tokens))
    return [
        train_plan(num_tokens, group, budget, seed=3),
        frozen_plan(num_tokens, everything, group, budget),
    ]


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(1, 100))
def test_every_row_is_there_once(num_tokens, group, budget):
    for plan in plans(num_tokens, group, budget):
        rows = np.concatenate([plan.rows_of(g) for g in range(plan.num_groups)])
        assert sorted(rows.tolist()) == list(range(len(num_tokens)))
        np.testing.assert_array_equal(np.concatenate(batches(plan)), rows)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(1, 100))
def test_micro_batches_keep_the_budget_or_hold_one_row(num_tokens, group, budget):
    for plan in plans(num_tokens, group, budget):
        for rows in batches(plan):
            assert len(rows) == 1 or len(rows) * num_tokens[rows].max() <= budget


def fewest_batches(sizes: list[int], budget: int) -> int:
    """How many micro-batches rows of descending size need: each takes the next rows while they fit."""
    count = 0
    while sizes:
        sizes = sizes[max(1, budget // sizes[0]) :]
        count += 1
    return count


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(1, 100))
def test_no_more_micro_batches_than_needed(num_tokens, group, budget):
    for plan in plans(num_tokens, group, budget):
        for g in range(plan.num_groups):
            sizes = num_tokens[plan.rows_of(g)].tolist()
            assert sizes == sorted(sizes, reverse=True)
            assert len(plan.batches_of(g)) == fewest_batches(sizes, budget)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(1, 100))
def test_micro_batches_of_a_step_are_as_even_as_their_number_allows(num_tokens, group, budget):
    """With less room than the largest of them takes, the step would need one more."""
    plan = train_plan(num_tokens, group, budget, seed=3)
    for step in range(plan.num_groups):
        members = [plan.batch(k) for k in plan.batches_of(step)]
        # A row alone may be of any length.
        shared = [len(rows) * int(num_tokens[rows].max()) for rows in members if len(rows) > 1]
        if len(members) > 1 and shared:
            largest = max(shared)
            assert fewest_batches(num_tokens[plan.rows_of(step)].tolist(), largest - 1) > len(members)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 20))
def test_steps_have_the_global_batch_and_the_last_what_is_left(num_tokens, global_batch):
    plan = train_plan(num_tokens, global_batch, 64, seed=0)
    sizes = [len(plan.rows_of(step)) for step in range(plan.num_groups)]
    assert sizes[:-1] == [global_batch] * (len(sizes) - 1)
    assert sizes[-1] == len(num_tokens) - global_batch * (len(sizes) - 1) and 0 < sizes[-1] <= global_batch


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 200))
def test_the_rows_of_a_step_do_not_depend_on_the_memory_budget(num_tokens, budget):
    one, other = (train_plan(num_tokens, 8, tokens, seed=1) for tokens in (budget, 1))
    for step in range(one.num_groups):
        assert one.rows_of(step).tolist() == other.rows_of(step).tolist()


def test_seed_and_epoch_decide_the_order():
    num_tokens = np.full(50, 4)
    orders = [
        train_plan(num_tokens, 8, 64, seed, epoch).order.tolist() for seed, epoch in [(0, 0), (1, 0), (0, 1)]
    ]
    assert orders[0] == train_plan(num_tokens, 8, 64, 0, 0).order.tolist()
    assert len(set(map(tuple, orders))) == 3
    assert orders[0] != sorted(orders[0])


def test_rows_longer_than_the_budget_are_alone():
    num_tokens = np.array([50, 3, 60, 3])
    for plan in plans(num_tokens, 4, 20):
        assert [rows.tolist() for rows in batches(plan)][:2] == [[2], [0]]


def test_frozen_plan_takes_only_the_rows_it_is_given():
    rows = np.array([1, 4, 5])
    plan = frozen_plan(np.array([9, 2, 9, 9, 7, 3]), rows, shard_rows=2, batch_tokens=100)
    assert [plan.rows_of(unit).tolist() for unit in range(plan.num_groups)] == [[4, 5], [1]]


def test_an_empty_frozen_plan_has_no_units():
    plan = frozen_plan(np.array([3, 4]), np.array([], dtype=np.int64), shard_rows=2, batch_tokens=100)
    assert plan.num_groups == 0 and batches(plan) == []
    assert share_units(plan, np.array([3, 4]), 3) == [[], [], []]


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 6))
def test_each_unit_goes_to_one_rank(num_tokens, shard_rows, world_size):
    plan = frozen_plan(num_tokens, np.arange(len(num_tokens)), shard_rows, 64)
    shares = share_units(plan, num_tokens, world_size)
    assert len(shares) == world_size
    assert sorted(unit for share in shares for unit in share) == list(range(plan.num_groups))
    assert all(share == sorted(share) for share in shares)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(2, 4))
def test_no_rank_has_more_than_one_unit_above_the_least(num_tokens, shard_rows, world_size):
    plan = frozen_plan(num_tokens, np.arange(len(num_tokens)), shard_rows, 64)
    tokens = [int(num_tokens[plan.rows_of(unit)].sum()) for unit in range(plan.num_groups)]
    loads = [sum(tokens[u] for u in share) for share in share_units(plan, num_tokens, world_size)]
    assert max(loads) - min(loads) <= max(tokens)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_of_a_rank_add_up(world_size):
    num_tokens = np.random.default_rng(0).integers(2, 40, 50)
    plan = train_plan(num_tokens, 8, 64, seed=0)
    steps = range(1, plan.num_groups)
    counts = [plan.rows_of_rank(steps, rank, world_size) for rank in range(world_size)]
    assert sum(counts) == 42
