"""The operations whose results are per-sample gradient statistics: the one interface to the kernels.

Everything else in the package calls these functions and nothing below them. Which implementation runs is
decided in backend.py.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight, V vocabulary, U distinct
(sample, token) pairs. Types: results are float64; products are formed in `accumulation_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from grads_dist.stats import operators, reference
from grads_dist.stats.backend import ROWS, backend_for
from grads_dist.stats.reference import accumulation_dtype, row_sumsq
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.tensors import to_device


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
    b_NP: Tensor, a_ND: Tensor, segments: Segments, batch_gradient: BatchGradient | None = None
) -> Statistics:
    """Statistics of G_s = B_s^T A_s for every sample s, the gradient of a linear weight [P, D].

    Args:
        b_NP: gradient at the layer's output, packed.
        a_ND: the layer's input, packed.
        segments: rows of each sample; an empty sample has a zero gradient.
        batch_gradient: if given, also gets the samples' gradients added.
    """
    b_NP, a_ND = _of_one_type(b_NP, a_ND)
    total, weights = None, None
    if batch_gradient is not None:
        total, weights = batch_gradient.total, batch_gradient.weights
        batch_gradient.done = True
    backend = backend_for(b_NP.device, b_NP.dtype)
    found = operators.outer_product_stats(b_NP, a_ND, list(segments.lengths), total, weights, backend)
    if backend == "cuda":
        return Statistics(*found)
    return _checked(found, _gradient_of(b_NP, a_ND, segments))


def outer_product_moments(b_NP: Tensor, a_ND: Tensor, segments: Segments) -> Statistics:
    """Sum and sum of squares of G_s = B_s^T A_s; minimum and maximum are NaN.

    The squares of a short sample are sum_ts (b_t . b_s) (a_t . a_s), which costs T^2 (P + D) for T rows where
    the product costs T P D; a longer sample's product is formed.
    """
    b_NP, a_ND = _of_one_type(b_NP, a_ND)
    size = b_NP.shape[1] * a_ND.shape[1] / (b_NP.shape[1] + a_ND.shape[1])
    long = [s for s, length in enumerate(segments.lengths) if length > size]
    sumsq = torch.zeros(len(segments), dtype=torch.float64, device=b_NP.device)
    parts = list(zip(b_NP.split(list(segments.lengths)), a_ND.split(list(segments.lengths)), strict=True))
    for s, (b, a) in enumerate(parts):
        if segments.lengths[s] <= size:
            sumsq[s] = reference.gram_sumsq(b, a)
    if long:
        rows = [torch.cat(of) for of in zip(*(parts[s] for s in long), strict=True)]
        lengths = tuple(segments.lengths[s] for s in long)
        sumsq[long] = outer_product_stats(rows[0], rows[1], Segments(lengths)).sumsq
    row_products = b_NP.sum(1, dtype=torch.float64) * a_ND.sum(1, dtype=torch.float64)
    unknown = torch.full_like(sumsq, torch.nan)
    found = (segments.reduce(row_products, "sum"), sumsq, unknown, unknown.clone())
    return _checked(found, _gradient_of(b_NP, a_ND, segments))


def _gradient_of(b_NP: Tensor, a_ND: Tensor, segments: Segments) -> Callable[[int], Tensor]:
    """From a sample to its gradient."""

    def gradient_of(sample: int) -> Tensor:
        rows = slice(segments.offsets[sample], segments.offsets[sample + 1])
        dtype = accumulation_dtype(b_NP.dtype)
        return b_NP[rows].t().to(dtype) @ a_ND[rows].to(dtype)

    return gradient_of


@dataclass(frozen=True)
class Normalised:
    """The input of a norm, and which norm: "rms" or "layer"."""

    x_ND: Tensor
    kind: str
    eps: float

    @property
    def number(self) -> int:
        """The kind as the kernels know it."""
        return {"rms": reference.RMS_NORM, "layer": reference.LAYER_NORM}[self.kind]

    def __call__(self) -> Tensor:
        """xhat [N, D], in the type of x."""
        return reference.normalised(self.x_ND, self.number, self.eps)


def vector_stats(x_ND: Tensor, segments: Segments, normalised: Normalised | None = None) -> Statistics:
    """Statistics of g_s = sum of the sample's rows [D], the gradient of a bias; times xhat, of a norm's gain.

    Args:
        x_ND: gradient at the layer's output, packed.
        segments: rows of each sample; an empty sample has a zero gradient.
        normalised: the norm's input, packed likewise.
    """
    run_offsets = segments.offsets_tensor(x_ND.device)
    return _row_sum_stats(x_ND, normalised, None, run_offsets, (1,) * len(segments))


@dataclass(frozen=True)
class Runs:
    """Rows that belong together, those of U distinct (sample, token) pairs.

    Args:
        order_N: the rows in ascending order of (sample, token), without the padding token.
        offsets: where each of the U pairs begins in that order, int64 [U + 1].
        ids: token id of each pair, ascending within a sample.
        segments: how many pairs each sample has.
    """

    order_N: Tensor
    offsets: Tensor
    ids: Tensor
    segments: Segments


@dataclass(frozen=True)
class EmbeddingRows:
    """The touched rows of S embedding gradients: summed gradients of distinct (sample, token) pairs.

    Args:
        b_ND: gradient at the embedding's output, packed.
        ids_N: the token ids, packed likewise.
        tokens: rows of each sample.
        padding_idx: the token whose row gets no gradient, as in torch.nn.Embedding.
    """

    b_ND: Tensor
    ids_N: Tensor
    tokens: Segments
    padding_idx: int | None = None

    @cached_property
    def runs(self) -> Runs:
        """The repeated token ids within each sample; a few times the host waits for how many there are."""
        ids_N, device = self.ids_N, self.b_ND.device
        sample_N = self.tokens.sample_of_row(device)
        positions = torch.arange(len(ids_N), device=device)
        if self.padding_idx is not None:
            positions = (ids_N != self.padding_idx).nonzero().squeeze(1)
        if not len(positions):
            return Runs(positions, positions.new_zeros(1), positions, Segments((0,) * len(self.tokens)))
        stride = int(ids_N.max()) + 1
        keys, order = torch.sort((sample_N * stride + ids_N)[positions], stable=True)
        unique_keys, counts = torch.unique_consecutive(keys, return_counts=True)
        per_sample = torch.bincount(unique_keys // stride, minlength=len(self.tokens))
        return Runs(
            positions[order],
            nn.functional.pad(counts.cumsum(0), (1, 0)),
            unique_keys % stride,
            Segments(tuple(per_sample.tolist())),
        )

    @property
    def ids(self) -> Tensor:
        """Token id of each of the U pairs."""
        return self.runs.ids

    @property
    def segments(self) -> Segments:
        """How many pairs each sample has."""
        return self.runs.segments

    @cached_property
    def rows(self) -> Tensor:
        """The sums [U, D], in the accumulation type."""
        dtype = accumulation_dtype(self.b_ND.dtype)
        ordered = self.b_ND.index_select(0, self.runs.order_N).to(dtype)
        if not len(self.ids):
            return ordered
        return torch.segment_reduce(ordered, "sum", lengths=self.runs.offsets.diff(), unsafe=True)


def embedding_stats(rows: EmbeddingRows, num_embeddings: int) -> Statistics:
    """Statistics of embedding gradients [V, D] from their touched rows; absent rows count as zeros."""
    b_ND, tokens = rows.b_ND, rows.tokens
    if backend_for(b_ND.device, b_ND.dtype, ROWS) == "cuda":
        # How many pairs there are stays on the device.
        lengths, padding = list(tokens.lengths), rows.padding_idx
        found = operators.embedding_stats(b_ND, rows.ids_N, lengths, num_embeddings, padding)
        return Statistics(*found)
    runs = rows.runs
    stats = _row_sum_stats(b_ND, None, runs.order_N, runs.offsets, runs.segments.lengths)
    return stats.with_zeros(runs.segments.lengths_tensor(b_ND.device) < num_embeddings)


def _row_sum_stats(
    b_ND: Tensor,
    normalised: Normalised | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: tuple[int, ...],
) -> Statistics:
    """Statistics over each sample's sums of rows, one sum a run; zeros for a sample without runs."""
    x_ND, norm, eps = None, reference.NO_NORM, 0.0
    if normalised is not None:
        b_ND, x_ND = _of_one_type(b_ND, normalised.x_ND)
        norm, eps = normalised.number, normalised.eps
    backend = backend_for(b_ND.device, b_ND.dtype, ROWS)
    arguments = (b_ND, x_ND, order_N, run_offsets)
    found = operators.row_sum_stats(*arguments, list(sample_runs), norm, eps, backend)
    if backend == "cuda":
        return Statistics(*found)
    samples = Segments(sample_runs)

    def gradient_of(sample: int) -> Tensor:
        own = slice(samples.offsets[sample], samples.offsets[sample + 1] + 1)
        rows = b_ND.new_empty(sample_runs[sample], b_ND.shape[1], dtype=accumulation_dtype(b_ND.dtype))
        begin, end = int(run_offsets[own][0]), int(run_offsets[own][-1])
        picked = torch.arange(begin, end, device=b_ND.device) if order_N is None else order_N[begin:end]
        x = None if x_ND is None else x_ND[picked]
        offsets = run_offsets[own] - begin
        reference.row_sum_stats(b_ND[picked], x, None, offsets, [len(rows)], norm, eps, rows)
        return rows

    return _checked(found, gradient_of)


