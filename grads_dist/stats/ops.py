"""The operations whose results are per-sample gradient statistics: the one interface that kernels implement.

Everything else in the package calls these functions and nothing below them. The implementation here is pure
torch; it runs on any device and in any floating type, and is what a kernel is tested against.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight, V vocabulary, U distinct
(sample, token) pairs. Types: results are float64; products are formed in `accumulation_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class BatchGradient:
    """Where the weighted sum of the samples' gradients goes, from the products formed for the statistics.

    `total` [P, D] gets sum_s weights[s] G_s added; `weights` has one number a sample.
    """

    total: Tensor
    weights: tuple[float, ...]


def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    segments: Segments,
    batch_gradient: BatchGradient | None = None,
    a_sums_N: Tensor | None = None,
) -> Statistics:
    """Statistics of G_s = B_s^T A_s for every sample s, the gradient of a linear weight [P, D].

    Args:
        b_NP: gradient at the layer's output, packed.
        a_ND: the layer's input, packed.
        segments: rows of each sample; an empty sample has a zero gradient.
        batch_gradient: if given, also gets the samples' gradients added.
        a_sums_N: float64 sums of the rows of `a`, for a caller that uses the same `a` many times.

    One G_s exists at a time, in one scratch buffer. The sum uses its rank-1 form
    sum_t (sum_j b_tj) (sum_k a_tk).
    """
    dtype = accumulation_dtype(b_NP.dtype)
    scratch_PD = torch.empty(b_NP.shape[1], a_ND.shape[1], dtype=dtype, device=b_NP.device)

    def gradient_of(sample: int) -> Tensor:
        rows = slice(segments.offsets[sample], segments.offsets[sample + 1])
        return torch.mm(b_NP[rows].t().to(dtype), a_ND[rows].to(dtype), out=scratch_PD)

    sumsq, low, high = [], [], []
    for sample in range(len(segments)):
        g_PD = gradient_of(sample)
        if batch_gradient is not None:
            batch_gradient.total.add_(g_PD, alpha=batch_gradient.weights[sample])
        minmax = torch.aminmax(g_PD)
        sumsq.append(_row_sumsq(g_PD).sum())
        low.append(minmax.min)
        high.append(minmax.max)
    if not len(segments):
        return Statistics.empty(0, b_NP.device)
    a_sums_N = a_ND.sum(1, dtype=torch.float64) if a_sums_N is None else a_sums_N
    row_products = b_NP.sum(1, dtype=torch.float64) * a_sums_N
    stats = Statistics(
        sum=_segment_sum(row_products, segments),
        sumsq=torch.stack(sumsq),
        min=torch.stack(low).double(),
        max=torch.stack(high).double(),
        nonfinite=torch.zeros(len(segments), dtype=torch.int64, device=b_NP.device),
    )
    return _in_float64_where_needed(stats, gradient_of)


def vector_stats(x_ND: Tensor, segments: Segments) -> Statistics:
    """Statistics of g_s = sum of the sample's rows, the gradient of a bias or of a norm's gain [D]."""
    dtype = accumulation_dtype(x_ND.dtype)
    g_SD = torch.segment_reduce(
        x_ND.to(dtype), "sum", lengths=segments.lengths_tensor(x_ND.device), axis=0, initial=0.0
    )
    return dense_row_stats(g_SD)


def dense_row_stats(g_SD: Tensor) -> Statistics:
    """Statistics of every row of a matrix, each row a whole gradient."""
    stats = Statistics(
        sum=g_SD.sum(1, dtype=torch.float64),
        sumsq=_row_sumsq(g_SD),
        min=g_SD.amin(1).double(),
        max=g_SD.amax(1).double(),
        nonfinite=torch.zeros(g_SD.shape[0], dtype=torch.int64, device=g_SD.device),
    )
    return _in_float64_where_needed(stats, lambda sample: g_SD[sample])


@dataclass(frozen=True)
class EmbeddingRows:
    """The touched rows of S embedding gradients.

    `rows` [U, D] are the summed gradients of distinct (sample, token) pairs in ascending order, `ids` [U]
    their token ids, `segments` how many pairs each sample has.
    """

    rows: Tensor
    ids: Tensor
    segments: Segments


def embedding_rows(
    b_ND: Tensor, ids_N: Tensor, segments: Segments, padding_idx: int | None = None
) -> EmbeddingRows:
    """Sum the output gradients of repeated token ids within each sample.

    Rows of `padding_idx` are left out, as torch.nn.Embedding gives that row no gradient.
    """
    dtype = accumulation_dtype(b_ND.dtype)
    sample_N = segments.sample_of_row(b_ND.device)
    if padding_idx is not None:
        kept = (ids_N != padding_idx).nonzero().squeeze(1)
        b_ND, ids_N, sample_N = b_ND[kept], ids_N[kept], sample_N[kept]
    if ids_N.numel() == 0:
        return EmbeddingRows(b_ND.to(dtype), ids_N, Segments((0,) * len(segments)))
    stride = int(ids_N.max()) + 1
    keys, order = torch.sort(sample_N * stride + ids_N, stable=True)
    unique_keys, counts = torch.unique_consecutive(keys, return_counts=True)
    rows_UD = torch.segment_reduce(b_ND[order].to(dtype), "sum", lengths=counts, axis=0)
    per_sample = torch.bincount(unique_keys // stride, minlength=len(segments))
    return EmbeddingRows(rows_UD, unique_keys % stride, Segments(tuple(per_sample.tolist())))


def embedding_stats(rows: EmbeddingRows, num_embeddings: int) -> Statistics:
    """Statistics of embedding gradients [V, D] from their touched rows; absent rows count as zeros."""
    stats = ragged_row_stats(rows.rows, rows.segments)
    touched = rows.segments.lengths_tensor(rows.rows.device)
    return stats.with_zeros(touched < num_embeddings)


def grouped_stats(present: Statistics, segments: Segments, num_groups: int) -> Statistics:
    """Statistics of the stacked gradients of G groups for each of S samples.

    Args:
        present: statistics of the non-empty (group, sample) segments, in order.
        segments: all G * S segments, those of the first group first; empty ones are zero gradients.
        num_groups: G.
    """
    num_samples = len(segments) // num_groups
    lengths = segments.lengths_tensor(present.sum.device)
    sample_of_segment = torch.arange(num_samples, device=lengths.device).repeat(num_groups)[lengths > 0]

    def fold(values: Tensor, reduce: str, neutral: float) -> Tensor:
        out = torch.full((num_samples,), neutral, dtype=values.dtype, device=values.device)
        return out.scatter_reduce_(0, sample_of_segment, values, reduce)

    stats = Statistics(
        sum=fold(present.sum, "sum", 0.0),
        sumsq=fold(present.sumsq, "sum", 0.0),
        min=fold(present.min, "amin", torch.inf),
        max=fold(present.max, "amax", -torch.inf),
        nonfinite=fold(present.nonfinite, "sum", 0),
    )
    reached = torch.bincount(sample_of_segment, minlength=num_samples)
    return stats.with_zeros(reached < num_groups)


def ragged_row_stats(rows_UD: Tensor, segments: Segments) -> Statistics:
    """Statistics over all elements of each sample's rows; a sample without rows gives the neutral element."""
    if rows_UD.shape[0] == 0:
        return Statistics.empty(len(segments), rows_UD.device)
    lengths = segments.lengths_tensor(rows_UD.device)
    stats = Statistics(
        sum=_segment_sum(rows_UD.sum(1, dtype=torch.float64), segments),
        sumsq=_segment_sum(_row_sumsq(rows_UD), segments),
        min=torch.segment_reduce(rows_UD.amin(1).double(), "min", lengths=lengths, initial=torch.inf),
        max=torch.segment_reduce(rows_UD.amax(1).double(), "max", lengths=lengths, initial=-torch.inf),
        nonfinite=torch.zeros(len(segments), dtype=torch.int64, device=rows_UD.device),
    )
    offsets = segments.offsets
    return _in_float64_where_needed(stats, lambda sample: rows_UD[offsets[sample] : offsets[sample + 1]])


