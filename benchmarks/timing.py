"""Timing in turns, so that what slows the machine slows all that is compared alike; and peak memory."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def time_in_turns(
    steps: Mapping[str, Callable[[T], object]],
    batches: Sequence[T],
    seed: int,
    device: torch.device,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, np.ndarray]:
    """Seconds of every step on every batch [len(batches)]; on each batch all run, in an order drawn anew.

    before: called with a step's name before each time that it runs, and not timed.
    """
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    for batch in batches:
        rng.shuffle(names)
        for name in names:
            before(name)
            synchronise(device)
            start = time.perf_counter()
            steps[name](batch)
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def synchronise(device: torch.device) -> None:
    """Wait for the device's work; a CPU has none outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """How paired ratios are distributed over the batches."""

    median: float
    p25: float
    p75: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: np.ndarray, base: np.ndarray) -> Spread:
        """Of seconds over the base's seconds on the same batches."""
        low, p25, median, p75, high = np.quantile(seconds / base, [0, 0.25, 0.5, 0.75, 1]).tolist()
        return cls(median, p25, p75, low, high)


class PeakMemory:
    """Peak memory of this process since it was made, in MiB: of the GPU if `device` is one, else resident.

    Read from VmHWM, because ru_maxrss of a started process begins at the peak of the process that started it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0 if device.type == "cuda" else _status_mib("VmRSS")

    def mib(self) -> float:
        """The peak so far, above what was there at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return _status_mib("VmHWM") - self._before


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