def dense_row_stats(g_SD: Tensor) -> Statistics:
    """Statistics of every row of a matrix, each row a whole gradient."""
    if backend_for(g_SD.device, g_SD.dtype, ROWS) == "cuda":
        return ragged_row_stats(g_SD, Segments((1,) * len(g_SD)))
    found = (
        g_SD.sum(1, dtype=torch.float64),
        row_sumsq(g_SD),
        g_SD.amin(1).double(),
        g_SD.amax(1).double(),
    )
    return _checked(found, lambda sample: g_SD[sample])


def grouped_stats(present: Statistics, segments: Segments, num_groups: int) -> Statistics:
    """Statistics of the stacked gradients of G groups for each of S samples.

    Args:
        present: statistics of the non-empty (group, sample) segments, in order.
        segments: all G * S segments, those of the first group first; empty ones are zero gradients.
        num_groups: G.
    """
    num_samples, device = len(segments) // num_groups, present.sum.device
    owners = np.flatnonzero(segments.lengths) % num_samples
    order, owner = (to_device(x, torch.int64, device) for x in (np.argsort(owners, kind="stable"), owners))
    groups_of = Segments(tuple(np.bincount(owners, minlength=num_samples).tolist()))

    def fold(values: Tensor, reduce: str, neutral: float) -> Tensor:
        out = torch.full((num_samples,), neutral, dtype=values.dtype, device=device)
        return out.scatter_reduce_(0, owner, values, reduce)

    # Two columns are added group by group, in order; `scatter_reduce_` adds in any order on a GPU.
    sums = groups_of.reduce(torch.stack([present.sum, present.sumsq], 1).index_select(0, order), "sum")
    stats = Statistics(
        sum=sums[:, 0],
        sumsq=sums[:, 1],
        min=fold(present.min, "amin", torch.inf),
        max=fold(present.max, "amax", -torch.inf),
        nonfinite=fold(present.nonfinite, "sum", 0),
    )
    return stats.with_zeros(groups_of.lengths_tensor(device) < num_groups)


