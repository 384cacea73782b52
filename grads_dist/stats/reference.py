"""The operations in plain torch, on any device and in any floating type: what every kernel is tested against.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: list[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares, minimum and maximum of G_s = B_s^T A_s for every sample, float64 [S] each.

    `total_PD`, if given, gets sum_s weights[s] G_s added. One G_s exists at a time, in one scratch buffer.
    """
    dtype = accumulation_dtype(b_NP.dtype)
    scratch_PD = torch.empty(b_NP.shape[1], a_ND.shape[1], dtype=dtype, device=b_NP.device)
    sumsq, low, high = [], [], []
    for s, (b, a) in enumerate(zip(b_NP.split(lengths), a_ND.split(lengths), strict=True)):
        torch.mm(b.t().to(dtype), a.to(dtype), out=scratch_PD)
        if total_PD is not None:
            total_PD.add_(scratch_PD, alpha=1.0 if weights is None else weights[s])
        minmax = torch.aminmax(scratch_PD)
        sumsq.append(row_sumsq(scratch_PD).sum())
        low.append(minmax.min)
        high.append(minmax.max)
    if not lengths:
        return (torch.empty(0, dtype=torch.float64, device=b_NP.device),) * 3
    return torch.stack(sumsq), torch.stack(low).double(), torch.stack(high).double()


def row_sumsq(x_RD: Tensor) -> Tensor:
    """Sum of squares of every row, float64 [R]."""
    # Row by row in the accumulation type, then float64: 4e-9 relative on 10^6 elements, where one float32
    # reduction over all of them loses 1e-5, and a float64 reduction takes four times as long.
    return torch.linalg.vector_norm(x_RD, dim=1).double().square()
