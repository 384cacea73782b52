"""Statistics of an LM head's gradient without forming it: Gram matrices, and rows ruled out by a bound.

G = B^T A has a row for each of V tokens, B being the loss gradient at the logits [n, V] and A the hidden
states [n, D] of one sample's n label positions. The sum of squares is that of products of two Gram matrices,
sum_ts (B_t . B_s) (A_t . A_s). The extremes need elements, but few: no element of row v exceeds

    min(|B_v| max_j |A_j|,  sum_t |B_tv| max_j |A_tj|)

(|.| of a column is its norm), and after softmax most rows are bounded by almost nothing. Rows are formed in
the order of their bounds until the next bound is below both the largest element found and minus the smallest;
then no other row can hold an extreme. The result is exact.

All samples of a chunk are looked at together: on a GPU the host waits once a look, not once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats import operators
from grads_dist.stats.segments import Segments

FIRST_ROWS = 256
"""Rows that are formed before the first look at the bound; four times as many before each further look."""

LARGEST_SHARE = 0.25
"""Of the rows: where more would have to be formed, all of them are, by the full product."""

SLACK = 1.0 + 1e-5
"""On the bound, for the rounding of bounds and elements in float32."""

GRAM_BLOCK = 1024
"""Rows of the vocabulary that are summed in float32 in a Gram matrix."""

GRAMS_AT_ONCE = 1 << 22
"""Elements of Gram matrices of blocks that may exist on a GPU, where one launch makes many of them."""

PASSES = 100.0
"""What the bounds' passes over B cost, in multiplications with one element of it."""


@dataclass(frozen=True)
class HeadSample:
    """The factors of one sample's G = B^T A.

    Args:
        b_nV: gradient at the logits, float32 or float64; changed while its squares are summed, and restored.
        a_nD: hidden states, of the same type.
        targets_n: the token that each position is to predict.
        skipped: rows of G that do not belong to it.
    """

    b_nV: Tensor
    a_nD: Tensor
    targets_n: Tensor
    skipped: Tensor | None = None


@dataclass(frozen=True)
class Certified:
    """Statistics of one sample's gradient, and how many of its rows were formed for them."""

    sumsq: Tensor
    low: Tensor
    high: Tensor
    rows_formed: int


def pays(num_positions: int, num_rows: int, dim: int) -> bool:
    """Whether the bound is cheaper than the product for a sample with n positions, V rows and D columns."""
    return num_rows >= 8 * FIRST_ROWS and 2 * num_positions + PASSES < 2 * dim


def row_bounds(b_mV: Tensor, a_mD: Tensor, segments: Segments, backend: str) -> Tensor:
    """What no element of each row of each sample's G exceeds, [S, V]."""
    norms, weighted = operators.column_bounds(b_mV, a_mD.abs().amax(1), list(segments.lengths), backend)
    parts = a_mD.split(list(segments.lengths))
    column_norms = torch.stack([torch.linalg.vector_norm(part, dim=0).max() for part in parts])
    return torch.minimum(norms.mul_(column_norms[:, None]), weighted, out=norms).mul_(SLACK)


def certified_statistics(samples: Sequence[HeadSample], bounds: Sequence[Tensor]) -> list[Certified | None]:
    """Statistics of every sample's G, float64 scalars.

    None where too many rows would have to be formed, and where the sum of squares is not finite.

    Args:
        samples: their factors.
        bounds: a row of `row_bounds` for each, overwritten.
    """
    searches = [_Search(sample, bounds_V) for sample, bounds_V in zip(samples, bounds, strict=True)]
    unsure, formed, wanted = searches, 0, FIRST_ROWS
    while unsure := [search for search in unsure if wanted <= LARGEST_SHARE * search.num_rows]:
        top = torch.topk(torch.stack([search.bounds for search in unsure]), wanted - formed)
        for search, rows in zip(unsure, top.indices, strict=True):
            search.form(rows)
        formed, wanted = wanted, 4 * wanted
        certain = top.values[:, -1] <= torch.stack([search.smaller_extreme for search in unsure])
        certain &= torch.stack([search.sumsq for search in unsure]).isfinite()
        for search, yes in zip(unsure, _on_host(certain), strict=True):
            search.rows_formed = formed if yes else None
        unsure = [search for search in unsure if search.rows_formed is None]
    return [search.result for search in searches]


class _Search:
    """The extremes among the rows of one sample's G that were formed; `rows_formed`: how many sufficed."""

    def __init__(self, sample: HeadSample, bounds_V: Tensor) -> None:
        self.sample, self.bounds = sample, bounds_V
        self.num_rows = len(bounds_V)
        if sample.skipped is not None:
            bounds_V.index_fill_(0, sample.skipped, -1.0)
            self.num_rows -= len(sample.skipped)
        self.sumsq = gram_sumsq(sample)
        self.low, self.high = (bounds_V.new_full((), x) for x in (torch.inf, -torch.inf))
        self.rows_formed: int | None = None

    def form(self, rows: Tensor) -> None:
        """Form rows of G and look at their elements."""
        found = torch.aminmax(self.sample.b_nV.index_select(1, rows).t() @ self.sample.a_nD)
        self.low, self.high = torch.minimum(self.low, found.min), torch.maximum(self.high, found.max)
        # Not found again: which of equal bounds come first may differ from look to look.
        self.bounds.index_fill_(0, rows, -1.0)

    @property
    def smaller_extreme(self) -> Tensor:
        """A row whose bound is below this holds neither extreme."""
        return torch.minimum(self.high, -self.low)

    @property
    def result(self) -> Certified | None:
        """None where no number of rows sufficed."""
        if self.rows_formed is None:
            return None
        return Certified(self.sumsq, self.low.double(), self.high.double(), self.rows_formed)


def _on_host(certain: Tensor) -> list[bool]:
    """The one place where the host waits for the device."""
    return list(certain.tolist())


def gram_sumsq(sample: HeadSample) -> Tensor:
    """The sum of squares of G alone, a float64 scalar."""
    b, targets_n, skipped = sample.b_nV, sample.targets_n, sample.skipped
    if skipped is not None:
        others = b.index_select(1, skipped)
        b.index_fill_(1, skipped, 0)
    rows = torch.arange(len(b), device=b.device)
    own = b[rows, targets_n]
    # The target's element is near -1 and the others near 1/V: summed in float32 they would vanish beside it.
    b[rows, targets_n] = 0
    gram = _gram(b)
    cross = (b.index_select(1, targets_n) * own).double()
    b[rows, targets_n] = own
    if skipped is not None:
        b.index_copy_(1, skipped, others)
    same = targets_n[:, None] == targets_n
    gram = gram + cross + cross.t() + torch.outer(own, own).double() * same
    return (gram * (sample.a_nD @ sample.a_nD.t()).double()).sum()


def _gram(b_nV: Tensor) -> Tensor:
    """B B^T, in float64 from block to block: beside large elements small ones would be lost in float32."""
    num_blocks = b_nV.shape[1] // GRAM_BLOCK
    whole = b_nV[:, : num_blocks * GRAM_BLOCK].unflatten(1, (num_blocks, GRAM_BLOCK)).transpose(0, 1)
    rest = b_nV[:, num_blocks * GRAM_BLOCK :]
    gram = (rest @ rest.t()).double()
    # One launch for many small products; no more at once than there is room for.
    for blocks in whole.split(max(1, GRAMS_AT_ONCE // max(1, len(b_nV)) ** 2)):
        gram += torch.bmm(blocks, blocks.mT).double().sum(0)
    return gram
