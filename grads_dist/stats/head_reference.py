"""What the head's kernels compute, in plain torch, on any device and in any floating type.

Shape legend: S samples, m label positions of one chunk, V vocabulary, v rows of one block of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_gradient(
    logits_mv: Tensor, targets_m: Tensor, logsumexp_m: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    """Turn logits into softmax minus the one-hot target, in place; each row's loss and sum of squares.

    Args:
        logits_mv: logits of the tokens from `first` on.
        targets_m: token of each position; where it is not among those columns the loss is 0.
        logsumexp_m: over all tokens; None where `logits_mv` has them all.
    """
    if logsumexp_m is None:
        logsumexp_m = logits_mv.logsumexp(1)
    rows = torch.arange(len(logits_mv), device=logits_mv.device)
    columns = targets_m - first
    inside = (columns >= 0) & (columns < logits_mv.shape[1])
    columns.clamp_(0, logits_mv.shape[1] - 1)
    loss = torch.where(inside, logsumexp_m - logits_mv[rows, columns], 0.0)
    logits_mv.sub_(logsumexp_m[:, None]).exp_()
    logits_mv[rows, columns] -= inside.to(logits_mv.dtype)
    return loss, torch.linalg.vector_norm(logits_mv, dim=1).square()


def column_bounds(
    gradient_mV: Tensor, row_weights_m: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """sqrt(sum_t d_tv^2) and sum_t |d_tv| w_t for every sample and column [S, V], rounded to nearest."""
    norms, weighted = (gradient_mV.new_empty(len(lengths), gradient_mV.shape[1]) for _ in range(2))
    parts = zip(gradient_mV.split(list(lengths)), row_weights_m.split(list(lengths)), strict=True)
    for sample, (d_nV, weights_n) in enumerate(parts):
        # Products with a vector: torch's reductions over the first axis are many times slower.
        torch.mv(d_nV.square().t(), torch.ones_like(weights_n), out=norms[sample])
        torch.mv(d_nV.abs().t(), weights_n, out=weighted[sample])
    return norms.sqrt_(), weighted
