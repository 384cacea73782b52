"""The operations whose results are per-sample gradient statistics: the one interface to the kernels.

Everything else in the package calls these functions and nothing below them. Which implementation runs is
decided in backend.py.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight, V vocabulary, U distinct
(sample, token) pairs. Types: results are float64; products are formed in `accumulation_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats import native, reference
from grads_dist.stats.backend import backend_for
from grads_dist.stats.reference import accumulation_dtype, row_sumsq
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics


@dataclass
class BatchGradient:
    """Where the weighted sum of the samples' gradients goes, from the products formed for the statistics.

    `total` [P, D] gets sum_s weights[s] G_s added; `weights` has one number a sample, None for ones. `done`
    says that it has been.
    """

    total: Tensor
    weights: tuple[float, ...] | None = None
    done: bool = False


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

    The sum uses its rank-1 form sum_t (sum_j b_tj) (sum_k a_tk).
    """
    if b_NP.dtype != a_ND.dtype:
        dtype = torch.promote_types(b_NP.dtype, a_ND.dtype)
        b_NP, a_ND = b_NP.to(dtype), a_ND.to(dtype)
    total, weights = None, None
    if batch_gradient is not None:
        total, weights = batch_gradient.total, batch_gradient.weights
        batch_gradient.done = True
    backend = backend_for(b_NP.device, b_NP.dtype)
    sumsq, low, high = _outer_product_stats(b_NP, a_ND, list(segments.lengths), total, weights, backend)
    a_sums_N = a_ND.sum(1, dtype=torch.float64) if a_sums_N is None else a_sums_N
    row_products = b_NP.sum(1, dtype=torch.float64) * a_sums_N
    stats = Statistics(
        sum=_segment_sum(row_products, segments),
        sumsq=sumsq,
        min=low,
        max=high,
        nonfinite=torch.zeros(len(segments), dtype=torch.int64, device=b_NP.device),
    )

    def gradient_of(sample: int) -> Tensor:
        rows = slice(segments.offsets[sample], segments.offsets[sample + 1])
        dtype = accumulation_dtype(b_NP.dtype)
        return b_NP[rows].t().to(dtype) @ a_ND[rows].to(dtype)

    return _in_float64_where_needed(stats, gradient_of)


@torch.library.custom_op("grads_dist::outer_product_stats", mutates_args=("total_PD",))
def _outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: list[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares, minimum and maximum of every sample's B_s^T A_s, float64 [S]."""
    if backend == "reference":
        return reference.outer_product_stats(b_NP, a_ND, lengths, total_PD, weights)
    return native.outer_product_stats(
        _with_whole_rows(b_NP), _with_whole_rows(a_ND), lengths, total_PD, weights
    )


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@_outer_product_stats.register_fake
def _(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: list[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(b_NP.new_empty(len(lengths), dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


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
        sumsq=row_sumsq(g_SD),
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
        sumsq=_segment_sum(row_sumsq(rows_UD), segments),
        min=torch.segment_reduce(rows_UD.amin(1).double(), "min", lengths=lengths, initial=torch.inf),
        max=torch.segment_reduce(rows_UD.amax(1).double(), "max", lengths=lengths, initial=-torch.inf),
        nonfinite=torch.zeros(len(segments), dtype=torch.int64, device=rows_UD.device),
    )
    offsets = segments.offsets
    return _in_float64_where_needed(stats, lambda sample: rows_UD[offsets[sample] : offsets[sample + 1]])


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
        minmax = torch.aminmax(g)
        stats.min[sample], stats.max[sample] = minmax.min, minmax.max
    return stats
