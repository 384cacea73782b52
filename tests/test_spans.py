"""Which rows of a sweep are done is read off the names of its shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_dist.probe.plan import frozen_plan
from grads_dist.table.spans import Span, find_spans, gaps, overlapping, span_name


def test_names_and_what_is_found_by_them(tmp_path):
    spans = {Span(0, 0, 16), Span(3, 0, 5), Span(3, 5, 16), Span(1234567, 0, 2048)}
    for span in spans:
        (tmp_path / f"shard-{span_name(span, 'checkpoint1-')}.npy").touch()
        (tmp_path / f"shard-{span_name(span, 'checkpoint1-')}.index.npy").touch()
    (tmp_path / ".tmp-7-shard-checkpoint1-000009-000000-000016.npy").touch()
    (tmp_path / f"shard-{span_name(Span(9, 0, 1))}.npy").touch()
    assert find_spans(tmp_path, "checkpoint1-", ".npy") == spans
    assert find_spans(tmp_path, "", ".npy") == {Span(9, 0, 1)}
    assert find_spans(tmp_path / "gone", "", ".npy") == set()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 50), st.integers(1, 12))
def test_what_is_done_and_what_is_left_are_all_rows_once(data, num_rows, unit_rows):
    done = []
    for unit in range(-(-num_rows // unit_rows)):
        size = min(unit_rows, num_rows - unit * unit_rows)
        cuts = sorted(data.draw(st.sets(st.integers(0, size))) | {0, size})
        pieces = [Span(unit, *piece) for piece in zip(cuts, cuts[1:], strict=False)]
        done += [piece for piece in pieces if data.draw(st.booleans())]
    rows = [
        unit * unit_rows + k for unit, a, b in (*done, *gaps(num_rows, unit_rows, done)) for k in range(a, b)
    ]
    assert sorted(rows) == list(range(num_rows))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 6)), max_size=12))
def test_without_what_overlaps_no_row_is_there_twice_and_the_rest_can_be_planned(drawn):
    spans = {Span(unit, start, start + length) for unit, start, length in drawn}
    kept = spans - overlapping(spans)
    assert not overlapping(kept)
    left = gaps(36, 12, kept)
    rows = [(unit, k) for unit, a, b in (*kept, *left) for k in range(a, b)]
    assert len(rows) == len(set(rows)) == 36
    assert all(any(s.unit == k.unit and s.start < k.stop and k.start < s.stop for k in kept) for s in spans)


@pytest.mark.parametrize(
    "span", [Span(0, 0, 9), Span(2, 0, 1), Span(1, 0, 3), Span(0, 3, 3), Span(0, 2, 5)], ids=str
)
def test_spans_of_another_plan_are_refused(span):
    with pytest.raises(ValueError, match="unit"):
        gaps(10, 8, [Span(0, 0, 4), span])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=60).map(np.array),
    st.integers(1, 9),
    st.integers(1, 90),
    st.integers(1, 90),
    st.data(),
)
def test_a_plan_goes_on_with_other_batches(num_tokens, shard_rows, budget, other_budget, data):
    """What an earlier start has written of each unit, with its own batches, is left out."""
    everything = np.arange(len(num_tokens))
    whole = frozen_plan(num_tokens, everything, shard_rows, budget)
    done, rows_done = [], []
    for group in range(whole.num_groups):
        batches = [whole.batch(k) for k in whole.batches_of(group)]
        count = data.draw(st.integers(0, len(batches)))
        rows = [row for batch in batches[:count] for row in batch.tolist()]
        if rows:
            done.append(Span(group, 0, len(rows)))
            rows_done += rows
    rest = frozen_plan(num_tokens, everything, shard_rows, other_budget, done)
    left = [row for group in range(rest.num_groups) for row in rest.rows_of(group).tolist()]
    assert sorted(rows_done + left) == everything.tolist()
    assert rest.spans is not None
    for (unit, start, stop), group in zip(rest.spans.tolist(), range(rest.num_groups), strict=True):
        assert rest.rows_of(group).tolist() == whole.rows_of(unit)[start:stop].tolist()
