"""Statistics of gradients that are sums of rows, by CUDA kernels (kernels/cuda/rows.cu).

Every function queues its work on the current stream and returns without waiting for it.

Shape legend: S samples, N packed rows, U runs (sums of rows), D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats import cuda_launch
from grads_dist.stats.cuda_launch import (
    SUFFIXES,
    Results,
    address,
    empty_partials,
    fours_aligned,
    offsets_tensor,
)
from grads_dist.stats.cuda_params import RowRunsParams, RowSumsParams, VectorSumsParams
from grads_dist.stats.reference import LAYER_NORM
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.tensors import rows_contiguous

VECTOR_COLS, VECTOR_THREADS, RUN_THREADS = 128, 256, 128
"""kSumCols, kSumThreads and kRunThreads of rows.cu."""


def row_sum_stats(
    b_ND: Tensor,
    x_ND: Tensor | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: Sequence[int],
    norm: int,
    eps: float,
    rows_UD: Tensor | None = None,
) -> Statistics:
    """Statistics over the elements of each sample's sums of rows; zeros for a sample without runs.

    Args:
        b_ND: float32, bfloat16 or float16.
        x_ND: like `b_ND`; where given, rows of b are multiplied with those of x normalised, in x's type.
        order_N: int64; the rows in the order of the runs, None for their own.
        run_offsets: int64 [U + 1] on the device; where each run begins in that order.
        sample_runs: how many runs each sample has.
        norm, eps: of x; reference.RMS_NORM or LAYER_NORM.
        rows_UD: float32; gets the sums themselves.
    """
    rstd, mean = (None, None) if x_ND is None else row_moments(x_ND, norm, eps)
    if order_N is None and rows_UD is None and all(runs == 1 for runs in sample_runs):
        return _vector_stats(b_ND, run_offsets, x_ND, rstd, mean)
    if x_ND is not None and rstd is not None:
        x = (x_ND.float() - (0 if mean is None else mean[:, None])) * rstd[:, None]
        b_ND = b_ND.float() * x.to(x_ND.dtype).float()
    sample_offsets = offsets_tensor(sample_runs, b_ND.device)
    runs = RowRuns(order_N, run_offsets, sample_offsets)
    return _run_results(b_ND, runs, rows_UD, sample_offsets).statistics()


def row_sums(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of every row, float64 [N]; a row's bits depend on the row alone."""
    x = rows_contiguous(x_ND)
    sums, sumsq = torch.empty(2, x.shape[0], dtype=torch.float64, device=x.device)
    params = RowSumsParams(
        x=address(x),
        ld=x.stride(0),
        sum=address(sums),
        sumsq=address(sumsq),
        num_cols=x.shape[1],
        aligned=fours_aligned(x),
    )
    if x.shape[0]:
        kernel = f"row_sums_{SUFFIXES[x.dtype]}"
        cuda_launch.launcher_for(x.device).launch("rows.cu", kernel, params, (x.shape[0], 1), RUN_THREADS)
    return sums, sumsq


def row_moments(x_ND: Tensor, norm: int, eps: float) -> tuple[Tensor, Tensor | None]:
    """1 / sqrt(variance + eps) of every row and, for a layer norm, its mean; float32 [N]."""
    sums, sumsq = row_sums(x_ND)
    mean = sums / x_ND.shape[1] if norm == LAYER_NORM else torch.zeros_like(sums)
    variance = sumsq / x_ND.shape[1] - mean.square()
    rstd = (variance + eps).rsqrt().float()
    return rstd, mean.float() if norm == LAYER_NORM else None


@dataclass(frozen=True)
class RowRuns:
    """Rows ordered so that those of one token id within one sample, a run, are next to each other.

    `order` int64 [N] names the row at each place (None: its own); run u has the places from `starts[u]` to
    `starts[u + 1]` (int64, as many or more than there are runs); sample s has the runs from `run_offsets[s]`
    to `run_offsets[s + 1]` (int64 [S + 1]). Rows of no sample (padding) come last.
    """

    order: Tensor | None
    starts: Tensor
    run_offsets: Tensor


