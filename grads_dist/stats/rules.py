"""How each layer type turns its input and its output's gradient into per-sample statistics.

A rule is a function `(module, a, b, layout) -> {local parameter name: statistics}`, where `a` is the layer's
input and `b` the gradient at its output, both with leading axes [S, T] or [S * T]. `@rule` registers it for a
layer type; that is the whole way to teach grads_dist a new layer:

    @rule(MyLinear)
    def my_linear(module, a, b, layout):
        return {"weight": ops.outer_product_stats(...)}

The LM head is not here: its statistics come out of the loss (head.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grads_dist.stats import ops
from grads_dist.stats.segments import BatchLayout
from grads_dist.stats.statistics import Statistics

Rule = Callable[[nn.Module, Tensor, Tensor, BatchLayout], dict[str, Statistics]]
RULES: dict[type[nn.Module], Rule] = {}


def rule(*module_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for the given layer types."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(module_types, function))
        return function

    return register


def rule_for(module: nn.Module, parameter: str) -> Rule | None:
    """The rule for `parameter` (its local name) of `module`, or None."""
    if parameter not in ("weight", "bias"):
        return None
    if is_rms_norm(module):
        return rms_norm
    if isinstance(module, nn.Embedding):
        return embedding if _is_known_embedding(module) else None
    return RULES.get(type(module))


@rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D)
def linear(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, Statistics]:
    """Weight: sum_t b_t a_t^T (Conv1D keeps it transposed, with the same elements). Bias: sum_t b_t."""
    b_NP, segments = layout.pack(b, b.shape[-1])
    a_ND, _ = layout.pack(a, a.shape[-1])
    stats = {"weight": ops.outer_product_stats(b_NP, a_ND, segments)}
    if module.bias is not None:
        stats["bias"] = ops.vector_stats(b_NP, segments)
    return stats


@rule(nn.LayerNorm)
def layer_norm(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, Statistics]:
    """Gain: sum_t b_t * xhat_t. Bias: sum_t b_t."""
    size = a.shape[-1]
    normalised = nn.functional.layer_norm(a, (size,), eps=module.eps)  # type: ignore[arg-type]
    gain, segments = layout.pack(_product(b, normalised), size)
    stats = {"weight": ops.vector_stats(gain, segments)}
    if module.bias is not None:
        stats["bias"] = ops.vector_stats(layout.pack(b, size)[0], segments)
    return stats


def _product(b: Tensor, normalised: Tensor) -> Tensor:
    dtype = ops.accumulation_dtype(b.dtype)
    return b.to(dtype) * normalised.to(dtype)


def is_rms_norm(module: nn.Module) -> bool:
    """Every architecture of transformers has its own class for the same function."""
    return type(module).__name__.endswith("RMSNorm") and _rms_eps(module) is not None


def _rms_eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def rms_norm(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, Statistics]:
    """Gain: sum_t b_t * xhat_t, the same for a gain of w and of 1 + w."""
    gain, segments = layout.pack(_product(b, rms_normalised(module, a)), a.shape[-1])
    return {"weight": ops.vector_stats(gain, segments)}


def rms_normalised(module: nn.Module, a: Tensor) -> Tensor:
    """a / sqrt(mean(a^2) + eps), formed in float32 or better and returned in the type of `a`."""
    eps = _rms_eps(module)
    assert eps is not None
    x = a.to(ops.accumulation_dtype(a.dtype))
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(a.dtype)


def check_rms_norm(module: nn.Module, a: Tensor, output: Tensor) -> bool:
    """Whether `output` is xhat * w or xhat * (1 + w), so that `rms_norm` holds for this class."""
    # Compared in float32: the models form their norms in it whatever their type.
    normalised = rms_normalised(module, a).float()
    weight = cast(Tensor, module.weight).float()
    scale = output.float().abs().max()
    errors = [(normalised * gain - output.float()).abs().max() for gain in (weight, 1 + weight)]
    return bool(min(errors) <= 8 * max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps) * scale)


def embedding(module: nn.Module, a: Tensor, b: Tensor, layout: BatchLayout) -> dict[str, Statistics]:
    """Row v: sum of b_t over the positions that hold token v; absent rows are zero and count."""
    rows = embedding_rows_of(module, a, b, layout)
    return {"weight": ops.embedding_stats(rows, module.num_embeddings)}  # type: ignore[arg-type]


def embedding_rows_of(module: nn.Module, ids: Tensor, b: Tensor, layout: BatchLayout) -> ops.EmbeddingRows:
    """The touched rows of the embedding's per-sample gradients."""
    b_ND, segments = layout.pack(b, b.shape[-1])
    ids_N = layout.pack(ids, 1)[0].flatten()
    scale = embedding_scale(module)
    if scale is not None:
        dtype = ops.accumulation_dtype(b_ND.dtype)
        # The model multiplies by the scale in its weights' type.
        b_ND = b_ND.to(dtype) * scale.to(b_ND.dtype).to(dtype)
    return ops.embedding_rows(b_ND, ids_N, segments, module.padding_idx)  # type: ignore[arg-type]


def embedding_scale(module: nn.Module) -> Tensor | None:
    """The factor that a scaled word embedding (Gemma) multiplies its rows by, or None."""
    scale = getattr(module, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale, device=module.weight.device)  # type: ignore[arg-type]


def _is_known_embedding(module: nn.Embedding) -> bool:
    plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return plain and (type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding"))
