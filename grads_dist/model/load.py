"""Loads the causal language model that is probed, whole or sharded from the start under ZeRO-3."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import find_adapter_config_file

from grads_dist.data.reach import cache_alone, unreached
from grads_dist.errors import ConfigError
from grads_dist.model.adapter import inject_adapter, load_adapter
from grads_dist.model.config import ModelConfig

log = logging.getLogger(__name__)

LOADING_ERRORS = (
    OSError, ValueError, ImportError, LookupError, RuntimeError, AttributeError, TypeError, EOFError,
    SafetensorError, StrictDataclassError, pickle.UnpicklingError,
)  # fmt: skip
"""What transformers raises for a folder that is missing, incomplete, damaged or of another kind."""

IMPLEMENTATIONS = {
    "attn_implementation": (
        "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    ),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}  # fmt: skip
"""What a model's config.json may choose; transformers takes any other name for one of the hub's kernels."""

RANDOM_ATTRIBUTES = ("dropout", "pdrop", "layerdrop", "jitter_noise")
"""Parts of the names under which models keep what makes their forward pass random."""


def build_on_meta(config: ModelConfig) -> PreTrainedModel:
    """The model without any weights, for checks before work is spent.

    Raises ConfigError when the configuration is not that of a causal language model.
    """
    try:
        loaded = load_config(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=config.trust_remote_code)
        quantization = quantization_of(loaded)
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
            quantizer.preprocess_model(model=model, device_map=None)
    except LOADING_ERRORS as error:
        raise ConfigError(_unloadable(config, error)) from error
    if config.adapter is not None:
        with torch.device("meta"):
            inject_adapter(model, config.adapter)
    return model


def quantization_of(config: PretrainedConfig) -> Any:
    """How the checkpoint's weights are quantised, or None."""
    return getattr(config, "quantization_config", None)


def load_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, zero3: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load the model for probing: on `device`, without dropout, with gradient checkpointing as configured.

    Args:
        config: which model, and how.
        dtype: type of its weights.
        device: where its weights live; under ZeRO-3 DeepSpeed places them.
        zero3: the DeepSpeed configuration when the weights are sharded while loading, so that no rank ever
            holds the whole model.

    Raises ConfigError when there is no such model, or it or its adapter cannot be loaded.
    """
    quantised = _is_quantised(config)
    if quantised and zero3 is not None:
        raise ConfigError(
            f"model.name_or_path: {config.name_or_path!r} is quantised, which ZeRO stage 3 cannot shard; use "
            f"stage 2 or below"
        )
    alone = _cache_alone(config)
    try:
        with _sharded(zero3):
            model, loading = AutoModelForCausalLM.from_pretrained(
                config.name_or_path,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                local_files_only=alone,
                adapter_kwargs={"local_files_only": alone},
                # Quantised weights cannot be moved afterwards.
                device_map={"": device} if quantised else None,
                output_loading_info=True,
                # Reported by name below; transformers' own error names none.
                ignore_mismatched_sizes=True,
            )
    except LOADING_ERRORS as error:
        raise ConfigError(_unloadable(config, error)) from error
    _check_complete(config, loading)
    if config.adapter is not None:
        with _sharded(zero3):
            load_adapter(model, config.adapter)
    log.info(
        "model %s: %s weights, attention %s", type(model).__name__, dtype, model.config._attn_implementation
    )
    if zero3 is None and not quantised:
        model.to(device)
    disable_dropout(model)
    _set_checkpointing(model, config)
    return model


def _is_quantised(config: ModelConfig) -> bool:
    try:
        return quantization_of(load_config(config)) is not None
    except LOADING_ERRORS as error:
        raise ConfigError(_unloadable(config, error)) from error


def load_text_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration (vocab_size, hidden_size, ...), without its weights.

    Raises ConfigError when there is no such model.
    """
    try:
        return load_config(config).get_text_config()
    except LOADING_ERRORS as error:
        raise ConfigError(_unloadable(config, error)) from error


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration as it is stored.

    Raises ConfigError for an adapter, which would name another model to load, and for a configuration that
    names code to fetch; what transformers raises for all else.
    """
    revision, alone = config.revision or "main", _cache_alone(config)
    found = find_adapter_config_file(config.name_or_path, revision=revision, local_files_only=alone)
    if found is not None:
        raise ConfigError(
            f"model.name_or_path: {config.name_or_path!r} is an adapter; name its base model there, and the "
            f"adapter in model.adapter"
        )
    if not config.trust_remote_code:
        stored, _ = PretrainedConfig.get_config_dict(
            config.name_or_path, revision=revision, local_files_only=alone
        )
        _check_kernels(config, stored)
    return AutoConfig.from_pretrained(
        config.name_or_path,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        local_files_only=alone,
    )


def _cache_alone(config: ModelConfig) -> bool:
    return cache_alone(str(config.name_or_path), "model.name_or_path")


def _check_kernels(config: ModelConfig, stored: Any) -> None:
    """Refuse a config.json that names kernels of the hub, whose code transformers would fetch and run.

    At any depth: it may name them in the part of any submodel, and for any submodel in a part above.
    """
    parts = (
        stored.items() if isinstance(stored, dict) else enumerate(stored) if isinstance(stored, list) else ()
    )
    for key, value in parts:
        kind = next((kind for kind in IMPLEMENTATIONS if kind in str(key)), None)
        if kind is None:
            _check_kernels(config, value)
            continue
        for name in _texts(value):
            if name.removeprefix("paged|") not in IMPLEMENTATIONS[kind]:
                allowed = ", ".join(IMPLEMENTATIONS[kind])
                raise ConfigError(
                    f"model.name_or_path: the config.json of {config.name_or_path!r} sets {kind} to "
                    f"{name!r}, which may be code of the hub; allowed: {allowed}, or "
                    "model.trust_remote_code: true"
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of a JSON file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _check_complete(config: ModelConfig, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: transformers would probe random ones in their place."""
    for key, fault in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        # A mismatch is listed with both shapes behind the name.
        names = sorted(name if isinstance(name, str) else name[0] for name in loading.get(key) or ())
        if names:
            raise ConfigError(
                f"model.name_or_path: {config.name_or_path!r} {fault} {names[0]} ({len(names)} such "
                f"weights); a complete causal language model is needed"
            )


