"""Which implementation of the operations runs: torch's own (the reference) or a compiled kernel.

The choice is made once for each device and type, and logged with its reason. `GRADS_DIST_BACKEND` forces
one: reference, cpu or cuda; a forced one that cannot run on the device is an error. Types that a kernel does
not take are computed by the reference.

On a GPU the reference is the default, because the CUDA kernels have not been run on one yet; `make gpu-check`
tests them there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from functools import cache

import torch

from grads_dist.errors import ConfigError
from grads_dist.stats import cuda, native
from grads_dist.stats.cuda_driver import unavailable_reason
from grads_dist.stats.cuda_launch import SUFFIXES

log = logging.getLogger(__name__)

VARIABLE = "GRADS_DIST_BACKEND"
NAMES = ("auto", "reference", "cpu", "cuda")

OUTER, ROWS, HEAD = "outer products of gradients", "sums of rows of gradients", "softmax of the LM head"
"""The operations. The head's type is that of its logits in the loss: float32 or float64."""


def backend_for(device: torch.device, dtype: torch.dtype, operation: str = OUTER) -> str:
    """The backend of an operation for tensors of a type on a device: "reference", "cpu" or "cuda".

    Raises ConfigError when `GRADS_DIST_BACKEND` names none, or one that cannot run on the device.
    """
    return _choose(device, dtype, operation, os.environ.get(VARIABLE, "auto"))


@cache
def _choose(device: torch.device, dtype: torch.dtype, operation: str, forced: str) -> str:
    if forced not in NAMES:
        raise ConfigError(f"{VARIABLE}: {forced!r} is not known; allowed: {', '.join(NAMES)}")
    what = f"{operation} on {device.type} in {str(dtype).removeprefix('torch.')}"
    if forced == "reference":
        log.info("%s: reference, as %s says", what, VARIABLE)
        return "reference"
    kernels = forced if forced != "auto" else ("cuda" if device.type == "cuda" else "cpu")
    obstacle = _device_obstacle(kernels, device)
    if obstacle is not None and forced != "auto":
        raise ConfigError(f"{VARIABLE}: {forced!r} cannot run: {obstacle}")
    if obstacle is None and forced == "auto" and kernels == "cuda":
        obstacle = f"the CUDA kernels are not tried on GPUs yet ({VARIABLE}=cuda uses them)"
    types = _types(kernels, operation)
    if obstacle is None and dtype not in types:
        obstacle = f"the {kernels} kernels {f'do not take {dtype}' if types else 'have none of it'}"
    if obstacle is not None:
        log.info("%s: reference, because %s", what, obstacle)
        return "reference"
    log.info("%s: %s kernels%s", what, kernels, f" ({native.variants()[0]})" if kernels == "cpu" else "")
    return kernels


def _device_obstacle(kernels: str, device: torch.device) -> str | None:
    """Why the kernels cannot run on the device, or None."""
    if kernels == "cuda":
        return unavailable_reason(device)
    if device.type != "cpu":
        return f"the CPU kernels do not run on {device.type}"
    if not native.variants():
        return "the package was installed without compiled kernels (no C++ compiler)"
    return None


def _types(kernels: str, operation: str) -> Collection[torch.dtype]:
    if operation == HEAD:
        return () if kernels == "cpu" else (torch.float32,)
    if kernels == "cpu":
        return native.TYPES
    return cuda.TYPES if operation == OUTER else SUFFIXES
