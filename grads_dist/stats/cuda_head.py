"""The LM head's softmax gradient, and bounds of its weight gradient's rows, by CUDA kernels.

Every function queues its work on the current stream and returns without waiting for it.

Shape legend: S samples, M label positions packed by sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grads_dist.stats import cuda_launch
from grads_dist.stats.cuda_launch import SUFFIXES, address, fours_aligned, offsets_tensor
from grads_dist.stats.cuda_params import ColumnBoundsParams, SoftmaxGradientParams
from grads_dist.stats.tensors import rows_contiguous

SOFTMAX_THREADS, BOUND_THREADS = 512, 128
"""kRowThreads and kBoundThreads of head.cu."""


@dataclass(frozen=True)
class SoftmaxRows:
    """`gradient` [M, V] is softmax minus the one-hot target; per row its sum and sum of squares in float64,
    the logits' logsumexp and the loss in float32."""

    gradient: Tensor
    logsumexp: Tensor
    loss: Tensor
    sum: Tensor
    sumsq: Tensor


def softmax_gradient(logits_MV: Tensor, targets_M: Tensor, out_MV: Tensor | None = None) -> SoftmaxRows:
    """Gradient of each row's cross-entropy by its logits.

    Args:
        logits_MV: float32 or bfloat16, rows contiguous; overwritten by the gradient unless `out_MV` is given.
        targets_M: int64; a row whose target is not in [0, V) gets a loss that is not a number.
        out_MV: of the logits' type, or float32.
    """
    out = logits_MV if out_MV is None else out_MV
    assert logits_MV.stride(1) == out.stride(1) == 1 and targets_M.dtype == torch.int64
    targets = targets_M.contiguous()
    names = list(dict.fromkeys((SUFFIXES[logits_MV.dtype], SUFFIXES[out.dtype])))
    num_rows, device = logits_MV.shape[0], logits_MV.device
    logsumexp, loss = (torch.empty(num_rows, device=device) for _ in range(2))
    sums, sumsq = torch.empty(2, num_rows, dtype=torch.float64, device=device)
    params = SoftmaxGradientParams(
        logits=address(logits_MV),
        gradient=address(out),
        ld_logits=logits_MV.stride(0),
        ld_gradient=out.stride(0),
        targets=address(targets),
        logsumexp=address(logsumexp),
        loss=address(loss),
        sum=address(sums),
        sumsq=address(sumsq),
        num_cols=logits_MV.shape[1],
        aligned=fours_aligned(logits_MV) and fours_aligned(out),
    )
    if num_rows:
        kernel = "_".join(["softmax_gradient", *names])
        cuda_launch.launcher_for(device).launch("head.cu", kernel, params, (num_rows, 1), SOFTMAX_THREADS)
    return SoftmaxRows(out, logsumexp, loss, sums, sumsq)


def column_bounds(gradient_MV: Tensor, row_weights_M: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Upper bounds of sqrt(sum_t d_tv^2) and of sum_t |d_tv| w_t for every sample and column, float32 [S, V].

    With w_t = max_j |a_tj| (float32) the second bounds every element of row v of G_s; so does the first times
    the largest column norm of A_s. Both are rounded upwards, by no more than 2^-23 (rows + 4) of themselves.
    """
    gradient = rows_contiguous(gradient_MV)
    num_samples, num_cols, device = len(lengths), gradient.shape[1], gradient.device
    norms, weighted = (torch.empty(num_samples, num_cols, device=device) for _ in range(2))
    offsets, row_weights = offsets_tensor(lengths, device), row_weights_M.contiguous()
    blocks = -(-num_cols // (4 * BOUND_THREADS))
    params = ColumnBoundsParams(
        gradient=address(gradient),
        ld=gradient.stride(0),
        row_weights=address(row_weights),
        offsets=address(offsets),
        norms=address(norms),
        weighted=address(weighted),
        num_cols=num_cols,
        blocks_per_sample=blocks,
        aligned=fours_aligned(gradient),
    )
    if num_samples:
        kernel = f"column_bounds_{SUFFIXES[gradient.dtype]}"
        cuda_launch.launcher_for(device).launch(
            "head.cu", kernel, params, (num_samples * blocks, 1), BOUND_THREADS
        )
    return norms, weighted
