"""Statistics of the LM head's gradient over one chunk of samples, from blocks of the vocabulary.

Shape legend: m label positions of the chunk, n of one sample, D hidden size, v rows of one vocabulary block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grads_dist.stats.backend import backend_for
from grads_dist.stats.certificate import (
    Certified,
    HeadSample,
    certified_statistics,
    gram_sumsq,
    pays,
    row_bounds,
)
from grads_dist.stats.ops import BatchGradient, dense_row_stats, outer_product_stats, ragged_row_stats
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics

if TYPE_CHECKING:
    from grads_dist.stats.head_pass import ChunkSums, HeadPass

BLOCK_BYTES = {"cpu": 1 << 20}
"""Size of the block of one sample's head gradient that exists at a time: on CPU it stays in the cache."""
DEFAULT_BLOCK_BYTES = 64 << 20


class ChunkStatistics:
    """Statistics of the chunk's samples, without the factor 1 / n_i until the end.

    Where the head's weight gradient is wanted too, both come from the same products. Where it is not, the
    gradient need not be formed (certificate.py).
    """

    def __init__(self, pass_: HeadPass, chunk: ChunkSums) -> None:
        self.p, self.c = pass_, chunk
        empty = Statistics.empty(len(chunk.segments), pass_.hidden.device)
        self.stats, self.rest, self.bias_stats = empty, empty, empty
        self.kept_rows: list[list[Tensor]] = [[] for _ in chunk.samples]

    def add(self, rows: slice, d_mv: Tensor) -> None:
        """Take in the gradient at the logits of the vocabulary rows `rows`."""
        if self.p.bias is not None:
            bias_gradient = self.c.segments.reduce(d_mv, "sum")
            self.bias_stats = self.bias_stats.merge(dense_row_stats(bias_gradient))
        if self._can_certify(d_mv):
            self._add_whole(d_mv)
            return
        step = self._block_rows
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            columns = slice(block.start - rows.start, block.stop - rows.start)
            self._add_block(block, d_mv[:, columns])

    def finish(self, scale: Tensor) -> None:
        """Hand the sums to the pass' result, times `scale` [S]."""
        result = self.p.result
        result.weight_stats = _append(result.weight_stats, self.stats.scaled(scale))
        if self.p.bias is not None:
            result.bias_stats = _append(result.bias_stats, self.bias_stats.scaled(scale))
        if self.p.request.kept_ids is not None:
            result.rest_stats = _append(result.rest_stats, self.rest.scaled(scale))
            kept = [torch.cat(rows) * n for rows, n in zip(self.kept_rows, scale, strict=True)]
            result.kept_rows += [rows.to(self.p.dtype) for rows in kept]

    def _can_certify(self, d_mv: Tensor) -> bool:
        """Whether the products serve nothing else, and some sample's statistics are cheaper without."""
        vocab, dim = self.p.weight.shape
        shared = self.p.shares_products and self.p.grad_weight is not None
        if shared or d_mv.shape[1] != vocab:
            return False
        if not self.p.request.extremes:
            return True
        return any(pays(n, vocab, dim) for n in self.c.segments.lengths)

    @property
    def _block_rows(self) -> int:
        """Vocabulary rows of one block of a sample's gradient; the kernels have blocks of their own."""
        vocab, dim = self.p.weight.shape
        if self.p.in_bfloat16 or backend_for(self.p.hidden.device, self.p.dtype) != "reference":
            return int(vocab)
        size = BLOCK_BYTES.get(self.p.hidden.device.type, DEFAULT_BLOCK_BYTES)
        return max(1, size // (dim * self.p.dtype.itemsize))

    def _samples(self, d_mv: Tensor) -> list[HeadSample]:
        offsets, kept_ids, samples = self.c.segments.offsets, self.p.request.kept_ids, []
        for i, sample in enumerate(self.c.samples):
            rows = slice(offsets[i], offsets[i + 1])
            ids = None if kept_ids is None else kept_ids[sample]
            samples.append(HeadSample(d_mv[rows], self.c.hidden[rows], self.c.targets[rows], ids))
        return samples

    def _add_whole(self, d_mV: Tensor) -> None:
        """All of the vocabulary at once."""
        samples = self._samples(d_mV)
        found = [self._moments(sample) for sample in samples]
        self._certify(samples, d_mV, found)
        for i, sample in enumerate(samples):
            if found[i] is None:
                found[i] = self._formed(sample.b_nV, sample.a_nD, sample.skipped)
                self.p.result.num_formed_whole += 1
        of_chunk = Statistics.concatenate([stats for stats in found if stats is not None])
        self.stats = self.stats.merge(of_chunk)
        if self.p.request.kept_ids is not None:
            self.rest = self.rest.merge(of_chunk)
            self.stats = self.stats.merge(self._kept(samples))

    def _moments(self, sample: HeadSample) -> Statistics | None:
        """Sum and sum of squares where no more is asked for and Gram matrices are the cheaper way."""
        num_positions, dim = sample.a_nD.shape
        if self.p.request.extremes or 2 * num_positions >= dim:
            return None
        sumsq = gram_sumsq(sample)
        unknown = torch.full_like(sumsq, torch.nan)
        return _statistics(Certified(sumsq, unknown, unknown.clone(), 0), sample)

    def _certify(self, samples: list[HeadSample], d_mV: Tensor, found: list[Statistics | None]) -> None:
        """Fill in what a bound vouches for."""
        vocab, dim = self.p.weight.shape
        wanted = [
            i for i, stats in enumerate(found) if stats is None and pays(len(samples[i].b_nV), vocab, dim)
        ]
        if not wanted:
            return
        bounds = row_bounds(d_mV, self.c.hidden, self.c.segments, self.p.backend)
        certified = certified_statistics([samples[i] for i in wanted], [bounds[i] for i in wanted])
        for i, of_sample in zip(wanted, certified, strict=True):
            if of_sample is not None:
                found[i] = _statistics(of_sample, samples[i])
                self.p.result.rows_formed += of_sample.rows_formed
                self.p.result.num_certified += 1

    def _kept(self, samples: list[HeadSample]) -> Statistics:
        """Keep the rows of G at each sample's `skipped`; their statistics."""
        kept = [s.b_nV.index_select(1, s.skipped).t() @ s.a_nD for s in samples if s.skipped is not None]
        for rows, of_sample in zip(self.kept_rows, kept, strict=True):
            rows.append(of_sample)
        return ragged_row_stats(torch.cat(kept), Segments(tuple(len(rows) for rows in kept)))

    def _add_block(self, block: slice, d_mv: Tensor) -> None:
        if self.p.request.kept_ids is None:
            gradient = None
            if self.p.shares_products and self.p.grad_weight is not None:
                gradient = BatchGradient(self.p.grad_weight[block], self.c.weights)
            found = self._products(d_mv, self.c.hidden, self.c.segments, gradient)
            self.stats = self.stats.merge(found)
            return
        samples = [_within(sample, block) for sample in self._samples(d_mv)]
        rest = Statistics.concatenate([self._formed(s.b_nV, s.a_nD, s.skipped) for s in samples])
        self.rest = self.rest.merge(rest)
        self.stats = self.stats.merge(rest).merge(self._kept(samples))

    def _formed(self, d_nv: Tensor, hidden_nD: Tensor, ids: Tensor | None) -> Statistics:
        """Statistics of one sample's gradient block, formed, without the rows `ids`."""
        if ids is not None:
            others = torch.ones(d_nv.shape[1], dtype=torch.bool, device=d_nv.device)
            others[ids] = False
            if len(ids) == d_nv.shape[1]:
                return Statistics.empty(1, d_nv.device)
            d_nv = d_nv[:, others]
        return self._products(d_nv, hidden_nD, Segments((d_nv.shape[0],)))

    def _products(
        self, d_mv: Tensor, hidden_mD: Tensor, segments: Segments, gradient: BatchGradient | None = None
    ) -> Statistics:
        if not self.p.in_bfloat16:
            return outer_product_stats(d_mv, hidden_mD, segments, gradient)
        # Hidden states of bfloat16 lose nothing by going back to it; d comes as a sum of three.
        hidden_mD = hidden_mD.bfloat16().repeat_interleave(3, 0)
        return outer_product_stats(bfloat16_terms(d_mv), hidden_mD, segments.repeated(3), gradient)


def bfloat16_terms(x_mv: Tensor) -> Tensor:
    """Three bfloat16 rows for each float32 row, whose sum it is: 3 times 8 bits hold all 24 [3 m, v]."""
    first = x_mv.bfloat16()
    rest = x_mv - first
    second = rest.bfloat16()
    return torch.stack([first, second, (rest - second).bfloat16()], 1).flatten(0, 1)


def _within(sample: HeadSample, block: slice) -> HeadSample:
    """The same with those of `skipped` that are in a block of the vocabulary, counted from its start."""
    assert sample.skipped is not None
    ids = sample.skipped
    ids = ids[(ids >= block.start) & (ids < block.stop)] - block.start
    return replace(sample, skipped=ids)


def _statistics(found: Certified, sample: HeadSample) -> Statistics:
    """With the sum in its rank-1 form."""
    columns = sample.b_nV.sum(1, dtype=torch.float64)
    if sample.skipped is not None:
        columns = columns - sample.b_nV.index_select(1, sample.skipped).sum(1, dtype=torch.float64)
    total = (columns * sample.a_nD.sum(1, dtype=torch.float64)).sum()
    return Statistics(
        sum=total[None],
        sumsq=found.sumsq[None],
        min=found.low[None],
        max=found.high[None],
        nonfinite=torch.zeros(1, dtype=torch.int64, device=total.device),
    )


def _append(before: Statistics | None, more: Statistics) -> Statistics:
    return more if before is None else Statistics.concatenate([before, more])