def ragged_row_stats(rows_UD: Tensor, segments: Segments) -> Statistics:
    """Statistics over all elements of each sample's rows; a sample without rows gives the neutral element."""
    lengths = segments.lengths_tensor(rows_UD.device)
    without = lengths == 0
    if backend_for(rows_UD.device, rows_UD.dtype, ROWS) == "cuda":
        # Every row is the sum of a run of its own.
        runs = torch.arange(len(rows_UD) + 1, device=rows_UD.device)
        stats = _row_sum_stats(rows_UD, None, None, runs, segments.lengths)
        low, high = (torch.where(without, x, y) for x, y in ((torch.inf, stats.min), (-torch.inf, stats.max)))
        return replace(stats, min=low, max=high)
    total, sumsq, low, high = reference.ragged_row_stats(rows_UD, lengths)
    found = (total, sumsq, low.masked_fill(without, torch.inf), high.masked_fill(without, -torch.inf))
    offsets = segments.offsets
    return _checked(found, lambda sample: rows_UD[offsets[sample] : offsets[sample + 1]])


def _of_one_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


SMALLEST_FLOAT32 = 1e-15
"""Where the largest element is below this, squares of float32 elements begin to vanish."""


def _checked(found: tuple[Tensor, ...], gradient_of: Callable[[int], Tensor]) -> Statistics:
    """Statistics from (sum, sumsq, min, max, ...), repaired where float32 does not hold the squares.

    A sum of squares that is not finite may have overflowed, one of tiny elements underflowed; or there are
    non-finite elements, which are counted.
    """
    total, sumsq, low, high = found[:4]
    stats = Statistics(total, sumsq, low, high, torch.zeros_like(total, dtype=torch.int64))
    largest = torch.maximum(high, -low)
    # Where the extremes are unknown, their squares are what tells.
    tiny = torch.where(
        largest.isnan(), sumsq < SMALLEST_FLOAT32**2, (largest > 0) & (largest < SMALLEST_FLOAT32)
    )
    suspects = ~sumsq.isfinite() | tiny
    # Here the host waits for the device. What the CUDA kernels give needs no repair and does not come here.
    for sample in [sample for sample, suspect in enumerate(suspects.tolist()) if suspect]:
        g = gradient_of(sample)
        stats.nonfinite[sample] = (~g.isfinite()).sum()
        stats.sumsq[sample] = g.double().square().sum()
        if g.numel():
            minmax = torch.aminmax(g)
            stats.min[sample], stats.max[sample] = minmax.min, minmax.max
    return stats
