"""DeepSpeed for the probe: its configuration with "auto" values filled in, and its engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from grads_dist.errors import ConfigError
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.ranks import Ranks

log = logging.getLogger(__name__)

DEFAULT: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "gradient_clipping": "auto",
}
"""What stands in for a missing `deepspeed` path: ZeRO-2 with AdamW."""

REFUSED = (
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "autotuning",
    "data_types",
    "compression_training",
)
"""Sections that change what a rank's gradient is, for which there is no rule."""


def load_deepspeed_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, or give the default; raises ConfigError naming what cannot be used."""
    if path is None:
        return json.loads(json.dumps(DEFAULT))
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed: {path!r} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path!r} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"deepspeed: {path!r} holds no JSON object")
    for key in REFUSED:
        if key in config:
            raise ConfigError(
                f"deepspeed: {path!r} sets {key!r}, which per-sample gradients do not support; remove it"
            )
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"deepspeed: zero_optimization.stage {stage!r} is not allowed; it must be 0, 1, 2 or 3"
        )
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage


def fill_auto(
    config: dict[str, Any], probe: ProbeConfig, dtype: torch.dtype, hidden_size: int, ranks: Ranks
) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration with every "auto" filled in and what the probe decides set.

    Batches and accumulation belong to the plan: DeepSpeed sees micro-batches of nominal size 1 and is told at
    which of them a step ends. On CPU, Adam is torch's own.
    """
    config = json.loads(json.dumps(config))
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = ranks.world_size
    config.setdefault("optimizer", DEFAULT["optimizer"])
    # Unset, DeepSpeed clips as if at 1.0.
    config.setdefault("gradient_clipping", "auto")
    config["bf16"] = {**config.get("bf16", {}), "enabled": dtype == torch.bfloat16}
    config["fp16"] = {**config.get("fp16", {}), "enabled": dtype == torch.float16}
    config.setdefault("steps_per_print", 2**31)
    zero = config.setdefault("zero_optimization", {})
    for key, value in _zero_defaults(hidden_size).items():
        if zero.get(key) == "auto":
            zero[key] = value
    if ranks.device.type == "cpu":
        config["optimizer"].setdefault("params", {})["torch_adam"] = True
    values = {
        "lr": probe.learning_rate,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "gradient_clipping": probe.max_grad_norm,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": probe.learning_rate,
    }
    return _replace_auto(config, values, "")


def _zero_defaults(hidden_size: int) -> dict[str, int]:
    """Bucket sizes as transformers chooses them."""
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _replace_auto(node: Any, values: dict[str, Any], path: str) -> Any:
    if not isinstance(node, dict):
        return node
    filled = {}
    for key, value in node.items():
        if value == "auto":
            if key not in values:
                raise ConfigError(
                    f'deepspeed: {path}{key} is "auto", and there is no rule for it; give a value'
                )
            value = values[key]
        filled[key] = _replace_auto(value, values, f"{path}{key}.")
    return filled


def join_ranks(ranks: Ranks) -> None:
    """Make DeepSpeed use the process group of `ranks`; zero.Init needs it before there is an engine."""
    import deepspeed

    ranks.ensure_group()
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)


def start_engine(model: ProbedModel, config: dict[str, Any], ranks: Ranks) -> Any:
    """Wrap the model in a DeepSpeed engine; collective."""
    import deepspeed

    join_ranks(ranks)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    log.info("DeepSpeed engine: ZeRO stage %d, %d ranks", engine.zero_optimization_stage(), ranks.world_size)
    return engine
