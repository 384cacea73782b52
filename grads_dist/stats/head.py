"""The LM head's loss as one autograd function that also yields per-sample gradient statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grads_dist.stats.head_pass import HeadPass
from grads_dist.stats.head_request import HeadRequest, HeadResult


class HeadLoss(torch.autograd.Function):
    """Weighted sum of the samples' mean cross-entropies; fills a HeadResult on the way.

    Everything that needs the weight happens in `forward`, because under ZeRO-3 the weight exists only there;
    `backward` multiplies finished gradients by one number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        request: HeadRequest,
        result: HeadResult,
    ) -> Tensor:
        """All chunks: losses, statistics, and the gradients by the weighted total."""
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        pass_ = HeadPass(hidden_MD, weight_VD, bias_V, targets_M, request, result)
        pass_.allocate(need_hidden, need_weight, need_bias)
        pass_.run()
        ctx.result = result
        ctx.sample_weights = request.sample_weights
        ctx.save_for_backward(pass_.grad_hidden, pass_.grad_weight, pass_.grad_bias)
        ctx.dtypes = (hidden_MD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total = (result.losses.double() * request.sample_weights).sum()
        return total.to(result.losses.dtype)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """The finished gradients, times the one at the total."""
        ctx.result.factors = ctx.sample_weights * grad_total.double()
        grads = [
            None if g is None else g.mul_(grad_total).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None)