def _row_sumsq(x_RD: Tensor) -> Tensor:
    # Row by row in the accumulation type, then float64: 4e-9 relative on 10^6 elements, where one float32
    # reduction over all of them loses 1e-5, and a float64 reduction takes four times as long.
    return torch.linalg.vector_norm(x_RD, dim=1).double().square()


def _segment_sum(x_N: Tensor, segments: Segments) -> Tensor:
    return torch.segment_reduce(x_N, "sum", lengths=segments.lengths_tensor(x_N.device), initial=0.0)


SMALLEST_FLOAT32 = 1e-15
"""Where the largest element is below this, squares of float32 elements begin to vanish."""


def _in_float64_where_needed(stats: Statistics, gradient_of: Callable[[int], Tensor]) -> Statistics:
    """Repair the samples whose squares float32 does not hold, and count their non-finite elements.

    A sum of squares that is not finite may have overflowed, one of tiny elements underflowed.
    """
    largest = torch.maximum(stats.max, -stats.min)
    suspects = ~stats.sumsq.isfinite() | ((largest > 0) & (largest < SMALLEST_FLOAT32))
    for sample in suspects.nonzero().flatten().tolist():
        g = gradient_of(sample)
        stats.nonfinite[sample] = (~g.isfinite()).sum()
        stats.sumsq[sample] = g.double().square().sum()
    return stats
