"""The pass over the label positions behind the LM head's loss, one chunk of logits at a time.

Shape legend: S samples, M label positions of the batch packed along one axis, m positions of one chunk,
n positions of one sample, D hidden size, V vocabulary, v rows of one vocabulary block.

For every label position the head's gradient is G_s = sum_t d_t h_t^T with d_t = dl_s / d(W h_t + b): the
softmax minus the one-hot target, divided by the sample's number of label tokens, taken through soft-capping
and logit scale (docs/definitions.md, LM head). A sample's positions are never split over two chunks; a
sample longer than a chunk recomputes its logits block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grads_dist.stats.head_request import HeadRequest, HeadResult, LogitTransform
from grads_dist.stats.head_sketch import ChunkSketch
from grads_dist.stats.ops import (
    BatchGradient,
    accumulation_dtype,
    dense_row_stats,
    outer_product_stats,
    ragged_row_stats,
)
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

BLOCK_BYTES = {"cpu": 1 << 20}
"""Size of the block of one sample's head gradient that exists at a time: on CPU it stays in the cache."""
DEFAULT_BLOCK_BYTES = 64 << 20


def _chunks(segments: Segments, limit: int) -> Iterator[range]:
    """Ranges of consecutive samples with at most `limit` positions together (or one longer sample)."""
    start = 0
    for stop in range(1, len(segments) + 1):
        full = stop == len(segments) or segments.offsets[stop + 1] - segments.offsets[start] > limit
        if full:
            yield range(start, stop)
            start = stop


