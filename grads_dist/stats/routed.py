"""Which tokens a module got that sees only a part of them: one expert of a mixture kept as a list of modules.

Such a layer copies the rows of its tokens out of the batch and hands them to the expert; which rows they were
is known to the copy's node in the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grads_dist.errors import ConfigError
from grads_dist.stats.capture import first_input

_PASSED_THROUGH = (
    "View",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Clone",
    "Copy",
    "Capture",
    "PostBackward",
    "PreBackward",
)
"""Parts of the names of nodes that leave the rows as they are."""


def source_rows(rows_RD: Tensor, batch_ND: Tensor) -> Tensor | None:
    """For each row of `rows_RD` [R, D] the row of `batch_ND` [N, D] that it is a copy of, int64 [R].

    None where the autograd graph does not tell.
    """
    node: Any = rows_RD.grad_fn
    while node is not None:
        name = type(node).__name__
        if name.startswith("Index"):
            index = _index_of(node)
            return index if index is not None and _copies(rows_RD, batch_ND, index) else None
        if not any(part in name for part in _PASSED_THROUGH):
            return None
        node = node.next_functions[0][0]
    return None


def _index_of(node: Any) -> Tensor | None:
    if hasattr(node, "_saved_index"):
        return node._saved_index
    indices = [index for index in getattr(node, "_saved_indices", ()) if index is not None]
    if len(indices) != 1:
        return None
    (index,) = indices
    return index.nonzero().squeeze(1) if index.dtype == torch.bool else index


def _copies(rows_RD: Tensor, batch_ND: Tensor, index: Tensor) -> bool:
    """The graph may have been misread; the values cannot be."""
    rows = rows_RD.detach().reshape(-1, rows_RD.shape[-1])
    batch = batch_ND.detach().reshape(-1, rows.shape[-1])
    if index.dim() != 1 or len(index) != len(rows):
        return False
    # It may be one of a tensor with every token several times.
    inside = not len(index) or int(index.max()) < len(batch)
    return inside and torch.equal(batch[index], rows)


def expert_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that keep their experts as a list of modules, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.ModuleList)
    }


def give_idle_experts_gradients(model: nn.Module) -> None:
    """Give the trained weights of experts that a batch does not reach a zero gradient instead of none.

    DeepSpeed's stages 1 and 2 reduce gradients in the order in which they come; a rank that lacks one would
    add others' to the wrong weights.
    """
    for block in expert_blocks(model).values():
        reached: set[nn.Module] = set()
        block.register_forward_pre_hook(lambda _, args, reached=reached: reached.clear())
        for expert in block.experts:  # type: ignore[union-attr]
            expert.register_forward_pre_hook(lambda module, args, reached=reached: reached.add(module))
        block.register_forward_hook(partial(_touch_idle_experts, reached))


def _touch_idle_experts(reached: set[nn.Module], block: Any, _: tuple, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return None
    idle = (p for expert in block.experts if expert not in reached for p in expert.parameters())
    zeros = [p.flatten()[0] * 0 for p in idle if p.requires_grad]
    if not zeros:
        return None
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    hidden = hidden + torch.stack(zeros).sum().to(hidden.dtype)
    return (hidden, *rest) if isinstance(output, tuple) else hidden


class RoutedModules:
    """Knows, for wanted modules inside an expert, which tokens the present pass brought there."""

    def __init__(self, model: nn.Module, wanted: Iterable[str], active: Callable[[], bool]) -> None:
        self._active = active
        self._expert_of: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor | None] = {}
        self._handles = []
        for block_name, block in expert_blocks(model).items():
            prefix = f"{block_name}.experts."
            inside = [name for name in wanted if name.startswith(prefix)]
            experts = {name: prefix + name.removeprefix(prefix).partition(".")[0] for name in inside}
            self._expert_of.update(experts)
            if not experts:
                continue
            enter = partial(self._enter_block, block_name)
            self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            for expert in sorted(set(experts.values())):
                hook = partial(self._enter_expert, block_name, expert)
                handle = model.get_submodule(expert).register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)

    def may_be_idle(self, name: str) -> bool:
        """Whether a batch need not reach the module `name`."""
        return name in self._expert_of

    def rows_of(self, name: str) -> Tensor | None:
        """The slots of the batch that are the rows of the module's input; None where it sees all tokens."""
        return self._rows.get(self._expert_of[name]) if name in self._expert_of else None

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Let go of the last pass' inputs."""
        self._inputs, self._rows = {}, {}

    def _enter_block(self, name: str, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._active() or not torch.is_grad_enabled():
            return None
        hidden = first_input(args, kwargs)
        if not hidden.requires_grad:
            # Without a graph nobody could say which rows an expert gets.
            hidden = hidden.detach().requires_grad_(True)
        self._inputs[name] = hidden.detach()
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, next(iter(kwargs)): hidden}

    def _enter_expert(self, block: str, expert: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._active() or not torch.is_grad_enabled():
            return
        batch, rows = self._inputs[block], first_input(args, kwargs)
        if rows.numel() == batch.numel() and torch.equal(rows.detach().flatten(), batch.flatten()):
            self._rows[expert] = None
            return
        self._rows[expert] = source_rows(rows, batch)
        if self._rows[expert] is None:
            raise ConfigError(
                f"probe.targets: {expert} gets its tokens in a way that has no rule; leave the experts out "
                f"with a pattern"
            )
