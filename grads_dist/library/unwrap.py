"""From what a training loop holds to the module whose parameters are named, refusing what cannot be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import Anatomy, dissect
from grads_dist.stats.head_request import LogitTransform


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, a DeepSpeed engine and PEFT.

    Raises ConfigError naming what cannot be read: a compiled, replicated, tensor- or sequence-parallel
    module, FSDP, prompt learning, or a forward pass that a fused kernel has replaced.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    _check_parameters(model)
    _check_forward(model)
    return model


def anatomy_of(module: nn.Module) -> Anatomy:
    """The parts of a causal language model; of any other module nothing but its parameters.

    The parts of another module have no names, so that only patterns, and names of kinds of layers, find
    something in it.
    """
    if is_causal_lm(module):
        return dissect(module)
    return Anatomy(
        model=module,
        embedding_name="",
        head_name="",
        layers=(),
        tied=False,
        transform=LogitTransform(),
    )


def is_causal_lm(module: nn.Module) -> bool:
    """Whether this is a transformers model with a body and a head over its vocabulary."""
    return (
        isinstance(module, PreTrainedModel)
        and not module.config.is_encoder_decoder
        and module.base_model is not module
        and module.get_output_embeddings() is not None
    )


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None where there is no wrapper."""
    # By name: neither DeepSpeed nor PEFT is imported for it.
    kinds = {kind.__name__ for kind in type(model).__mro__}
    refused = {
        "OptimizedModule": "torch.compile, whose graph reading would break; record the module inside",
        "PipelineEngine": "pipeline parallelism",
        "FullyShardedDataParallel": "FSDP; allowed: DDP, or DeepSpeed with ZeRO stage 0 to 3",
        "FSDPModule": "FSDP; allowed: DDP, or DeepSpeed with ZeRO stage 0 to 3",
    }
    for kind, reason in refused.items():
        if kind in kinds:
            raise ConfigError(f"model: {type(model).__name__} cannot be read: {reason}")
    if isinstance(model, DataParallel):
        raise ConfigError("model: DataParallel cannot be read; allowed: DistributedDataParallel")
    if "DeepSpeedEngine" in kinds and getattr(model, "sequence_parallel_size", 1) > 1:
        raise ConfigError("model: sequence parallelism cannot be read: no rank sees a whole sample")
    if isinstance(model, DistributedDataParallel) or "DeepSpeedEngine" in kinds:
        return model.module  # type: ignore[return-value]
    return _inside_adapters(model) if "PeftModel" in kinds else None


def _inside_adapters(model: Any) -> nn.Module:
    if model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"model: {model.active_peft_config.peft_type.value} cannot be read: its virtual tokens belong to "
            f"no sample; allowed: adapters inside the layers, such as LoRA"
        )
    return model.get_base_model()


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"model: {name} is sharded by tensor parallelism or FSDP, which cannot be read; allowed: "
                f"DDP, or DeepSpeed with ZeRO stage 0 to 3"
            )


def _check_forward(model: nn.Module) -> None:
    """Refuse what runs past the layers' own forward passes."""
    home = getattr(model.forward, "__module__", "") or ""
    if home.startswith("liger_kernel"):
        raise ConfigError(
            "model: Liger has replaced its forward pass by one that never calls the LM head; load it without "
            "fused_linear_cross_entropy"
        )
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                f"model: {name or type(module).__name__} is compiled (torch.compile), and reading "
                f"would break its graph; record it uncompiled"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where the module's weights live."""
    return next(model.parameters()).device
