"""Statistics of the LM head's gradient over one chunk of samples, from blocks of the vocabulary.

Shape legend: m label positions of the chunk, n of one sample, D hidden size, v rows of one vocabulary block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grads_dist.stats.backend import backend_for
from grads_dist.stats.certificate import Certified, certified_statistics, gram_sumsq, pays
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
            lengths = self.c.segments.lengths_tensor(d_mv.device)
            bias_gradient = torch.segment_reduce(d_mv, "sum", lengths=lengths, axis=0)
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
        if backend_for(self.p.hidden.device, self.p.dtype) != "reference":
            return int(vocab)
        size = BLOCK_BYTES.get(self.p.hidden.device.type, DEFAULT_BLOCK_BYTES)
        return max(1, size // (dim * self.p.dtype.itemsize))

    def _samples(self) -> list[tuple[int, slice]]:
        offsets = self.c.segments.offsets
        return [(sample, slice(offsets[i], offsets[i + 1])) for i, sample in enumerate(self.c.samples)]

    def _add_whole(self, d_mV: Tensor) -> None:
        """All of the vocabulary at once, sample by sample."""
        kept_ids, found, kept = self.p.request.kept_ids, [], []
        for i, (sample, rows) in enumerate(self._samples()):
            d, hidden = d_mV[rows], self.c.hidden[rows]
            ids = None if kept_ids is None else kept_ids[sample]
            found.append(self._one_sample(d, hidden, self.c.targets[rows], ids))
            if ids is not None:
                kept_rows = d[:, ids].t() @ hidden
                kept.append(ragged_row_stats(kept_rows, Segments((len(ids),))))
                self.kept_rows[i].append(kept_rows)
        of_chunk = Statistics.concatenate(found)
        self.stats = self.stats.merge(of_chunk)
        if kept_ids is not None:
            self.rest = self.rest.merge(of_chunk)
            self.stats = self.stats.merge(Statistics.concatenate(kept))

    def _one_sample(
        self, d_nV: Tensor, hidden_nD: Tensor, targets_n: Tensor, ids: Tensor | None
    ) -> Statistics:
        """Statistics of one sample's gradient without the rows `ids`."""
        result = self.p.result
        if not self.p.request.extremes and 2 * len(d_nV) < hidden_nD.shape[1]:
            sumsq = gram_sumsq(d_nV, hidden_nD, targets_n, ids)
            unknown = torch.full_like(sumsq, torch.nan)
            return _statistics(Certified(sumsq, unknown, unknown.clone(), 0), d_nV, hidden_nD, ids)
        if pays(len(d_nV), d_nV.shape[1], hidden_nD.shape[1]):
            found = certified_statistics(d_nV, hidden_nD, targets_n, ids)
            if found is not None and bool(found.sumsq.isfinite()):
                result.rows_formed += found.rows_formed
                result.num_certified += 1
                return _statistics(found, d_nV, hidden_nD, ids)
        result.num_formed_whole += 1
        return _without_rows(d_nV, hidden_nD, ids)

    def _add_block(self, block: slice, d_mv: Tensor) -> None:
        if self.p.request.kept_ids is None:
            gradient = None
            if self.p.grad_weight is not None:
                gradient = BatchGradient(self.p.grad_weight[block], self.c.weights)
            found = outer_product_stats(d_mv, self.c.hidden, self.c.segments, gradient)
            self.stats = self.stats.merge(found)
            return
        rest, kept = [], []
        for i, (sample, rows) in enumerate(self._samples()):
            ids = self.p.request.kept_ids[sample]
            ids = ids[(ids >= block.start) & (ids < block.stop)] - block.start
            rest.append(_without_rows(d_mv[rows], self.c.hidden[rows], ids))
            kept_rows = d_mv[rows][:, ids].t() @ self.c.hidden[rows]
            kept.append(ragged_row_stats(kept_rows, Segments((len(ids),))))
            self.kept_rows[i].append(kept_rows)
        rest_of_block = Statistics.concatenate(rest)
        self.rest = self.rest.merge(rest_of_block)
        self.stats = self.stats.merge(rest_of_block).merge(Statistics.concatenate(kept))


def _statistics(found: Certified, d_nV: Tensor, hidden_nD: Tensor, ids: Tensor | None) -> Statistics:
    """With the sum in its rank-1 form."""
    columns = d_nV.sum(1, dtype=torch.float64)
    if ids is not None:
        columns = columns - d_nV.index_select(1, ids).sum(1, dtype=torch.float64)
    total = (columns * hidden_nD.sum(1, dtype=torch.float64)).sum()
    return Statistics(
        sum=total[None],
        sumsq=found.sumsq[None],
        min=found.low[None],
        max=found.high[None],
        nonfinite=torch.zeros(1, dtype=torch.int64, device=d_nV.device),
    )


def _without_rows(d_nv: Tensor, hidden_nD: Tensor, ids: Tensor | None) -> Statistics:
    """Statistics of one sample's gradient block, formed, without the rows `ids`."""
    if ids is not None:
        others = torch.ones(d_nv.shape[1], dtype=torch.bool, device=d_nv.device)
        others[ids] = False
        if len(ids) == d_nv.shape[1]:
            return Statistics.empty(1, d_nv.device)
        d_nv = d_nv[:, others]
    return outer_product_stats(d_nv, hidden_nD, Segments((d_nv.shape[0],)))


def _append(before: Statistics | None, more: Statistics) -> Statistics:
    return more if before is None else Statistics.concatenate([before, more])
