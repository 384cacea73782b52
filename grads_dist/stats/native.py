"""The compiled CPU kernels, called through their C interface (kernels/cpu/api.h)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ABI = 1
"""GD_ABI of api.h: a library of another number has other structures."""

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types that the kernels read as they are, with their numbers in api.h."""

WORK_OF_A_THREAD = 1_000_000
"""Multiplications that take about as long as it takes to start a thread on them: 20 microseconds."""
WORK_OF_AN_ELEMENT = 16
"""What summing an element costs, which is bound by memory, in such multiplications."""


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
        ("sum", ctypes.c_void_p),
        ("sumsq", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("ld_total", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class _RowSums(ctypes.Structure):
    """gd_row_sums of api.h."""

    _fields_ = [
        ("b", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("ldb", ctypes.c_int64),
        ("ldx", ctypes.c_int64),
        ("num_cols", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("run_offsets", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("sample_runs", ctypes.c_void_p),
        ("num_samples", ctypes.c_int64),
        ("sum", ctypes.c_void_p),
        ("sumsq", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The library that setup.py built beside the package, or None where there is none that fits."""
    folder = Path(__file__).parent.parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_cpu_kernels{suffix}"
        if path.is_file():
            found = ctypes.CDLL(str(path))
            if not hasattr(found, "gd_cpu_abi") or found.gd_cpu_abi() != ABI:
                log.warning("%s was built from other sources and is not used: install grads_dist again", path)
                return None
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
    lengths: Sequence[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, sum of squares, minimum and maximum of G_s = B_s^T A_s for every sample, float64 [S] each.

    Args:
        b_NP, a_ND: float32 or bfloat16 on CPU, both of one type, rows contiguous.
        lengths: rows of every sample.
        total_PD: float32, rows contiguous; gets sum_s weights[s] G_s added.
        weights: one a sample; None for ones.
        variant: which of `variants()`; the best by default.

    Where a sample has a non-finite element its sum of squares is not finite, and its other numbers mean
    nothing.
    """
    assert b_NP.dtype == a_ND.dtype
    if total_PD is not None:
        # The kernel writes there, whatever it is.
        assert total_PD.dtype == torch.float32 and total_PD.shape == (b_NP.shape[1], a_ND.shape[1])
        assert total_PD.stride(1) == 1 or total_PD.shape[1] == 1, "rows of the total are not contiguous"
    offsets = _offsets(lengths)
    found = _Results(len(lengths))
    factors = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    query = _OuterProduct(
        b=b_NP.data_ptr(),
        a=a_ND.data_ptr(),
        ldb=b_NP.stride(0),
        lda=a_ND.stride(0),
        num_b_cols=b_NP.shape[1],
        num_a_cols=a_ND.shape[1],
        offsets=offsets.data_ptr(),
        num_samples=len(lengths),
        **found.pointers(),
        total=_pointer(total_PD),
        ld_total=0 if total_PD is None else total_PD.stride(0),
        weights=_pointer(factors),
        type=TYPES[b_NP.dtype],
        num_threads=_num_threads(b_NP.numel() * a_ND.shape[1]),
    )
    _call("gd_cpu_outer_product_stats", variant, query)
    return found.tensors()


def row_sum_stats(
    b_ND: Tensor,
    x_ND: Tensor | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: Sequence[int],
    norm: int,
    eps: float,
    rows_UD: Tensor | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, sum of squares, minimum and maximum over the elements of each sample's sums of rows, float64 [S].

    Args:
        b_ND: float32 or bfloat16 on CPU, rows contiguous.
        x_ND: like `b_ND`; where given, rows of b are multiplied with those of x normalised, in the type of x.
        order_N: int64; the rows in the order of the runs, None for their own.
        run_offsets: int64 [U + 1]; where each run begins in that order.
        sample_runs: how many runs each sample has.
        norm, eps: 1 for an RMS norm of x, 2 for a layer norm.
        rows_UD: float32; gets the sums themselves.
        variant: which of `variants()`; the best by default.

    Samples without runs have zeros. What is not finite is as in `outer_product_stats`.
    """
    assert x_ND is None or x_ND.dtype == b_ND.dtype
    sample_offsets = _offsets(sample_runs)
    found = _Results(len(sample_runs))
    query = _RowSums(
        b=b_ND.data_ptr(),
        x=_pointer(x_ND),
        ldb=b_ND.stride(0),
        ldx=0 if x_ND is None else x_ND.stride(0),
        num_cols=b_ND.shape[1],
        order=_pointer(order_N),
        run_offsets=run_offsets.data_ptr(),
        num_runs=len(run_offsets) - 1,
        sample_runs=sample_offsets.data_ptr(),
        num_samples=len(sample_runs),
        **found.pointers(),
        rows=_pointer(rows_UD),
        eps=eps,
        norm=norm,
        type=TYPES[b_ND.dtype],
        num_threads=_num_threads(WORK_OF_AN_ELEMENT * b_ND.numel()),
    )
    _call("gd_cpu_row_sum_stats", variant, query)
    return found.tensors()


class _Results:
    """Where a kernel writes four numbers a sample."""

    def __init__(self, num_samples: int) -> None:
        self.sum, self.sumsq = (torch.empty(num_samples, dtype=torch.float64) for _ in range(2))
        self.low, self.high = torch.empty(num_samples), torch.empty(num_samples)

    def pointers(self) -> dict[str, int]:
        return {name: getattr(self, name).data_ptr() for name in ("sum", "sumsq", "low", "high")}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.sum, self.sumsq, self.low.double(), self.high.double()


def _num_threads(work: int) -> int:
    """As many as torch uses, where each has enough to do to be worth waking."""
    return max(1, min(torch.get_num_threads(), work // WORK_OF_A_THREAD))


def _offsets(lengths: Sequence[int]) -> Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return offsets


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _call(function: str, variant: str | None, query: ctypes.Structure) -> None:
    found = library()
    assert found is not None
    status = getattr(found, function)((variant or variants()[0]).encode(), ctypes.byref(query))
    if status == 1:
        raise MemoryError("no memory for the CPU kernels' buffers")
    assert status == 0, f"{function}: status {status}"