def find_runs(
    ids_N: Tensor, lengths: list[int], num_embeddings: int, padding_idx: int | None = None
) -> RowRuns:
    """Sort the rows by sample and token id; how many runs there are stays on the device."""
    device, num_rows, num_samples = ids_N.device, ids_N.shape[0], len(lengths)
    places = torch.arange(num_rows, device=device)
    sample_N = torch.bucketize(places, offsets_tensor(lengths, device)[1:], right=True)
    keys = sample_N * num_embeddings + ids_N
    if padding_idx is not None:
        keys = torch.where(ids_N == padding_idx, num_samples * num_embeddings, keys)
    keys, order = torch.sort(keys, stable=True)
    begins = torch.ones(num_rows + 1, dtype=torch.int64, device=device)
    begins[1:num_rows] = keys[1:] != keys[:-1]
    runs_before = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(begins[:num_rows], 0, out=runs_before[1:])
    starts = torch.full((num_rows + 1,), num_rows, dtype=torch.int64, device=device)
    starts.scatter_reduce_(0, runs_before[1:] - 1, places, "amin")
    boundaries = torch.arange(num_samples + 1, device=device) * num_embeddings
    return RowRuns(order, starts, runs_before[torch.searchsorted(keys, boundaries)])


def row_run_stats(b_ND: Tensor, runs: RowRuns, out_UD: Tensor | None = None) -> Statistics:
    """Statistics over the summed rows of every sample's runs; the neutral element for one without runs.

    `out_UD` (float32, at least as many rows as there are runs) gets the summed rows in the order of the runs.
    """
    return _run_results(b_ND, runs, out_UD, None).statistics()


def _run_results(
    b_ND: Tensor, runs: RowRuns, out_UD: Tensor | None, sample_offsets: Tensor | None
) -> Results:
    assert out_UD is None or (out_UD.dtype == torch.float32 and out_UD.stride(1) == 1)
    launcher, b = cuda_launch.launcher_for(b_ND.device), rows_contiguous(b_ND)
    num_samples, most_runs = runs.run_offsets.shape[0] - 1, runs.starts.shape[0] - 1
    partials = empty_partials(most_runs, b.device)
    params = RowRunsParams(
        b=address(b),
        ldb=b.stride(0),
        order=address(runs.order),
        starts=address(runs.starts),
        run_offsets=address(runs.run_offsets),
        partials=address(partials),
        out=address(out_UD),
        ld_out=0 if out_UD is None else out_UD.stride(0),
        num_samples=num_samples,
        num_cols=b.shape[1],
        aligned=fours_aligned(b),
        out_aligned=out_UD is not None and fours_aligned(out_UD),
    )
    if most_runs:
        launcher.launch("rows.cu", f"row_run_stats_{SUFFIXES[b.dtype]}", params, (most_runs, 1), RUN_THREADS)
    results = Results(num_samples, b.device)
    results.join(launcher, partials, range(num_samples), ranges=runs.run_offsets, offsets=sample_offsets)
    return results


def embedding_stats(b_ND: Tensor, runs: RowRuns, num_embeddings: int) -> Statistics:
    """Statistics of embedding gradients [V, D]; rows of absent tokens count as zeros."""
    return row_run_stats(b_ND, runs).with_zeros(runs.run_offsets.diff() < num_embeddings)


def vector_stats(
    b_ND: Tensor,
    lengths: Sequence[int],
    x_ND: Tensor | None = None,
    rstd_N: Tensor | None = None,
    mean_N: Tensor | None = None,
) -> Statistics:
    """Statistics of g_s = sum of the sample's rows of b, or of b times (x - mean) * rstd, per sample.

    The gradient of a bias, or of the gain of a norm with input `x`; `rstd` and `mean` are float32, one a row,
    and default to 1 and 0.
    """
    return _vector_stats(b_ND, offsets_tensor(lengths, b_ND.device), x_ND, rstd_N, mean_N)


def _vector_stats(
    b_ND: Tensor, offsets: Tensor, x_ND: Tensor | None, rstd_N: Tensor | None, mean_N: Tensor | None
) -> Statistics:
    assert x_ND is None or x_ND.dtype == b_ND.dtype
    launcher, b = cuda_launch.launcher_for(b_ND.device), rows_contiguous(b_ND)
    x = None if x_ND is None else rows_contiguous(x_ND)
    num_samples, blocks = offsets.shape[0] - 1, -(-b.shape[1] // VECTOR_COLS)
    partials = empty_partials(num_samples * blocks, b.device)
    params = VectorSumsParams(
        b=address(b),
        x=address(x),
        ldb=b.stride(0),
        ldx=0 if x is None else x.stride(0),
        rstd=address(rstd_N),
        mean=address(mean_N),
        offsets=address(offsets),
        partials=address(partials),
        num_cols=b.shape[1],
        blocks_per_sample=blocks,
        aligned=fours_aligned(b) and (x is None or fours_aligned(x)),
    )
    if num_samples:
        kernel = f"vector_stats_{SUFFIXES[b.dtype]}"
        launcher.launch("rows.cu", kernel, params, (num_samples * blocks, 1), VECTOR_THREADS)
    results = Results(num_samples, b.device)
    results.join(launcher, partials, range(num_samples), slots=blocks, offsets=offsets)
    return results.statistics()
