"""The forms in which a layer's per-sample gradients come, none of which holds a whole gradient.

A rule (rules.py) says what the gradient of a parameter is; what is read of it (statistics, a sketch) is
computed from the form.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight, G groups (the experts of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from grads_dist.stats import ops
from grads_dist.stats.segments import Segments
from grads_dist.stats.statistics import Statistics


@dataclass(frozen=True)
class OuterProduct:
    """G_s = sum over the sample's rows of b_t a_t^T [P, D]: the weight of a linear layer."""

    b_NP: Tensor
    a_ND: Tensor
    segments: Segments
    batch: ops.BatchGradient | None = None

    def statistics(self, extremes: bool = True) -> Statistics:
        """Statistics over the P x D elements of every sample's gradient; fills `batch` on the way.

        Without `extremes` minimum and maximum are NaN, and products need be formed for long samples only.
        """
        batch = None if self.batch is None or self.batch.done else self.batch
        if batch is None and not extremes:
            return ops.outer_product_moments(self.b_NP, self.a_ND, self.segments)
        return ops.outer_product_stats(self.b_NP, self.a_ND, self.segments, batch)

    def add_to_batch(self) -> None:
        """Fill `batch` if no statistics were taken."""
        if self.batch is not None and not self.batch.done:
            dtype = self.batch.total.dtype
            self.batch.total.addmm_(self.b_NP.t().to(dtype), self.a_ND.to(dtype))
            self.batch.done = True


@dataclass(frozen=True)
class VectorSum:
    """g_s = sum of the sample's rows [D]: a bias; with `normalised` the rows times xhat: a norm's gain."""

    b_ND: Tensor
    segments: Segments
    normalised: ops.Normalised | None = None

    @cached_property
    def x_ND(self) -> Tensor:
        """The rows that are summed."""
        if self.normalised is None:
            return self.b_ND
        dtype = ops.accumulation_dtype(self.b_ND.dtype)
        return self.b_ND.to(dtype) * self.normalised().to(dtype)

    def statistics(self, extremes: bool = True) -> Statistics:
        """Statistics over the D elements of every sample's gradient; `extremes` changes nothing here."""
        return ops.vector_stats(self.b_ND, self.segments, self.normalised)


@dataclass(frozen=True)
class TouchedRows:
    """An embedding's gradient [num_embeddings, D]: some rows, and zeros elsewhere."""

    touched: ops.EmbeddingRows
    num_embeddings: int

    def statistics(self, extremes: bool = True) -> Statistics:
        """Statistics over all elements, those of absent tokens included; `extremes` changes nothing here."""
        return ops.embedding_stats(self.touched, self.num_embeddings)


@dataclass(frozen=True)
class Grouped:
    """The stacked gradients of G groups: of the weights [G, P, D] or biases [G, P] of a layer's experts.

    `inner` has G * S segments, those of the first group first; a sample that no token of which reached a
    group has an empty segment there, and a zero gradient.
    """

    inner: OuterProduct | VectorSum
    num_groups: int

    def statistics(self, extremes: bool = True) -> Statistics:
        """Statistics over the elements of all groups; `extremes` as for `inner`."""
        return ops.grouped_stats(self.present.statistics(extremes), self.inner.segments, self.num_groups)

    @property
    def present(self) -> OuterProduct | VectorSum:
        """`inner` without its empty segments: most samples do not reach most groups."""
        segments = Segments(tuple(n for n in self.inner.segments.lengths if n))
        return replace(self.inner, segments=segments)


@dataclass(frozen=True)
class Zero:
    """The gradient of an expert that none of the batch's tokens reached."""

    num_samples: int
    device: torch.device

    def statistics(self, extremes: bool = True) -> Statistics:
        """All zero, whatever the number of elements."""
        return Statistics.empty(self.num_samples, self.device).with_zeros(
            torch.ones(self.num_samples, dtype=torch.bool, device=self.device)
        )


SampleGradient = OuterProduct | VectorSum | TouchedRows | Grouped | Zero
"""The per-sample gradients of one parameter."""
