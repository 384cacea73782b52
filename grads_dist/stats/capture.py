"""Reads a layer's input and its output's gradient in one place, in the backward pass.

An autograd function on the layer's output keeps a reference to its input; its backward sees both, once per
layer and pass, also when gradient checkpointing runs the forward twice.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Sink = Callable[[Tensor, Tensor], None]
"""Takes a layer's input and the gradient at its output."""

LINEAR = torch._C._nn.linear
"""torch's own linear function: DeepSpeed puts another in its place, whose inside cannot be seen."""


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


Tap = Callable[[Tensor, Tensor], Tensor | None]
"""From a layer's input and output to what takes the output's place; None leaves it alone."""


def captured(layer_input: Tensor, output: Tensor, sink: Sink) -> Tensor:
    """`output`, whose backward pass calls `sink(layer_input, gradient at output)`.

    It is made to require grad when nothing before it does, so that frozen weights can be read and the
    backward pass ends at the lowest captured layer.
    """
    if not output.requires_grad:
        output = output.detach().requires_grad_(True)
    return _Capture.apply(output, layer_input.detach(), sink)


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A module's first argument, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def tap_output(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Pass a module's first input and its output through `tap` in every forward pass that records
    gradients; returns what undoes it."""

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        return tap(first_input(args, kwargs), output)

    # Before DeepSpeed's hooks, which let go of the weight that a check of the layer needs.
    return module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove


class Replacement:
    """What stands in for a module's forward pass; a deep copy of the module gets the module's own instead."""

    def __init__(self, call: Callable[..., Any], forward: Callable[..., Any]) -> None:
        update_wrapper(self, forward)
        self._call, self._forward = call, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The copied module's own forward pass: ours would compute with the weights of the original."""
        return deepcopy(self._forward, memo)


def tap_call(
    module: nn.Module, function: Callable, parameter: Tensor, tap: Tap, active: Callable[[], bool]
) -> Callable[[], None]:
    """Pass a call of `function` on `parameter` that a module's forward makes through `tap`, while `active()`.

    For modules whose own input and output say nothing of a parameter's gradient, such as a router that
    returns the chosen experts. `function` is LINEAR, torch.nn.functional.embedding, torch.Tensor.expand...;
    `tap` gets its first argument and its output. Returns what undoes it.
    """
    forward, owned = module.forward, "forward" in vars(module)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not active():
            return forward(*args, **kwargs)
        patched = nn.functional.linear
        nn.functional.linear = LINEAR
        try:
            with _CallTap(function, parameter, tap):
                return forward(*args, **kwargs)
        finally:
            nn.functional.linear = patched

    module.forward = Replacement(watched, forward)

    def undo() -> None:
        # The class' own again, unless an instance had its own before.
        if owned:
            module.forward = forward
        else:
            del module.forward

    return undo


class _CallTap(TorchFunctionMode):
    """Sees every torch function that is called while it is active."""

    def __init__(self, function: Callable, parameter: Tensor, tap: Tap) -> None:
        super().__init__()
        self._function, self._parameter, self._tap = function, parameter, tap

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not self._function or not any(self._is_parameter(x) for x in args):
            return output
        replaced = self._tap(args[0], output)
        return output if replaced is None else replaced

    def _is_parameter(self, x: object) -> bool:
        """The parameter, a view of all of it, or (of its shape) a copy in another type."""
        if not isinstance(x, Tensor) or x.numel() != self._parameter.numel():
            return False
        return x.data_ptr() == self._parameter.data_ptr() or x.shape == self._parameter.shape
