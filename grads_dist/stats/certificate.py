"""Statistics of an LM head's gradient without forming it: Gram matrices, and rows ruled out by a bound.

G = B^T A has a row for each of V tokens, B being the loss gradient at the logits [n, V] and A the hidden
states [n, D] of one sample's n label positions. The sum of squares is that of products of two Gram matrices,
sum_ts (B_t . B_s) (A_t . A_s). The extremes need elements, but few: no element of row v exceeds

    min(|B_v| max_j |A_j|,  sum_t |B_tv| max_j |A_tj|)

(|.| of a column is its norm), and after softmax most rows are bounded by almost nothing. Rows are formed in
the order of their bounds until the next bound is below both the largest element found and minus the smallest;
then no other row can hold an extreme. The result is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_ROWS = 256
"""Rows that are formed before the first look at the bound; four times as many before each further look."""

LARGEST_SHARE = 0.25
"""Of the rows: where more would have to be formed, all of them are, by the full product."""

SLACK = 1.0 + 1e-5
"""On the bound, for the rounding of bounds and elements in float32."""

GRAM_BLOCK = 1024
"""Rows of the vocabulary that are summed in float32 in a Gram matrix."""

PASSES = 100.0
"""What the bounds' passes over B cost, in multiplications with one element of it."""


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


def certified_statistics(
    b_nV: Tensor, a_nD: Tensor, targets_n: Tensor, skipped: Tensor | None = None
) -> Certified | None:
    """Statistics of B^T A, float64 scalars; None where too many rows would have to be formed.

    Args:
        b_nV: gradient at the logits, float32 or float64; changed while this runs, and restored.
        a_nD: hidden states, of the same type.
        targets_n: the token that each position is to predict.
        skipped: rows of G that do not belong to it.

    Non-finite input gives a sum of squares that is not finite, or None.
    """
    bounds_V = _bounds(b_nV, a_nD)
    if skipped is not None:
        bounds_V[skipped] = -1.0
    extremes: list[Tensor] = []
    formed, wanted = 0, FIRST_ROWS
    most = LARGEST_SHARE * (b_nV.shape[1] - (0 if skipped is None else len(skipped)))
    while wanted <= most:
        top = torch.topk(bounds_V, wanted)
        rows = b_nV.index_select(1, top.indices[formed:]).t() @ a_nD
        extremes += torch.aminmax(rows)
        formed = wanted
        low, high = torch.stack(extremes[::2]).min(), torch.stack(extremes[1::2]).max()
        if top.values[-1] <= torch.minimum(high, -low):
            return Certified(gram_sumsq(b_nV, a_nD, targets_n, skipped), low.double(), high.double(), formed)
        wanted *= 4
    return None


def gram_sumsq(b: Tensor, a: Tensor, targets_n: Tensor, skipped: Tensor | None = None) -> Tensor:
    """The sum of squares alone, a float64 scalar; arguments as for `certified_statistics`."""
    if skipped is not None:
        others = b.index_select(1, skipped)
        b.index_fill_(1, skipped, 0)
    rows = torch.arange(len(b), device=b.device)
    own = b[rows, targets_n]
    # The target's element is near -1 and the others near 1/V: summed in float32 they would vanish beside it.
    b[rows, targets_n] = 0
    # float64 from block to block, for the same reason.
    gram = torch.stack([(part @ part.t()).double() for part in b.split(GRAM_BLOCK, dim=1)]).sum(0)
    cross = (b.index_select(1, targets_n) * own).double()
    b[rows, targets_n] = own
    if skipped is not None:
        b.index_copy_(1, skipped, others)
    same = targets_n[:, None] == targets_n
    gram = gram + cross + cross.t() + torch.outer(own, own).double() * same
    return (gram * (a @ a.t()).double()).sum()


def _bounds(b: Tensor, a: Tensor) -> Tensor:
    # Products with a vector: torch's reductions over the first axis are many times slower.
    column_norm = torch.linalg.vector_norm(a, dim=0).max()
    by_norm = (b.new_ones(len(b)) @ b.square()).sqrt_().mul_(column_norm)
    by_sum = a.abs().amax(1) @ b.abs()
    return torch.minimum(by_norm, by_sum).mul_(SLACK)
