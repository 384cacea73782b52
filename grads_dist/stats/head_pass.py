"""The pass over the label positions behind the LM head's loss, one chunk of logits at a time.

Shape legend: S samples, M label positions of the batch packed along one axis, m positions of one chunk,
n positions of one sample, D hidden size, V vocabulary, v rows of one vocabulary block.

For every label position the head's gradient is G_s = sum_t d_t h_t^T with d_t = dl_s / d(W h_t + b): the
softmax minus the one-hot target, divided by the sample's number of label tokens, taken through soft-capping
and logit scale (docs/definitions.md, LM head). A sample's positions are never split over two chunks; a
sample longer than a chunk recomputes its logits block by block. d is float32 or float64 whatever the model's
type (docs/kernels.md, Head).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from grads_dist.stats import operators
from grads_dist.stats.backend import HEAD, backend_for
from grads_dist.stats.head_request import HeadRequest, HeadResult, LogitTransform
from grads_dist.stats.head_sketch import ChunkSketch
from grads_dist.stats.head_statistics import ChunkStatistics
from grads_dist.stats.reference import accumulation_dtype
from grads_dist.stats.segments import Segments


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
        self.backend = backend_for(hidden_MD.device, self.dtype, HEAD)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        num_samples = len(request.segments)
        result.losses = torch.zeros(num_samples, dtype=self.dtype, device=hidden_MD.device)
        result.el2n = torch.zeros_like(result.losses)

    @property
    def shares_products(self) -> bool:
        """Whether the head's weight gradient is summed from the products that the statistics are taken of.

        On a GPU it is not: statistics need no products, and the gradient is one product in the model's type.
        """
        return self.request.with_stats and self.request.kept_ids is None and self.backend != "cuda"

    @property
    def in_bfloat16(self) -> bool:
        """Whether products with d are left to a GPU's bfloat16 units."""
        return self.backend == "cuda" and self.hidden.dtype == self.weight.dtype == torch.bfloat16

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
        accumulated = ChunkSums(self, positions, samples)
        for start in range(0, vocab, block):
            rows = slice(start, min(start + block, vocab))
            accumulated.add(rows, self._logits(positions, rows, keep_type=fits), logsumexp)
        accumulated.finish()

    def _logits(self, positions: slice, rows: slice, keep_type: bool = False) -> Tensor:
        """Final logits in the accumulation type; in the model's where it is kept and a kernel takes it."""
        raw = self.hidden[positions] @ self.weight[rows].t()
        if self.bias is not None:
            raw = raw + self.bias[rows]
        transform = self.request.transform
        kernel_takes_it = self.backend == "cuda" and raw.dtype == torch.bfloat16
        if keep_type and kernel_takes_it and transform == LogitTransform():
            return raw
        return transform(raw.to(self.dtype))

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


class ChunkSums:
    """Loss, el2n and gradients of one chunk, summed over blocks of the vocabulary.

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
        self.error_sumsq = torch.zeros_like(self.nll)
        self.inverse_n = 1 / self.segments.lengths_tensor(pass_.hidden.device).double()
        self.sample_weights = pass_.request.sample_weights[samples.start : samples.stop] * self.inverse_n
        self.weight_m = self.sample_weights.to(pass_.dtype)[self.sample_m]
        self.statistics = ChunkStatistics(pass_, self) if pass_.request.with_stats else None
        wanted = pass_.request.projections
        self.sketch = None if wanted is None else ChunkSketch(wanted, pass_.weight.shape[0], self.nll)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """`sample_weights` on the host."""
        return tuple(self.sample_weights.tolist())

    def add(self, rows: slice, logits: Tensor, logsumexp: Tensor | None) -> None:
        """Take in the logits of the vocabulary rows `rows`, which are overwritten."""
        transform = self.p.request.transform
        slope = None if transform == LogitTransform() else transform.derivative(logits)
        d_mv = self._softmax_gradient(rows, logits, logsumexp)  # n_i times d until `finish`
        if slope is not None:
            d_mv.mul_(slope)
        if self.statistics is not None:
            self.statistics.add(rows, d_mv)
        if self.sketch is not None:
            self.sketch.add(rows, d_mv)
        self._add_gradients(rows, d_mv)

    def _softmax_gradient(self, rows: slice, logits: Tensor, logsumexp: Tensor | None) -> Tensor:
        """Softmax minus one-hot; adds up loss and squares."""
        out = None if logits.dtype == self.p.dtype else torch.empty_like(logits, dtype=self.p.dtype)
        # The kernel takes whole rows.
        backend = self.p.backend if logsumexp is None else "reference"
        nll, sumsq = operators.softmax_gradient(logits, self.targets, logsumexp, out, rows.start, backend)
        self.nll += nll
        self.error_sumsq += sumsq
        return logits if out is None else out

    def _add_gradients(self, rows: slice, d_mv: Tensor) -> None:
        p = self.p
        if p.grad_hidden is None and p.grad_weight is None and p.grad_bias is None:
            return
        # The weights multiply the narrow factors, not d: it has V columns, and scaled down it would
        # underflow in float16.
        narrow_mv = d_mv.to(p.weight.dtype)
        if p.grad_hidden is not None:
            wide = (narrow_mv @ p.weight[rows]).to(p.dtype)
            p.grad_hidden[self.positions] += wide.mul_(self.weight_m[:, None])
        if p.grad_weight is not None and not p.shares_products:
            weighted = self.hidden * self.weight_m[:, None]
            if p.in_bfloat16:
                p.grad_weight[rows] += narrow_mv.t() @ weighted.to(narrow_mv.dtype)
            else:
                p.grad_weight[rows].addmm_(d_mv.t(), weighted)
        if p.grad_bias is not None:
            p.grad_bias[rows] += self.weight_m @ d_mv

    def finish(self) -> None:
        """Hand the chunk's sums to the pass' result."""
        result, samples = self.p.result, slice(self.samples.start, self.samples.stop)
        result.losses[samples] = self.segments.reduce(self.nll, "mean")
        result.el2n[samples] = self.segments.reduce(self.error_sumsq.sqrt(), "mean")
        scale = self.inverse_n
        if self.sketch is not None:
            found = self.sketch.finish(self.hidden, self.segments) * scale[:, None, None]
            result.sketch = found if result.sketch is None else torch.cat([result.sketch, found])
        if self.statistics is not None:
            self.statistics.finish(scale)
