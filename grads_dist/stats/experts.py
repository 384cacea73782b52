"""Reads the fused experts of a mixture: the weights of all experts of a layer in one parameter.

No module's output shows the inside of such a layer. transformers lets an implementation of its computation be
registered; ours sorts the routed rows by expert, as the others do, and captures both linear maps.

Shape legend: N tokens of the batch, R = N * top_k routed rows, E experts, D hidden size, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grads_dist.stats.capture import captured
from grads_dist.stats.gradients import Grouped, OuterProduct, SampleGradient, VectorSum
from grads_dist.stats.segments import BatchLayout, Segments, counts_of_sorted
from grads_dist.stats.tensors import to_device

IMPLEMENTATION = "grads_dist"
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Routed:
    """Rows sorted by expert: the token each was copied from, its expert, and rows an expert."""

    tokens_R: Tensor
    experts_R: Tensor
    segments: Segments


Sink = Callable[[str, Tensor, Tensor, Routed], None]
"""Takes a parameter's local name, its input rows, the gradient at its output rows, and whose they are."""

_WATCHED: WeakKeyDictionary[nn.Module, list[Callable[[], Sink | None]]] = WeakKeyDictionary()


def is_fused_experts(module: nn.Module) -> bool:
    """Whether transformers can exchange this module's computation."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate")


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Local names of the parameters that can be read."""
    names = [name for name in PARAMETERS if hasattr(module, name)]
    return tuple(names + [f"{name}_bias" for name in names if hasattr(module, f"{name}_bias")])


def watch_experts(module: nn.Module, sink: Callable[[], Sink | None]) -> Callable[[], None]:
    """Have the layer's inside read in every forward pass for which `sink()` is not None; returns the undo."""
    watchers = _WATCHED.setdefault(module, [])
    watchers.append(sink)
    config: Any = module.config
    before = config._experts_implementation
    config._experts_implementation = IMPLEMENTATION

    def undo() -> None:
        watchers.remove(sink)
        if before != IMPLEMENTATION:
            config._experts_implementation = before

    return undo


def expert_gradients(
    parameter: str, a_RD: Tensor, b_RP: Tensor, routed: Routed, layout: BatchLayout
) -> dict[str, SampleGradient]:
    """The stacked gradients of all experts' weights `parameter`, and of their biases."""
    num_experts = len(routed.segments)
    order, segments = layout.pack_groups(routed.tokens_R, routed.experts_R, num_experts)
    b, a = b_RP.index_select(0, order), a_RD.index_select(0, order)
    return {
        parameter: Grouped(OuterProduct(b, a, segments), num_experts),
        f"{parameter}_bias": Grouped(VectorSum(b, segments), num_experts),
    }


def experts_forward(self: Any, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What all fused experts of transformers compute, on the layer `self`: an experts implementation."""
    num_tokens, top_k = experts_NK.shape
    experts_R, order_R = torch.sort(experts_NK.flatten(), stable=True)
    segments = Segments(tuple(counts_of_sorted(experts_R, self.num_experts)))
    routed = Routed(order_R // top_k, experts_R, segments)
    watchers = _WATCHED.get(self, []) if torch.is_grad_enabled() else []
    sinks = [sink for watcher in watchers if (sink := watcher()) is not None]

    up = "gate_up_proj" if self.has_gate else "up_proj"
    rows_RF = _linear(self, up, hidden_ND.index_select(0, routed.tokens_R), routed, sinks)
    rows_RF = self._apply_gate(rows_RF) if self.has_gate else self.act_fn(rows_RF)
    rows_RD = _linear(self, "down_proj", rows_RF, routed, sinks)
    if self.has_post_expert_norm:
        rows_RD = self.post_expert_norm(rows_RD)
    rows_RD = rows_RD * weights_NK.flatten()[order_R][:, None]
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return rows_RD[back_R].view(num_tokens, top_k, -1).sum(1).to(hidden_ND.dtype)


def _linear(layer: Any, parameter: str, x_RD: Tensor, routed: Routed, sinks: list[Sink]) -> Tensor:
    """Every row through its expert's linear map, captured for all `sinks`."""
    weight = getattr(layer, parameter)
    weight_EDP = weight if layer.is_transposed else weight.transpose(1, 2)
    if x_RD.is_cuda and weight.dtype == torch.bfloat16:
        ends = to_device(routed.segments.offsets[1:], torch.int32, x_RD.device)
        output_RP = nn.functional.grouped_mm(x_RD.to(weight.dtype), weight_EDP, offs=ends)
    else:
        parts = zip(x_RD.split(routed.segments.lengths), weight_EDP.unbind(0), strict=True)
        output_RP = torch.cat([rows @ matrix for rows, matrix in parts])
    if layer.has_bias:
        output_RP = output_RP + getattr(layer, f"{parameter}_bias")[routed.experts_R]
    for sink in sinks:
        take = partial(_hand_on, sink, parameter, routed)
        output_RP = captured(x_RD, output_RP, take)
    return output_RP


def _hand_on(sink: Sink, parameter: str, routed: Routed, a_RD: Tensor, b_RP: Tensor) -> None:
    sink(parameter, a_RD, b_RP, routed)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
