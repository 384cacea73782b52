"""What a rank has done so far: running statistics, shown as a bar on a terminal, else as a line a minute.

The same numbers go to the rank's metrics file, and from rank 0 to the trackers.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from grads_dist.runtime.metrics import Metrics
from grads_dist.runtime.trackers import Trackers

log = logging.getLogger(__name__)

LINE_EVERY = 60.0
"""Seconds between progress lines when there is no terminal."""

METRICS_EVERY = 10.0
"""Least seconds between two records of metrics of a pass, except for the last."""

RESERVOIR = 4096
"""Values kept for the quantiles of the signal."""


@dataclass
class RunningStats:
    """Count, mean and quantiles of a stream, in constant memory (quantiles from a uniform reservoir)."""

    seed: int = 0
    count: int = 0
    total: float = 0.0
    _kept: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def add(self, values: np.ndarray) -> None:
        """Take in more values; non-finite ones are left out."""
        values = values[np.isfinite(values)]
        room = RESERVOIR - len(self._kept)
        self._kept = np.append(self._kept, values[:room])
        late = values[room:] if room > 0 else values
        if len(late):
            # Vitter's algorithm R: the j-th value replaces a random slot with probability R / j.
            positions = self.count + (len(values) - len(late)) + 1 + np.arange(len(late))
            slots = (self._rng.random(len(late)) * positions).astype(np.int64)
            hit = slots < RESERVOIR
            self._kept[slots[hit]] = late[hit]
        self.count += len(values)
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        """Mean of all values; NaN if there are none."""
        return self.total / self.count if self.count else float("nan")

    def quantiles(self, levels: tuple[float, ...] = (0.1, 0.5, 0.9)) -> list[float]:
        """Quantiles of the values kept; NaN if there are none."""
        return np.quantile(self._kept, levels).tolist() if len(self._kept) else [float("nan")] * len(levels)


class _RecentMean:
    """Mean of the finite values since it was last taken."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        self._sum += float(values.sum())
        self._count += len(values)

    def take(self) -> float | None:
        mean = self._sum / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean


class Progress:
    """Progress of one pass on this rank; shown by rank 0, logged by all.

    Args:
        label: what the pass is called.
        total: rows of this rank.
        visible: whether this rank shows anything.
        metrics: where a record goes every `METRICS_EVERY` seconds, and at the end.
        trackers: what is reported to whenever a record is written.
        done: rows of `total` that an earlier start has done; they count, but not in the rates.
    """

    def __init__(
        self,
        label: str,
        total: int,
        visible: bool,
        metrics: Metrics | None = None,
        trackers: Trackers | None = None,
        done: int = 0,
    ) -> None:
        self._label, self._total, self._visible, self._done = label, total, visible, done
        self._metrics, self._trackers = metrics, trackers
        self._loss = _RecentMean()
        self._step: int | None = None
        self.signal = RunningStats()
        self.rows = self.tokens = 0
        """Of this start."""
        self._start = self._last_line = self._last_record = time.monotonic()
        terminal = visible and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit="row", file=sys.stderr) if terminal else None
        )

    def update(
        self,
        rows: int,
        tokens: int,
        signal: np.ndarray | None = None,
        loss: np.ndarray | None = None,
        step: int | None = None,
    ) -> None:
        """Count one micro-batch; `signal` is the mean log gradient norm of its rows, `loss` their losses.

        step: the optimizer step that it belongs to, if there are any.
        """
        self.rows += rows
        self.tokens += tokens
        self._step = self._step if step is None else step
        if signal is not None:
            self.signal.add(signal)
        if loss is not None:
            self._loss.add(loss)
        now = time.monotonic()
        if now - self._last_record > METRICS_EVERY:
            self._last_record = now
            self._write_record()
        if self._bar is not None:
            self._bar.update(rows)
            self._bar.set_postfix_str(f"{self.tokens / self._seconds():.0f} tok/s")
        elif self._visible and now - self._last_line > LINE_EVERY:
            self._last_line = now
            log.info("%s", self.line())

    def close(self) -> None:
        """End the bar, log the totals and write the last record."""
        if self._bar is not None:
            self._bar.close()
        log.info("%s", self.line())
        self._write_record()

    def line(self) -> str:
        """Rows, rates, time left, and the signal so far."""
        seconds = self._seconds()
        text = (
            f"{self._label}: {self._done + self.rows}/{self._total} rows of this rank, "
            f"{self.rows / seconds:.1f} rows/s, {self.tokens / seconds:.0f} tokens/s, "
            f"{self._seconds_left():.0f} s left"
        )
        if self.signal.count:
            low, median, high = self.signal.quantiles()
            text += (
                f"; log gradient norm {self.signal.mean:.2f} (10/50/90 %: {low:.2f} {median:.2f} {high:.2f})"
            )
        return text

    def record(self) -> dict[str, float | int | str | None]:
        """What `line` says and more, as numbers; takes the mean loss, which begins anew."""
        seconds = self._seconds()
        low, median, high = self.signal.quantiles()
        return {
            "label": self._label,
            "step": self._step,
            "rows": self._done + self.rows,
            "total": self._total,
            "tokens": self.tokens,
            "rows_per_s": self.rows / seconds,
            "tokens_per_s": self.tokens / seconds,
            "seconds_left": self._seconds_left(),
            "loss": self._loss.take(),
            "log_grad_norm": self.signal.mean,
            "log_grad_norm_p10": low,
            "log_grad_norm_p50": median,
            "log_grad_norm_p90": high,
        }

    def _write_record(self) -> None:
        record = self.record()
        if self._metrics is not None:
            self._metrics.write(record)
        if self._trackers is not None:
            numbers = {
                f"{self._label}/{name}": float(value)
                for name, value in record.items()
                if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
            }
            step = self._done + self.rows if self._step is None else self._step
            self._trackers.log(numbers, step)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _seconds_left(self) -> float:
        """Seconds that the other rows take at the rate so far; NaN before there is one."""
        left = self._total - self._done - self.rows
        return self._seconds() / self.rows * left if self.rows else math.nan
