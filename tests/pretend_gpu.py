"""A device that is not the CPU, on a machine that has only one: tensors of the host in a wrapper.

Numbers are those of the CPU. What a GPU would refuse is refused: operators on tensors of the host and of the
device together, and reading a tensor of the device on the host without copying it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from grads_dist.stats import operators

NAME = "pretend"
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.set_.source_Tensor}
"""Operators that take tensors of two devices."""


@cache
def device() -> torch.device:
    """The device."""
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        x = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device(),
        )
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """Its values; a subclass has no such method."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """Where an emulated kernel finds it."""
        return self.inner.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """What a GPU's tensor says."""
        raise TypeError("a tensor of the device cannot be read on the host; use Tensor.cpu() first")


class _Mode(TorchDispatchMode):
    """Sees what makes tensors on the device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[torch.device]:
    """The device is there inside the block. It has to be made before the process' first backward pass."""
    found = device()
    # torch.tensor(..., device=) hides its copy from modes without this.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield found
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


OURS: dict[str, Callable] = {
    f"grads_dist::{name}": operator._init_fn
    for name, operator in vars(operators).items()
    if isinstance(operator, torch.library.CustomOpDef)
}
"""Our own operators, into which one has to look."""


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = func.name().partition(".")[0]
    if name in OURS:
        with _Mode():
            return OURS[name](*args, **kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    here = [x for x in tensors if not isinstance(x, OnDevice)]
    there = len(tensors) - len(here)
    # A number of the host is no tensor to a GPU.
    if there and func not in COPIES and any(x.dim() for x in here):
        shapes = [tuple(x.shape) for x in here if x.dim()]
        raise RuntimeError(f"{name}: tensors {shapes} of the host among {there} of the device")
    to_device = there > 0
    if kwargs.get("device") is not None:
        to_device = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is torch.ops.aten.copy_.default:
        to_device = isinstance(args[0], OnDevice)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    if func is torch.ops.aten.histc.default:
        # Of integers only on GPUs, where transformers uses it.
        found = func(inner_args[0].float(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    else:
        found = func(*inner_args, **inner_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    if not to_device:
        return found
    return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator that writes into its argument returns: that argument."""
    schema = func._schema
    returned = [value.alias_info for value in schema.returns]
    if not returned or not all(alias is not None and alias.is_write for alias in returned):
        return None
    values = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    found = [
        values[argument.name]
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return found[0] if len(found) == 1 else tuple(found)
