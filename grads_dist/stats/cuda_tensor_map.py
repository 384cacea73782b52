"""Tensor maps: what the copy engine of sm_90 needs to know of a matrix, encoded by the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from grads_dist.stats.cuda_params import TENSOR_MAP_BYTES

BOX_COLS = 64
"""Columns of one copy: 128 bytes, the span of the swizzle."""
ALIGNMENT = 64
"""Bytes that the driver wants a map to be aligned to."""
# CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion of cuda.h.
TYPES = {torch.float16: 6, torch.bfloat16: 9}
SWIZZLE_128B, PROMOTE_TO_256B = 3, 3


def encode_tensor_map(call: Callable[..., object], x_NC: Tensor, box_rows: int) -> bytes:
    """A map of `x` for copies of `box_rows` rows of 64 columns, swizzled by 128 bytes, zeros outside.

    Args:
        call: cuTensorMapEncodeTiled; raises where that fails.
        x_NC: float16 or bfloat16, not empty; rows on 16-byte boundaries that do not overlap.
        box_rows: 256 at most.
    """
    buffer = ctypes.create_string_buffer(TENSOR_MAP_BYTES + ALIGNMENT)
    offset = -ctypes.addressof(buffer) % ALIGNMENT
    rows, cols = x_NC.shape
    call(
        ctypes.byref(buffer, offset),
        TYPES[x_NC.dtype],
        2,
        ctypes.c_void_p(x_NC.data_ptr()),
        (ctypes.c_uint64 * 2)(cols, rows),
        (ctypes.c_uint64 * 1)(x_NC.stride(0) * x_NC.itemsize),
        (ctypes.c_uint32 * 2)(BOX_COLS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        SWIZZLE_128B,
        PROMOTE_TO_256B,
        0,
    )
    return buffer.raw[offset : offset + TENSOR_MAP_BYTES]
