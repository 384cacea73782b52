"""Puts a PEFT adapter on the model that is probed."""

from __future__ import annotations

import pickle
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from grads_dist.data.reach import cache_alone, unreached
from grads_dist.errors import ConfigError

ADAPTER_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What PEFT raises for a folder that is missing, damaged, or made for another model."""


def load_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Load an adapter with its weights; from then on it alone is trained.

    Raises ConfigError when there is none, it does not fit the model, or its weights are incomplete.
    """
    _check_installed()
    _read_config(adapter)
    try:
        options = {"local_files_only": _cache_alone(adapter)}
        found = model.load_adapter(adapter, is_trainable=True, adapter_kwargs=options)
    except ADAPTER_ERRORS as error:
        raise ConfigError(_unloadable(adapter, error)) from error
    missing = sorted(found.missing_keys)
    if missing:
        raise ConfigError(f"model.adapter: {adapter!r} lacks {missing[0]} ({len(missing)} such weights)")


def inject_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Give the model the layers of an adapter without their weights.

    Raises ConfigError as `load_adapter` does.
    """
    _check_installed()
    from peft import inject_adapter_in_model

    config = _read_config(adapter)
    try:
        inject_adapter_in_model(config, model)
    except ADAPTER_ERRORS as error:
        raise ConfigError(_unloadable(adapter, error)) from error


def _read_config(adapter: str) -> Any:
    """The adapter's configuration; ConfigError where there is none, or it names a module to import."""
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(adapter, local_files_only=_cache_alone(adapter))
    except ADAPTER_ERRORS as error:
        if _cache_alone(adapter):
            raise ConfigError(
                f"model.adapter: {adapter!r} is neither a folder nor an adapter of the hub within reach: "
                f"{unreached()}, and its cache does not hold all of it"
            ) from error
        raise ConfigError(_unloadable(adapter, error)) from error
    if getattr(config, "megatron_config", None) is not None:
        # PEFT would import the module that the adapter calls Megatron's; not every version checks which.
        raise ConfigError(
            f"model.adapter: {adapter!r} sets megatron_config, which imports code by name; allowed: an "
            "adapter without it"
        )
    return config


def _cache_alone(adapter: str) -> bool:
    return cache_alone(adapter, "model.adapter")


def _check_installed() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError("model.adapter: needs the package peft; install grads-dist[peft]") from None


def _unloadable(adapter: str, error: BaseException) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"model.adapter: {adapter!r} is no adapter that fits the model: {reason}"
