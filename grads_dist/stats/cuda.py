"""Statistics of outer products by CUDA kernels (kernels/cuda/outer_product.cu, outer_product_sm90.cu).

The work is queued on the current stream, and nothing waits for it. Results lie on the inputs' device; squares
beyond float32 and non-finite elements are dealt with in the kernels.

Shape legend: S samples, N packed rows, P outputs and D inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grads_dist.stats import cuda_launch
from grads_dist.stats.cuda_launch import Results, empty_partials, offsets_tensor, on_16_bytes
from grads_dist.stats.cuda_outer import Operands, first_stage
from grads_dist.stats.cuda_rows import row_sums
from grads_dist.stats.cuda_tile import PARTIAL_BYTES
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.tensors import to_device

TYPES = (torch.bfloat16, torch.float16)
"""Types that `outer_product_stats` takes."""
PARTIALS_LIMIT = 256 << 20
"""Bytes of partials of one launch; more samples take more launches."""


def outer_product_stats(
    b_NP: Tensor,
    a_ND: Tensor,
    lengths: Sequence[int],
    total_PD: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Statistics:
    """Statistics of G_s = B_s^T A_s for every sample.

    Args:
        b_NP, a_ND: bfloat16 or float16, both of one type; rows not on 16-byte boundaries are copied.
        lengths: rows of every sample; a sample without rows has a zero gradient.
        total_PD: float32, rows contiguous; gets sum_s weights[s] G_s added.
        weights: one a sample; None for ones.
    """
    assert b_NP.dtype == a_ND.dtype and b_NP.dtype in TYPES and b_NP.shape[0] == a_ND.shape[0] == sum(lengths)
    assert total_PD is None or (total_PD.dtype == torch.float32 and total_PD.stride(1) == 1)
    launcher = cuda_launch.launcher_for(b_NP.device)
    b, a = on_16_bytes(b_NP), on_16_bytes(a_ND)
    assert max(b.stride(0), a.stride(0)) < 2**30, "rows of 2 GiB"
    offsets, num_samples = offsets_tensor(lengths, b.device), len(lengths)
    factors = to_device(weights or [1.0] * num_samples, torch.float32, b.device)
    results = Results(num_samples, b.device)
    stage = first_stage(launcher, Operands(b, a, offsets, total_PD, factors))
    slots = stage.grid(1).partials_per_sample
    per_launch = max(1, PARTIALS_LIMIT // (slots * PARTIAL_BYTES))
    partials = empty_partials(min(per_launch, num_samples) * slots, b.device)
    # The sum needs no product: sum_t (sum_j b_tj) (sum_k a_tk).
    sums = row_sums(b_NP)[0], row_sums(a_ND)[0]
    for first in range(0, num_samples, per_launch):
        count = min(per_launch, num_samples - first)
        stage.launch(partials, first, count)
        now = range(first, first + count)
        results.join(launcher, partials, now, slots=slots, offsets=offsets, factors=sums)
    return results.statistics()
