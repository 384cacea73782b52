"""Running statistics of a stream, and the line that shows them."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from grads_dist.probe import progress
from grads_dist.probe.progress import Progress, RunningStats


def stream(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, count)


def fed(values: np.ndarray, piece: int) -> RunningStats:
    stats = RunningStats()
    for start in range(0, len(values), piece):
        stats.add(values[start : start + piece])
    return stats


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_short_streams_are_exact(piece):
    values = stream(1000)
    stats = fed(values, piece)
    assert stats.count == 1000
    assert stats.mean == pytest.approx(values.mean(), rel=1e-12)
    assert stats.quantiles() == pytest.approx(np.quantile(values, [0.1, 0.5, 0.9]).tolist())


@pytest.mark.parametrize("piece", [37, 5000, 100_000])
def test_quantiles_of_long_streams_come_from_a_fair_sample(piece):
    """A quantile level of 4096 uniform draws has a standard error below 0.008; 5 of them are allowed."""
    values = stream(100_000)
    values.sort()  # early and late values differ, so that an unfair reservoir shows
    stats = fed(values, piece)
    assert stats.mean == pytest.approx(values.mean(), rel=1e-9)
    levels = np.searchsorted(values, stats.quantiles()) / len(values)
    assert np.abs(levels - [0.1, 0.5, 0.9]).max() < 5 * 0.008


def test_memory_stays_bounded():
    stats = fed(stream(20_000), 100)
    assert len(stats._kept) == progress.RESERVOIR


def test_nonfinite_values_are_left_out():
    stats = RunningStats()
    stats.add(np.array([1.0, np.nan, np.inf, 3.0, -np.inf]))
    assert (stats.count, stats.mean) == (2, 2.0)


def test_without_values_there_are_no_numbers():
    stats = RunningStats()
    stats.add(np.empty(0))
    assert math.isnan(stats.mean) and all(math.isnan(q) for q in stats.quantiles())


def test_line_has_rows_and_signal():
    shown = Progress("probe", 10, visible=True)
    assert shown.line().startswith("probe: 0/10 rows")
    shown.update(4, 100, np.array([1.0, 2.0, 3.0, 2.0]))
    line = shown.line()
    assert line.startswith("probe: 4/10 rows") and "s left" in line
    assert "log gradient norm 2.00" in line
    assert (shown.rows, shown.tokens) == (4, 100)


def test_a_line_a_minute_on_the_main_rank_only(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    with caplog.at_level(logging.INFO, logger="grads_dist"):
        Progress("quiet", 10, visible=False).update(1, 5)
        Progress("shown", 10, visible=True).update(1, 5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["shown"]


def test_no_line_before_the_minute_is_over(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY", 1e9)
    with caplog.at_level(logging.INFO, logger="grads_dist"):
        shown = Progress("probe", 10, visible=True)
        shown.update(1, 5)
        assert not caplog.records
        shown.close()
    assert caplog.records[-1].getMessage().startswith("probe: 1/10")
