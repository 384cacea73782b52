"""What devices can do on paper, for a guess of the time and for what fits into their memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from grads_dist.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One device, which is what one rank has.

    Args:
        name: as the user gives it.
        tflops: dense bfloat16 products, in 10^12 operations a second, by the datasheet.
        tflops_float32: float32 products without TF32, likewise.
        memory: bytes.
        utilisation: smallest and largest share of that rate which a step is assumed to reach.
    """

    name: str
    tflops: float
    tflops_float32: float
    memory: float
    utilisation: tuple[float, float] = (0.15, 0.5)


GIB = 2**30
CPU = "cpu"

# Memory is what the driver reports, which is less than the name says.
_GPUS = (
    Hardware("a100-40", 312, 19.5, 39.6 * GIB),
    Hardware("a100-80", 312, 19.5, 79.3 * GIB),
    Hardware("h100", 989, 67, 79.6 * GIB),
    Hardware("h200", 989, 67, 140.4 * GIB),
    Hardware("b200", 2250, 80, 179.0 * GIB),
    Hardware("l40s", 362, 91.6, 45.0 * GIB),
    Hardware("rtx4090", 165, 82.6, 24.0 * GIB),
)
KNOWN = (*(gpu.name for gpu in _GPUS), CPU)

OPERATIONS_A_CORE = 32 * 2.5e9
"""Two fused multiply-adds of eight float32 a cycle at 2.5 GHz: a core with AVX2."""


def check_hardware(name: str) -> None:
    """Raise ConfigError for a name that is not in the table."""
    if name not in KNOWN:
        raise ConfigError(f"hardware: {name!r} is not known; allowed: {', '.join(KNOWN)}")


def hardware_named(name: str, ranks: int) -> Hardware:
    """The device of this name; `cpu` is this machine, shared by `ranks` ranks."""
    check_hardware(name)
    if name != CPU:
        return next(gpu for gpu in _GPUS if gpu.name == name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tflops = cores * OPERATIONS_A_CORE / 1e12 / ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return Hardware(CPU, tflops, tflops, memory)


def hardware_of_device(device_name: str) -> str:
    """The name in the table of the GPU that calls itself `device_name`; raises ConfigError for others."""
    plain = device_name.lower().replace(" ", "")
    for gpu in _GPUS:
        family, _, size = gpu.name.partition("-")
        if family in plain and size in plain:
            return gpu.name
    raise ConfigError(
        f"hardware: this machine's GPU, {device_name!r}, is not in the table; allowed: --hardware with the "
        f"most similar of {', '.join(KNOWN)}"
    )
