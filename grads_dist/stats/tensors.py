"""Tensors as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting: a copy from pageable memory would."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def rows_contiguous(x_ND: Tensor) -> Tensor:
    """`x`, copied where the elements of a row are not next to each other."""
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()