def _unloadable(config: ModelConfig, error: BaseException) -> str:
    if Path(str(config.name_or_path)).is_dir():
        reason = _reason(error)
        return f"model.name_or_path: {config.name_or_path!r} is no loadable causal language model: {reason}"
    why = f": {unreached()}, and its cache does not hold all of it" if _cache_alone(config) else ""
    return (
        f"model.name_or_path: {config.name_or_path!r} is neither a folder nor a hub model within reach{why}"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors, which could run code; allowed: safetensors"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if "custom code" in reason:
        return (
            "it brings Python code of its own, which is not run; allowed: model.trust_remote_code: true, for "
            "a model that you trust"
        )
    return reason


@contextmanager
def _sharded(zero3: dict[str, Any] | None) -> Iterator[None]:
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


def disable_dropout(model: PreTrainedModel) -> None:
    """Put the model in training mode with every dropout and routing noise at 0.

    Training mode because gradient checkpointing works in no other; noise would make the statistics random.
    """
    model.train()
    owners: list[Any] = [*model.modules(), model.config, model.config.get_text_config()]
    changed = sum([_silence(owner) for owner in owners])
    if changed:
        log.info("dropout set to 0 while probing, in %d places", changed)


def _silence(owner: Any) -> int:
    """Set what makes `owner` random to 0; returns how many attributes that were."""
    names = [name for name in vars(owner) if any(part in name for part in RANDOM_ATTRIBUTES)]
    if isinstance(owner, nn.Dropout):
        names.append("p")
    changed = 0
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, float) and value:
            setattr(owner, name, 0.0)
            changed += 1
    return changed


def _set_checkpointing(model: nn.Module, config: ModelConfig) -> None:
    if config.gradient_checkpointing == "none":
        return
    reentrant = config.gradient_checkpointing == "reentrant"
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        # A reentrant checkpoint passes gradients on only where an input asks for them.
        model.enable_input_require_grads()  # type: ignore[operator]
