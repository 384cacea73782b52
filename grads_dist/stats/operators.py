"""torch operators behind ops.py: each hands its arguments to the backend that was chosen for them.

The first three return sum, sum of squares, minimum and maximum of every sample, float64 [S], and how many
elements are not finite. Only the CUDA kernels count those themselves; with the other backends that number
is 0. The other two are steps of the LM head's pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grads_dist.stats import cuda, cuda_head, cuda_rows, head_reference, native, reference
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.tensors import rows_contiguous


@torch.library.custom_op("grads_dist::outer_product_stats", mutates_args=("total_PD",))
def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: Sequence[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Numbers of every sample's B_s^T A_s; `total_PD` gets their weighted sum added."""
    if backend == "cuda":
        return _five_numbers(cuda.outer_product_stats(b_NP, a_ND, lengths, total_PD, weights))
    if backend == "reference":
        return _uncounted(reference.outer_product_stats(b_NP, a_ND, lengths, total_PD, weights))
    b_NP, a_ND = rows_contiguous(b_NP), rows_contiguous(a_ND)
    return _uncounted(native.outer_product_stats(b_NP, a_ND, lengths, total_PD, weights))


@outer_product_stats.register_fake
def _(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: Sequence[int],
    total_PD: Tensor | None,
    weights: Sequence[float] | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_numbers(b_NP, len(lengths))


@torch.library.custom_op("grads_dist::row_sum_stats", mutates_args=())
def row_sum_stats(
    b_ND: Tensor,
    x_ND: Tensor | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: Sequence[int],
    norm: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Numbers of each sample's sums of rows (native.row_sum_stats)."""
    rest = (order_N, run_offsets, sample_runs, norm, eps)
    if backend == "cuda":
        return _five_numbers(cuda_rows.row_sum_stats(b_ND, x_ND, *rest))
    if backend == "reference":
        return _uncounted(reference.row_sum_stats(b_ND, x_ND, *rest))
    x_ND = None if x_ND is None else rows_contiguous(x_ND)
    return _uncounted(native.row_sum_stats(rows_contiguous(b_ND), x_ND, *rest))


@row_sum_stats.register_fake
def _(
    b_ND: Tensor,
    x_ND: Tensor | None,
    order_N: Tensor | None,
    run_offsets: Tensor,
    sample_runs: Sequence[int],
    norm: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_numbers(b_ND, len(sample_runs))


@torch.library.custom_op("grads_dist::embedding_stats", mutates_args=())
def embedding_stats(
    b_ND: Tensor, ids_N: Tensor, lengths: Sequence[int], num_embeddings: int, padding_idx: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Numbers of each sample's embedding gradient (cuda_rows.embedding_stats), by the CUDA kernels alone."""
    runs = cuda_rows.find_runs(ids_N, list(lengths), num_embeddings, padding_idx)
    return _five_numbers(cuda_rows.embedding_stats(b_ND, runs, num_embeddings))


@embedding_stats.register_fake
def _(
    b_ND: Tensor, ids_N: Tensor, lengths: Sequence[int], num_embeddings: int, padding_idx: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_numbers(b_ND, len(lengths))


@torch.library.custom_op("grads_dist::softmax_gradient", mutates_args=("logits_mv", "out_mv"))
def softmax_gradient(
    logits_mv: Tensor,
    targets_m: Tensor,
    logsumexp_m: Tensor | None,
    out_mv: Tensor | None,
    first: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Each row's loss and sum of squares of its softmax minus one-hot (head_reference.softmax_gradient).

    That gradient overwrites the logits, or goes to `out_mv`. The CUDA kernel takes whole rows only, and can
    have bfloat16 logits and a float32 `out_mv`.
    """
    if backend != "cuda":
        assert out_mv is None
        return head_reference.softmax_gradient(logits_mv, targets_m, logsumexp_m, first)
    assert first == 0 and logsumexp_m is None
    rows = cuda_head.softmax_gradient(logits_mv, targets_m, out_mv)
    return rows.loss, rows.sumsq.float()


@softmax_gradient.register_fake
def _(
    logits_mv: Tensor,
    targets_m: Tensor,
    logsumexp_m: Tensor | None,
    out_mv: Tensor | None,
    first: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    like = logits_mv if out_mv is None else out_mv
    return like.new_empty(len(like)), like.new_empty(len(like))


@torch.library.custom_op("grads_dist::column_bounds", mutates_args=())
def column_bounds(
    gradient_mV: Tensor, row_weights_m: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    """sqrt(sum_t d_tv^2) and sum_t |d_tv| w_t for every sample and column; not below that on CUDA."""
    if backend == "cuda":
        return cuda_head.column_bounds(gradient_mV, row_weights_m, list(lengths))
    norms, weighted = head_reference.column_bounds(gradient_mV, row_weights_m, lengths)
    return norms, weighted


@column_bounds.register_fake
def _(
    gradient_mV: Tensor, row_weights_m: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    shape = (len(lengths), gradient_mV.shape[1])
    return gradient_mV.new_empty(shape), gradient_mV.new_empty(shape)


def _five_numbers(stats: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return stats.sum, stats.sumsq, stats.min, stats.max, stats.nonfinite


def _uncounted(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # No two outputs of an operator may be one tensor.
    total, sumsq, low, high = found
    return total, sumsq.clone(), low.clone(), high.clone(), torch.zeros_like(total, dtype=torch.int64)


def _fake_numbers(like: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    numbers = [like.new_empty(num_samples, dtype=torch.float64) for _ in range(4)]
    nonfinite = like.new_empty(num_samples, dtype=torch.int64)
    return numbers[0], numbers[1], numbers[2], numbers[3], nonfinite
