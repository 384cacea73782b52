"""Which implementation of the operations runs: torch's own (the reference) or a compiled kernel.

The choice is made once for each device and type, and logged with its reason. `GRADS_DIST_BACKEND` forces one:
reference, cpu or cuda; a forced one that cannot run is an error.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from grads_dist.errors import ConfigError
from grads_dist.stats import native

log = logging.getLogger(__name__)

VARIABLE = "GRADS_DIST_BACKEND"
NAMES = ("auto", "reference", "cpu")


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of a type on a device: "reference" or "cpu".

    Raises ConfigError when `GRADS_DIST_BACKEND` names none, or one that cannot run on these.
    """
    return _choose(device.type, dtype, os.environ.get(VARIABLE, "auto"))


@cache
def _choose(device: str, dtype: torch.dtype, forced: str) -> str:
    if forced not in NAMES:
        raise ConfigError(f"{VARIABLE}: {forced!r} is not known; allowed: {', '.join(NAMES)}")
    if forced == "reference":
        log.info("gradient statistics on %s in %s: reference, as %s says", device, dtype, VARIABLE)
        return "reference"
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        log.info("gradient statistics on %s in %s: CPU kernels (%s)", device, dtype, native.variants()[0])
        return "cpu"
    if forced != "auto":
        raise ConfigError(f"{VARIABLE}: {forced!r} cannot run: {obstacle}")
    log.info("gradient statistics on %s in %s: reference, because %s", device, dtype, obstacle)
    return "reference"


def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot run, or None."""
    if device != "cpu":
        return f"there are no kernels for {device} yet"
    if dtype not in native.TYPES:
        return f"the CPU kernels do not read {dtype}"
    if not native.variants():
        return "the package was installed without compiled kernels (no C++ compiler)"
    return None
