"""Where the time of one step goes: torch's profiler, as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from timing import synchronise
from torch.profiler import ProfilerActivity, profile

from grads_dist.runtime.rundir import atomic_write

TOP = 30
WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
)
"""What makes the host wait for the device; one may be counted under two of them."""


def write_profile(path: Path, run: Callable[[], object], device: torch.device) -> None:
    """Profile one call of `run`: its operators by their own time on the device, and how often it waits."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    synchronise(device)
    with profile(activities=activities) as profiler:
        run()
        synchronise(device)
    averages = profiler.key_averages()
    counts = {event.key: event.count for event in averages}
    waits = "\n".join(f"{name}: {counts.get(name, 0)}" for name in WAITS)
    column = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = averages.table(sort_by=column, row_limit=TOP, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        # The last wait for the device is the profile's own.
        temporary.write_text(f"Waits of the host in one step\n{waits}\n\n{table}\n", encoding="utf-8")
