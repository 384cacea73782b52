"""The compiled CPU kernels, called through their C interface (kernels/cpu/api.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types that the kernels read as they are, with their numbers in api.h."""


class _OuterProduct(ctypes.Structure):
    """gd_outer_product of api.h."""

    _fields_ = [
        ("b", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("ldb", ctypes.c_int64),
        ("lda", ctypes.c_int64),
        ("num_b_cols", ctypes.c_int64),
        ("num_a_cols", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("num_samples", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("sumsq", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("ld_total", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The library that setup.py built beside the package, or None where there is none."""
    folder = Path(__file__).parent.parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_cpu_kernels{suffix}"
        if path.is_file():
            found = ctypes.CDLL(str(path))
            found.gd_cpu_variants.restype = ctypes.c_char_p
            return found
    return None


def variants() -> tuple[str, ...]:
    """Instruction sets that the library holds and this machine runs, best first; none without a library."""
    found = library()
    return tuple(found.gd_cpu_variants().decode().split()) if found is not None else ()


def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: list[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares, minimum and maximum of G_s = B_s^T A_s for every sample, float64 [S] each.

    Args:
        b_NP, a_ND: float32 or bfloat16 on CPU, both of one type, rows contiguous.
        lengths: rows of every sample.
        total_PD: float32; gets sum_s weights[s] G_s added.
        weights: one a sample; None for ones.
        variant: which of `variants()`; the best by default.

    Where a sample has a non-finite element its sum of squares is not finite, and its other numbers mean
    nothing.
    """
    found = library()
    assert found is not None and b_NP.dtype == a_ND.dtype
    num_samples = len(lengths)
    offsets = torch.zeros(num_samples + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    low, high = torch.empty(num_samples), torch.empty(num_samples)
    sumsq = torch.empty(num_samples, dtype=torch.float64)
    factors = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    query = _OuterProduct(
        b=b_NP.data_ptr(),
        a=a_ND.data_ptr(),
        ldb=b_NP.stride(0),
        lda=a_ND.stride(0),
        num_b_cols=b_NP.shape[1],
        num_a_cols=a_ND.shape[1],
        offsets=offsets.data_ptr(),
        num_samples=num_samples,
        low=low.data_ptr(),
        high=high.data_ptr(),
        sumsq=sumsq.data_ptr(),
        total=None if total_PD is None else total_PD.data_ptr(),
        ld_total=0 if total_PD is None else total_PD.stride(0),
        weights=None if factors is None else factors.data_ptr(),
        type=TYPES[b_NP.dtype],
        num_threads=torch.get_num_threads(),
    )
    status = found.gd_cpu_outer_product_stats((variant or variants()[0]).encode(), ctypes.byref(query))
    if status == 1:
        raise MemoryError("no memory for the CPU kernels' packed panels")
    assert status == 0, f"CPU kernels: status {status}"
    return sumsq, low.double(), high.double()
