"""Where the host would wait for a GPU, counted on a CPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grads_dist

PACKAGE = Path(grads_dist.__file__).parent
TO_HOST = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""Methods of tensors."""
OF_UNKNOWN_SIZE = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave",
}
"""Operators whose results have as many elements as values on the device say."""
NUMBER = "aten::_local_scalar_dense"


class Waits:
    """While it is entered, counts the places in the package at which the host asks for values of tensors.

    An index of truth values asks for their places. What the inside of a custom operator asks for by an
    operator of its own is not seen.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        """As `file.py:function what`."""
        self.inside = False
        self._open = ExitStack()

    def __enter__(self) -> Waits:
        # Not by a mode for functions of torch: those are not seen in a backward pass.
        for name in TO_HOST:
            method = self._counted(name, getattr(torch.Tensor, name))
            self._open.enter_context(mock.patch.object(torch.Tensor, name, method, create=True))
        self._open.enter_context(_Operators(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, what: str) -> None:
        """Count one at the innermost place in the package."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        code = None if frame is None else frame.f_code
        place = "elsewhere" if code is None else f"{Path(code.co_filename).name}:{code.co_name}"
        self.places[f"{place} {what}"] += 1

    def _counted(self, name: str, method: Callable) -> Callable:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return method(x, *args, **kwargs)
            self.add(name)
            # What is below it is the same wait.
            self.inside = True
            try:
                return method(x, *args, **kwargs)
            finally:
                self.inside = False

        return call


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        waits = name == NUMBER or (name in OF_UNKNOWN_SIZE and kwargs.get("output_size") is None)
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if waits and not self._waits.inside:
            self._waits.add(name.removeprefix("aten::"))
        return func(*args, **kwargs)
