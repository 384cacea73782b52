"""The sketch of the LM head's gradient, from blocks of the vocabulary as the head's pass goes through them.

Shape legend: S samples, m label positions of one chunk, D hidden size, v rows of one vocabulary block, k size
of a sketch's sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grads_dist.stats.head_request import HeadProjections
from grads_dist.stats.segments import Segments
from grads_dist.stats.sketch import project, sample_products


class ChunkSketch:
    """d Z_out of one chunk's positions, summed over blocks of the vocabulary, for every projection."""

    def __init__(self, projections: HeadProjections, vocab: int, like_m: Tensor) -> None:
        self._projections, self._vocab = projections, vocab
        size = (*projections.weight, *projections.bias)[0].size
        shape = (len(like_m), size)
        self._weight = [like_m.new_zeros(shape) for _ in projections.weight]
        self._bias = [like_m.new_zeros(shape) for _ in projections.bias]

    def add(self, rows: slice, d_mv: Tensor) -> None:
        """Add the vocabulary rows `rows` of the gradient at the head's output."""
        for sums, projection in (
            *zip(self._weight, self._projections.weight, strict=True),
            *zip(self._bias, self._projections.bias, strict=True),
        ):
            signs = projection.outputs(self._vocab, d_mv.device)[rows]
            sums.addmm_(d_mv, signs.to(d_mv.dtype))

    def finish(self, hidden_mD: Tensor, segments: Segments) -> Tensor:
        """The sum over all projections of the sketches [S, k, k]."""
        parts = []
        for left, projection in zip(self._weight, self._projections.weight, strict=True):
            signs = projection.inputs(hidden_mD.shape[1], hidden_mD.device)
            parts.append(sample_products(left, project(hidden_mD, signs), segments))
        for left, projection in zip(self._bias, self._projections.bias, strict=True):
            signs = projection.inputs(1, left.device).to(left.dtype)
            parts.append(sample_products(left, signs.expand(len(left), -1), segments))
        return torch.stack(parts).sum(0)