class HeadPass:
    """One pass over the label positions; holds what the chunks add up."""

    def __init__(
        self,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        request: HeadRequest,
        result: HeadResult,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden_MD, weight_VD, bias_V, targets_M
        self.request, self.result = request, result
        self.dtype = accumulation_dtype(hidden_MD.dtype)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        num_samples = len(request.segments)
        result.losses = torch.zeros(num_samples, dtype=self.dtype, device=hidden_MD.device)
        result.el2n = torch.zeros_like(result.losses)

    @property
    def shares_products(self) -> bool:
        """Whether the head's weight gradient is summed from the products that the statistics are taken of."""
        return self.request.with_stats and self.request.kept_ids is None

    @property
    def block_rows(self) -> int:
        """Vocabulary rows of one block of a sample's gradient."""
        size = BLOCK_BYTES.get(self.hidden.device.type, DEFAULT_BLOCK_BYTES)
        return max(1, size // (self.hidden.shape[1] * self.dtype.itemsize))

    def allocate(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        """Make room for the gradients that autograd asks for."""
        if need_hidden:
            self.grad_hidden = torch.zeros_like(self.hidden, dtype=self.dtype)
        if need_weight:
            self.grad_weight = torch.zeros_like(self.weight, dtype=self.dtype)
        if need_bias and self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias, dtype=self.dtype)

    def run(self) -> None:
        """Go through all chunks; afterwards `result` and the gradients are complete."""
        for samples in _chunks(self.request.segments, self.request.chunk_positions):
            self._run_chunk(samples)

    def _run_chunk(self, samples: range) -> None:
        offsets = self.request.segments.offsets
        positions = slice(offsets[samples.start], offsets[samples.stop])
        fits = positions.stop - positions.start <= self.request.chunk_positions
        vocab = self.weight.shape[0]
        logsumexp = None if fits else self._logsumexp(positions)
        block = vocab if fits else max(1, self.request.chunk_positions * vocab // _length(positions))
        accumulated = _ChunkSums(self, positions, samples)
        for start in range(0, vocab, block):
            rows = slice(start, min(start + block, vocab))
            accumulated.add(rows, self._logits(positions, rows), logsumexp)
        accumulated.finish()

    def _logits(self, positions: slice, rows: slice) -> Tensor:
        raw = self.hidden[positions] @ self.weight[rows].t()
        if self.bias is not None:
            raw = raw + self.bias[rows]
        return self.request.transform(raw.to(self.dtype))

    def _logsumexp(self, positions: slice) -> Tensor:
        size = self.request.chunk_positions
        whole_vocab = slice(0, self.weight.shape[0])
        return torch.cat(
            [
                self._logits(slice(p, min(p + size, positions.stop)), whole_vocab).logsumexp(1)
                for p in range(positions.start, positions.stop, size)
            ]
        )


def _length(positions: slice) -> int:
    return positions.stop - positions.start


class _ChunkSums:
    """Loss, el2n, gradients and statistics of one chunk, summed over blocks of the vocabulary.

    Gradients are kept without the factor 1 / n_i until the end.
    """

    def __init__(self, pass_: HeadPass, positions: slice, samples: range) -> None:
        self.p, self.positions, self.samples = pass_, positions, samples
        segments = pass_.request.segments
        self.segments = Segments(segments.lengths[samples.start : samples.stop])
        self.sample_m = self.segments.sample_of_row(pass_.hidden.device)
        self.hidden = pass_.hidden[positions].to(pass_.dtype)
        self.targets = pass_.targets[positions]
        self.nll = torch.zeros(_length(positions), dtype=pass_.dtype, device=pass_.hidden.device)
        self.p_sumsq, self.p_target = torch.zeros_like(self.nll), torch.zeros_like(self.nll)
        num_labels = self.segments.lengths_tensor(pass_.hidden.device)
        weights = pass_.request.sample_weights[samples.start : samples.stop]
        self.inverse_n = 1 / num_labels.double()
        scaled = weights * self.inverse_n
        self.weights = tuple(scaled.tolist())
        self.weight_m = scaled.to(pass_.dtype)[self.sample_m]
        empty = Statistics.empty(len(self.segments), pass_.hidden.device)
        self.stats, self.rest, self.bias_stats = empty, empty, empty
        self.kept_rows: list[list[Tensor]] = [[] for _ in samples]
        wanted = pass_.request.projections
        self.sketch = None if wanted is None else ChunkSketch(wanted, pass_.weight.shape[0], self.nll)

    def add(self, rows: slice, logits: Tensor, logsumexp: Tensor | None) -> None:
        logsumexp = logits.logsumexp(1) if logsumexp is None else logsumexp
        own = ((self.targets >= rows.start) & (self.targets < rows.stop)).nonzero().squeeze(1)
        columns = self.targets[own] - rows.start
        self.nll[own] = logsumexp[own] - logits[own, columns]
        transform = self.p.request.transform
        slope = None if transform == LogitTransform() else transform.derivative(logits)
        d_mv = logits.sub_(logsumexp[:, None]).exp_()  # n_i times d until `finish`
        self.p_sumsq += torch.linalg.vector_norm(d_mv, dim=1).square()
        self.p_target[own] = d_mv[own, columns]
        d_mv[own, columns] -= 1
        if slope is not None:
            d_mv.mul_(slope)
        if self.p.request.with_stats:
            self._add_stats(rows, d_mv)
        if self.sketch is not None:
            self.sketch.add(rows, d_mv)
        self._add_gradients(rows, d_mv)

    def _add_gradients(self, rows: slice, d_mv: Tensor) -> None:
        p = self.p
        if p.grad_hidden is None and p.grad_weight is None and p.grad_bias is None:
            return
        # The weights multiply the narrow factors, not d: it has V columns, and scaled down it would
        # underflow in float16.
        if p.grad_hidden is not None:
            wide = (d_mv.to(p.weight.dtype) @ p.weight[rows]).to(p.dtype)
            p.grad_hidden[self.positions] += wide.mul_(self.weight_m[:, None])
        if p.grad_weight is not None and not p.shares_products:
            p.grad_weight[rows].addmm_(d_mv.t(), self.hidden * self.weight_m[:, None])
        if p.grad_bias is not None:
            p.grad_bias[rows] += self.weight_m @ d_mv

    def _add_stats(self, rows: slice, d_mv: Tensor) -> None:
        if self.p.bias is not None:
            bias_gradient = torch.segment_reduce(
                d_mv, "sum", lengths=self.segments.lengths_tensor(d_mv.device), axis=0
            )
            self.bias_stats = self.bias_stats.merge(dense_row_stats(bias_gradient))
        step = self.p.block_rows
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            columns = slice(block.start - rows.start, block.stop - rows.start)
            self._add_block_stats(block, d_mv[:, columns])

    def _add_block_stats(self, block: slice, d_mv: Tensor) -> None:
        if self.p.request.kept_ids is None:
            gradient = None
            if self.p.grad_weight is not None:
                gradient = BatchGradient(self.p.grad_weight[block], self.weights)
            found = outer_product_stats(d_mv, self.hidden, self.segments, gradient)
            self.stats = self.stats.merge(found)
            return
        rest, kept = [], []
        for i, sample in enumerate(self.samples):
            ids = self.p.request.kept_ids[sample]
            ids = ids[(ids >= block.start) & (ids < block.stop)] - block.start
            rows = slice(self.segments.offsets[i], self.segments.offsets[i + 1])
            rest_stats, kept_rows = _split_rows(d_mv[rows], self.hidden[rows], ids)
            rest.append(rest_stats)
            kept.append(ragged_row_stats(kept_rows, Segments((len(ids),))))
            self.kept_rows[i].append(kept_rows)
        rest_of_block = Statistics.concatenate(rest)
        self.rest = self.rest.merge(rest_of_block)
        self.stats = self.stats.merge(rest_of_block).merge(Statistics.concatenate(kept))

    def finish(self) -> None:
        """Hand the chunk's sums to the pass' result."""
        result, samples = self.p.result, slice(self.samples.start, self.samples.stop)
        lengths = self.segments.lengths_tensor(self.nll.device)
        result.losses[samples] = torch.segment_reduce(self.nll, "mean", lengths=lengths)
        # |p - onehot|^2 = |p|^2 - 2 p_y + 1, in the form that keeps its accuracy when p_y is near 1.
        error = (self.p_sumsq - self.p_target.square() + (1 - self.p_target).square()).clamp_min(0).sqrt()
        result.el2n[samples] = torch.segment_reduce(error, "mean", lengths=lengths)
        scale = self.inverse_n
        if self.sketch is not None:
            found = self.sketch.finish(self.hidden, self.segments) * scale[:, None, None]
            result.sketch = found if result.sketch is None else torch.cat([result.sketch, found])
        if not self.p.request.with_stats:
            return
        result.weight_stats = _append(result.weight_stats, self.stats.scaled(scale))
        if self.p.bias is not None:
            result.bias_stats = _append(result.bias_stats, self.bias_stats.scaled(scale))
        if self.p.request.kept_ids is not None:
            result.rest_stats = _append(result.rest_stats, self.rest.scaled(scale))
            kept = [torch.cat(rows) * n for rows, n in zip(self.kept_rows, scale, strict=True)]
            result.kept_rows += [rows.to(self.p.dtype) for rows in kept]


def _split_rows(d_nv: Tensor, hidden_nD: Tensor, ids: Tensor) -> tuple[Statistics, Tensor]:
    """Statistics of one sample's gradient block without the rows `ids`, and those rows."""
    others = torch.ones(d_nv.shape[1], dtype=torch.bool, device=d_nv.device)
    others[ids] = False
    kept_rows = d_nv[:, ids].t() @ hidden_nD
    if len(ids) == d_nv.shape[1]:
        return Statistics.empty(1, d_nv.device), kept_rows
    return outer_product_stats(d_nv[:, others], hidden_nD, Segments((d_nv.shape[0],))), kept_rows


def _append(before: Statistics | None, more: Statistics) -> Statistics:
    return more if before is None else Statistics.concatenate([before, more])
