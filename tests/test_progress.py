"""Running statistics of a stream, and the line that shows them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest

from grads_dist.probe import progress
from grads_dist.probe.progress import Progress, RunningStats
from grads_dist.runtime.metrics import Metrics, read_metrics
from grads_dist.runtime.trackers import Trackers


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


class Clock:
    """Time that moves when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Seen:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, float], int]] = []

    def log(self, record, step):
        self.got.append((dict(record), step))

    def close(self):
        pass


def test_a_record_every_ten_seconds_and_at_the_end(tmp_path: Path, clock):
    metrics = Metrics(tmp_path, 0, append=False)
    shown = Progress("probe", 100, visible=False, metrics=metrics)
    for _ in range(25):
        clock.now += 1
        shown.update(1, 10)
    records = read_metrics(metrics.path)
    assert [record["rows"] for record in records] == [11, 22]
    shown.close()
    metrics.close()
    last = read_metrics(metrics.path)[-1]
    assert (last["label"], last["rows"], last["total"], last["tokens"]) == ("probe", 25, 100, 250)
    assert (last["rows_per_s"], last["tokens_per_s"], last["seconds_left"]) == (1, 10, 75)


def test_a_record_has_loss_since_the_last_signal_so_far_and_step(clock):
    shown = Progress("probe", 10, visible=False)
    shown.update(2, 10, np.array([1.0, 2.0]), np.array([3.0, np.nan]), step=4)
    shown.update(1, 10, np.array([6.0]), np.array([5.0]), step=5)
    first = shown.record()
    assert (first["loss"], first["step"]) == (4.0, 5)
    assert (first["log_grad_norm"], first["log_grad_norm_p50"]) == (3.0, 2.0)
    assert first["log_grad_norm_p10"] < 2 < first["log_grad_norm_p90"]
    shown.update(1, 10, np.array([7.0]), np.array([1.0]))
    second = shown.record()
    assert (second["loss"], second["log_grad_norm"], second["step"]) == (1.0, 4.0, 5)
    assert shown.record()["loss"] is None


def test_a_pass_without_loss_or_rows_has_nulls(tmp_path: Path, clock):
    metrics = Metrics(tmp_path, 3, append=False)
    Progress("features", 0, visible=False, metrics=metrics).close()
    metrics.close()
    (record,) = read_metrics(metrics.path)
    nulls = {name for name, value in record.items() if value is None}
    signal = {"log_grad_norm", "log_grad_norm_p10", "log_grad_norm_p50", "log_grad_norm_p90"}
    assert nulls == {"step", "loss", "seconds_left", *signal}
    assert record["rank"] == 3


def test_rows_of_an_earlier_start_count_but_not_in_the_rates(clock):
    shown = Progress("probe", 100, visible=False, done=60)
    assert shown.line().startswith("probe: 60/100 rows")
    clock.now += 5
    shown.update(10, 200)
    record = shown.record()
    assert (record["rows"], record["rows_per_s"], record["tokens_per_s"]) == (70, 2, 40)
    assert record["seconds_left"] == 15
    assert "70/100 rows of this rank, 2.0 rows/s, 40 tokens/s, 15 s left" in shown.line()


def test_trackers_get_finite_numbers_under_the_name_of_the_pass(clock):
    seen = Seen()
    shown = Progress("probe", 8, visible=True, trackers=Trackers({"seen": (seen, (OSError,))}), done=2)
    clock.now += 4
    shown.update(2, 10, loss=np.array([1.0, 3.0]))
    shown.close()
    ((record, step),) = seen.got
    assert step == 4  # no optimizer steps: rows
    assert record["probe/loss"] == 2 and record["probe/rows_per_s"] == 0.5
    assert {"probe/label", "probe/step", "probe/log_grad_norm"} & set(record) == set()
    assert all(math.isfinite(value) for value in record.values())
    shown.update(2, 10, step=9)
    shown.close()
    assert seen.got[-1][1] == 9
