"""Loads the causal language model that is probed, whole or sharded from the start under ZeRO-3."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig

log = logging.getLogger(__name__)


def model_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of the weights; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def load_model(
    config: ModelConfig, device: torch.device, zero3: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load the model for probing: on `device`, without dropout, with gradient checkpointing as configured.

    Args:
        config: which model, and how.
        device: where its weights live; under ZeRO-3 DeepSpeed places them.
        zero3: the DeepSpeed configuration when the weights are sharded while loading, so that no rank ever
            holds the whole model.

    Raises ConfigError when there is no such model or it cannot be loaded.
    """
    dtype = model_dtype(config, device)
    try:
        with _sharded(zero3, dtype):
            model = AutoModelForCausalLM.from_pretrained(
                config.name_or_path,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(_unloadable(config, error)) from error
    log.info(
        "model %s: %s weights, attention %s", type(model).__name__, dtype, model.config._attn_implementation
    )
    if zero3 is None:
        model.to(device)
    disable_dropout(model)
    _set_checkpointing(model, config)
    return model


def load_text_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration (vocab_size, hidden_size, ...), without its weights.

    Raises ConfigError when there is no such model.
    """
    try:
        loaded = AutoConfig.from_pretrained(
            config.name_or_path,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(_unloadable(config, error)) from error
    return loaded.get_text_config()


def _unloadable(config: ModelConfig, error: BaseException) -> str:
    if Path(str(config.name_or_path)).is_dir():
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"model.name_or_path: {config.name_or_path!r} is no loadable causal language model: {reason}"
    return f"model.name_or_path: {config.name_or_path!r} is neither a folder nor a hub model within reach"


@contextmanager
def _sharded(zero3: dict[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """Make transformers build and load the model under zero.Init while inside."""
    if zero3 is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # Kept alive here: transformers finds it through a weak reference.
    marker = HfDeepSpeedConfig(zero3)
    try:
        yield
    finally:
        del marker


def disable_dropout(model: nn.Module) -> None:
    """Put the model in training mode with every dropout at 0.

    Training mode because gradient checkpointing works in no other; dropout would make the statistics random.
    """
    model.train()
    changed = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.p = 0.0
            changed.add(name)
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float) and value:
                setattr(module, attribute, 0.0)
                changed.add(name)
    if changed:
        log.info("dropout set to 0 while probing, in %d modules", len(changed))


def _set_checkpointing(model: nn.Module, config: ModelConfig) -> None:
    if config.gradient_checkpointing == "none":
        return
    reentrant = config.gradient_checkpointing == "reentrant"
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        # A reentrant checkpoint passes gradients on only where an input asks for them.
        model.enable_input_require_grads()  # type: ignore[operator]
