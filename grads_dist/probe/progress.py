"""What a rank has done so far: running statistics, shown as a bar on a terminal, else as a line a minute."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY = 60.0
"""Seconds between progress lines when there is no terminal."""

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


class Progress:
    """Progress of one pass on this rank; shown by rank 0, logged by all.

    Args:
        label: what the pass is called.
        total: rows of this rank.
        visible: whether this rank shows anything.
    """

    def __init__(self, label: str, total: int, visible: bool) -> None:
        self._label, self._total, self._visible = label, total, visible
        self.signal = RunningStats()
        self.rows = self.tokens = 0
        self._start = self._last_line = time.monotonic()
        terminal = visible and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit="row", file=sys.stderr) if terminal else None

    def update(self, rows: int, tokens: int, signal: np.ndarray | None = None) -> None:
        """Count one micro-batch; `signal` is the mean log gradient norm of its rows."""
        self.rows += rows
        self.tokens += tokens
        if signal is not None:
            self.signal.add(signal)
        if self._bar is not None:
            self._bar.update(rows)
            self._bar.set_postfix_str(f"{self.tokens / self._seconds():.0f} tok/s")
        elif self._visible and time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            log.info("%s", self.line())

    def close(self) -> None:
        """End the bar and log the totals."""
        if self._bar is not None:
            self._bar.close()
        log.info("%s", self.line())

    def line(self) -> str:
        """Rows, rates, time left, and the signal so far."""
        seconds = self._seconds()
        left = seconds / self.rows * (self._total - self.rows) if self.rows else float("nan")
        text = (
            f"{self._label}: {self.rows}/{self._total} rows of this rank, {self.rows / seconds:.1f} rows/s, "
            f"{self.tokens / seconds:.0f} tokens/s, {left:.0f} s left"
        )
        if self.signal.count:
            low, median, high = self.signal.quantiles()
            text += (
                f"; log gradient norm {self.signal.mean:.2f} (10/50/90 %: {low:.2f} {median:.2f} {high:.2f})"
            )
        return text

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)
