"""Reads a layer's input and its output's gradient in one place, in the backward pass.

An autograd function on the layer's output keeps a reference to its input; its backward sees both, once per
layer and pass, also when gradient checkpointing runs the forward twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Sink = Callable[[Tensor, Tensor], None]
"""Takes a layer's input and the gradient at its output."""


class _Capture(torch.autograd.Function):
    """Identity whose backward hands (input, output gradient) to a sink."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.sink = sink
        # Shares memory like a view without being one to autograd: models modify such outputs in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (layer_input,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.sink(layer_input, grad)
        return grad, None, None


def capture(
    module: nn.Module,
    sink: Sink,
    active: Callable[[], bool],
    check: Callable[[Tensor, Tensor], None] | None = None,
) -> RemovableHandle:
    """Call `sink(input, output gradient)` in every backward pass through `module` while `active()`.

    The output is made to require grad when nothing before it does, so that frozen weights can be read and
    the backward pass ends at the lowest captured layer. `check(input, output)` runs in the forward pass.
    """

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not active() or not torch.is_grad_enabled():
            return None
        layer_input = args[0] if args else next(iter(kwargs.values()))
        if check is not None:
            with torch.no_grad():
                check(layer_input, output)
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        return _Capture.apply(output, layer_input.detach(), sink)

    return module.register_forward_hook(hook, with_kwargs=True)
