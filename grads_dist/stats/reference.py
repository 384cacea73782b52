"""The operations in plain torch, on any device and in any floating type: what every kernel is tested against.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grads_dist.stats.tensors import to_device

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: Sequence[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, sum of squares, minimum and maximum of G_s = B_s^T A_s for every sample, float64 [S] each.

    `total_PD`, if given, gets sum_s weights[s] G_s added. One G_s exists at a time, in one scratch buffer.
    The sum uses its rank-1 form sum_t (sum_j b_tj) (sum_k a_tk).
    """
    lengths = list(lengths)
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
        return (torch.empty(0, dtype=torch.float64, device=b_NP.device),) * 4
    row_products = b_NP.sum(1, dtype=torch.float64) * a_ND.sum(1, dtype=torch.float64)
    total = segment_sum(row_products, to_device(lengths, torch.int64, b_NP.device))
    return total, torch.stack(sumsq), torch.stack(low).double(), torch.stack(high).double()


def gram_sumsq(b_TP: Tensor, a_TD: Tensor) -> Tensor:
    """Sum of squares of B^T A, a float64 scalar, from the Gram matrices of both."""
    dtype = accumulation_dtype(b_TP.dtype)
    b, a = b_TP.to(dtype), a_TD.to(dtype)
    return ((b @ b.t()).double() * (a @ a.t()).double()).sum()


def row_sum_stats(
    b_ND: Tensor,
    x_ND: Tensor | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: Sequence[int],
    norm: int,
    eps: float,
    rows_UD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What native.row_sum_stats computes, in any floating type and on any device."""
    dtype = accumulation_dtype(b_ND.dtype)
    product = b_ND.to(dtype) if x_ND is None else b_ND.to(dtype) * normalised(x_ND, norm, eps).to(dtype)
    if order_N is not None:
        product = product.index_select(0, order_N)
    rows = product
    if len(run_offsets) > 1:
        rows = torch.segment_reduce(product, "sum", lengths=run_offsets.diff(), axis=0, initial=0.0)
    if rows_UD is not None:
        rows_UD.copy_(rows)
    return ragged_row_stats(rows, to_device(sample_runs, torch.int64, b_ND.device))


def ragged_row_stats(rows_UD: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, sum of squares, minimum and maximum over each sample's rows; zeros for a sample without rows."""
    if not len(rows_UD):
        return (torch.zeros(len(counts_S), dtype=torch.float64, device=rows_UD.device),) * 4
    low = torch.segment_reduce(rows_UD.amin(1).double(), "min", lengths=counts_S, initial=torch.inf)
    high = torch.segment_reduce(rows_UD.amax(1).double(), "max", lengths=counts_S, initial=-torch.inf)
    return (
        segment_sum(rows_UD.sum(1, dtype=torch.float64), counts_S),
        segment_sum(row_sumsq(rows_UD), counts_S),
        torch.where(counts_S > 0, low, 0.0),
        torch.where(counts_S > 0, high, 0.0),
    )


def normalised(x: Tensor, norm: int, eps: float) -> Tensor:
    """xhat: formed in float32 or better, returned in the type of `x`. `norm` is RMS_NORM or LAYER_NORM."""
    wide = x.to(accumulation_dtype(x.dtype))
    if norm == LAYER_NORM:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def segment_sum(x_N: Tensor, lengths_S: Tensor) -> Tensor:
    """Sums of consecutive runs [S]; 0 for an empty one."""
    return torch.segment_reduce(x_N, "sum", lengths=lengths_S, initial=0.0)


def row_sumsq(x_RD: Tensor) -> Tensor:
    """Sum of squares of every row, float64 [R]."""
    # Row by row in the accumulation type, then float64: 4e-9 relative on 10^6 elements, where one float32
    # reduction over all of them loses 1e-5, and a float64 reduction takes four times as long.
    return torch.linalg.vector_norm(x_RD, dim=1).double().square()
