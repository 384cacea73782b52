"""How each layer type turns its input and its output's gradient into per-sample gradients.

A rule is a function `(module, a, b, layout) -> {local parameter name: per-sample gradient}`, where `a` is the
layer's input and `b` the gradient at its output, both with leading axes [S, T] or [S * T]. `@rule` registers
it for a layer type; that is the whole way to teach grads_dist a new layer:

    @rule(MyLinear)
    def my_linear(module, a, b, layout):
        (b_NP, segments), (a_ND, _) = layout.pack(b, b.shape[-1]), layout.pack(a, a.shape[-1])
        return {"weight": OuterProduct(b_NP, a_ND, segments)}

The LM head is not here: in the engine its statistics come out of the loss (head.py). Neither are the fused
experts of a mixture (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grads_dist.stats import ops
from grads_dist.stats.capture import LINEAR
from grads_dist.stats.gradients import OuterProduct, SampleGradient, TouchedRows, VectorSum
from grads_dist.stats.segments import BatchLayout

Gradients = Callable[[nn.Module, Tensor, Tensor, BatchLayout], dict[str, SampleGradient]]
Check = Callable[[nn.Module, Tensor, Tensor], bool]


@dataclass(frozen=True)
class Rule:
    """How a layer's gradients are read.

    Args:
        gradients: the rule itself.
        parameters: local names of the parameters it is for.
        call: the function inside the layer's forward whose first argument and output are read; None for
            those of the layer itself.
        check: whether the layer's output is what the rule supposes of a layer known by name alone; called
            with (module, input, output) in the layer's first forward pass.
    """

    gradients: Gradients
    parameters: tuple[str, ...] = ("weight", "bias")
    call: Callable | None = None
    check: Check | None = None


RULES: dict[type[nn.Module], Rule] = {}

LINEAR_CLASSES = ("FalconLinear",)
"""Subclasses of nn.Linear in transformers that compute the same; any other might do something else."""


def rule(*module_types: type[nn.Module]) -> Callable[[Gradients], Gradients]:
    """Register a rule for the given layer types."""

    def register(function: Gradients) -> Gradients:
        RULES.update(dict.fromkeys(module_types, Rule(function)))
        return function

    return register


def rule_for(module: nn.Module, parameter: str) -> Rule | None:
    """The rule for `parameter` (its local name) of `module`, or None.

    A layer type that is not registered may be known by its name or its base class: every architecture of
    transformers has its own class for the same norm, and some for the same linear layer, embedding or router.
    """
    found = RULES.get(type(module)) or _known_by_kind(module, parameter)
    if type(module) is nn.Linear and has_own_forward(module):
        found = Rule(linear, check=check_linear)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None  # Its gain has a token axis, over which the rule would sum.
    return found if found is not None and parameter in found.parameters else None


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has replaced the forward pass of this one module, which may then do anything."""
    return "forward" in vars(module)


def _known_by_kind(module: nn.Module, parameter: str) -> Rule | None:
    name = type(module).__name__
    if parameter == "sinks":
        return Rule(attention_sinks, ("sinks",), call=torch.Tensor.expand)
    if is_rms_norm(module):
        return Rule(rms_norm, ("weight",), check=check_rms_norm)
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        inside = None if type(module) is nn.Embedding else nn.functional.embedding
        return Rule(embedding, ("weight",), call=inside) if plain else None
    if is_quantised(module):
        return None
    if isinstance(module, nn.Linear) and name in LINEAR_CLASSES:
        return Rule(linear, check=check_linear)
    if name.endswith(("Router", "Gate")) and isinstance(getattr(module, "weight", None), nn.Parameter):
        return Rule(linear, call=LINEAR)
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer's weight is packed integers, which have no gradient."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


@rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D)
def linear(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, SampleGradient]:
    """Weight: sum_t b_t a_t^T (Conv1D keeps it transposed, with the same elements). Bias: sum_t b_t."""
    b_NP, segments = layout.pack(b, b.shape[-1])
    a_ND, _ = layout.pack(a, a.shape[-1])
    return {"weight": OuterProduct(b_NP, a_ND, segments), "bias": VectorSum(b_NP, segments)}


def check_linear(module: nn.Module, a: Tensor, output: Tensor) -> bool:
    """Whether a subclass of nn.Linear computes what nn.Linear does."""
    expected = nn.functional.linear(a, module.weight, module.bias)  # type: ignore[arg-type]
    return _close(output, expected, a.dtype)


@rule(nn.LayerNorm)
def layer_norm(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, SampleGradient]:
    """Gain: sum_t b_t * xhat_t. Bias: sum_t b_t."""
    b_ND, segments = layout.pack(b, b.shape[-1])
    normalised = ops.Normalised(layout.pack(a, a.shape[-1])[0], "layer", module.eps)  # type: ignore[arg-type]
    return {"weight": VectorSum(b_ND, segments, normalised), "bias": VectorSum(b_ND, segments)}


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this is one of transformers' many RMS norms, or torch's."""
    return type(module).__name__.endswith("RMSNorm") and _rms_eps(module) is not None


def _rms_eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def rms_norm(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, SampleGradient]:
    """Gain: sum_t b_t * xhat_t, the same for a gain of w and of 1 + w."""
    b_ND, segments = layout.pack(b, b.shape[-1])
    return {"weight": VectorSum(b_ND, segments, _rms_normalised(module, layout.pack(a, a.shape[-1])[0]))}


def _rms_normalised(module: nn.Module, x_ND: Tensor) -> ops.Normalised:
    eps = _rms_eps(module)
    assert eps is not None
    return ops.Normalised(x_ND, "rms", eps)


def check_rms_norm(module: nn.Module, a: Tensor, output: Tensor) -> bool:
    """Whether `output` is xhat * w or xhat * (1 + w), so that `rms_norm` holds for this class."""
    # Compared in float32: the models form their norms in it whatever their type.
    normalised = _rms_normalised(module, a)().float()
    weight = cast(Tensor, module.weight).float()
    return any(_close(output, normalised * gain, a.dtype) for gain in (weight, 1 + weight))


def _close(output: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    output, expected = output.float(), expected.float()
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return bool((output - expected).abs().max() <= tolerance * output.abs().max())


def embedding(module: nn.Module, ids: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, SampleGradient]:
    """Row v: sum of b_t over the positions that hold token v; absent rows are zero and count."""
    b_ND, segments = layout.pack(b.expand(*ids.shape, b.shape[-1]), b.shape[-1])
    ids_N = layout.pack(ids, 1)[0].flatten()
    rows = ops.EmbeddingRows(b_ND, ids_N, segments, module.padding_idx)  # type: ignore[arg-type]
    return {"weight": TouchedRows(rows, module.num_embeddings)}  # type: ignore[arg-type]


def attention_sinks(
    module: nn.Module, _: Tensor, b: Tensor, layout: BatchLayout
) -> dict[str, SampleGradient]:
    """One logit a head that every token attends to besides the others: the sum over tokens (gpt-oss)."""
    return {"sinks": VectorSum(*layout.pack(b.transpose(1, 2), b.shape[1]))}
