"""Linear layers whose weight gradient is summed from the products that their statistics are taken of.

Training needs sum_s G_s, the statistics need every G_s: one product serves both. The layer's forward is
replaced by an autograd function of the same value, whose backward hands the layer's input and the gradient at
its output to a sink and gets the weight's gradient from it. It sees the parameter itself, as DeepSpeed's own
linear function does, so that ZeRO stage 3 can let go of the weight in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grads_dist.stats.capture import LINEAR, Replacement, Tap, first_input

WeightSink = Callable[[Tensor, Tensor], Tensor]
"""Takes a layer's input and the gradient at its output; gives the weight's gradient [outputs, inputs]."""


def can_share(module: nn.Module) -> bool:
    """Whether the layer is a plain linear one, by its class' own forward, whose weight is being trained."""
    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    return plain and bool(module.weight.requires_grad)


def share_gradient(
    module: nn.Module, sink: WeightSink, tap: Tap, active: Callable[[], bool]
) -> Callable[[], None]:
    """Take the weight's gradient from `sink` in every pass that is made while `active()`; returns the undo.

    Where the weight has been frozen since, the output goes through `tap` instead.
    """
    forward = module.forward
    transposed = isinstance(module, Conv1D)

    def shared(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not active():
            return forward(*args, **kwargs)
        layer_input = first_input(args, kwargs)
        if not module.weight.requires_grad:
            output = forward(layer_input)
            replaced = tap(layer_input, output)
            return output if replaced is None else replaced
        return _SharedLinear.apply(layer_input, module.weight, module.bias, transposed, sink)

    module.forward = Replacement(shared, forward)

    def undo() -> None:
        del module.forward

    return undo


class _SharedLinear(torch.autograd.Function):
    """x W^T + b (x W + b when `transposed`)."""

    @staticmethod
    def forward(
        ctx: Any, layer_input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, sink: WeightSink
    ) -> Tensor:
        ctx.save_for_backward(layer_input, weight)
        ctx.transposed, ctx.sink = transposed, sink
        ctx.bias_dtype = None if bias is None or not bias.requires_grad else bias.dtype
        return LINEAR(layer_input, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer_input, weight = ctx.saved_tensors
        with torch.no_grad():
            grad_weight = ctx.sink(layer_input.detach(), grad)
        grad_weight = grad_weight.t() if ctx.transposed else grad_weight
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Under autocast the output is of another type than the weight.
            used = (weight.t() if ctx.transposed else weight).to(grad.dtype)
            grad_input = (grad @ used).to(layer_input.dtype)
        if ctx.bias_dtype is not None:
            grad_bias = grad.flatten(0, -2).sum(0, dtype=grad_weight.dtype).to(ctx.bias_dtype)
        return grad_input, grad_weight.to(weight.dtype), grad_bias, None, None
