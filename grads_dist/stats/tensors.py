"""Tensors as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting: a copy from pageable memory would."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host; from a GPU it comes behind the work that is queued there.

    Until it is asked for nobody waits, so that more work can be queued.
    """

    def __init__(self, x: Tensor) -> None:
        self._arrived = None
        if x.device.type != "cuda":
            self._host = x.cpu()
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._arrived = torch.cuda.current_stream(x.device).record_event()

    def numpy(self) -> np.ndarray:
        """Its values; here the host waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()


def rows_contiguous(x_ND: Tensor) -> Tensor:
    """`x`, copied where the elements of a row are not next to each other."""
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()
