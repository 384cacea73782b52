"""DeepSpeed for the probe: its configuration with "auto" values filled in, and its engine."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch

from grads_dist.errors import ConfigError
from grads_dist.model.config import ModelConfig
from grads_dist.model.probed import ProbedModel
from grads_dist.probe.config import ProbeConfig
from grads_dist.runtime.ranks import Ranks
from grads_dist.stats.routed import expert_blocks, give_idle_experts_gradients

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
    "progressive_layer_drop",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "torch_autocast",
)
"""Sections that change what a rank's gradient or batch is, for which there is no rule."""

REFUSED_ENABLED = ("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "nebula", "compile")
"""Sections that, once enabled, write where the file says, send elsewhere, or import what it names."""

DEEPSPEED_OPTIMIZERS = ("adam", "adamw", "lamb", "lion", "muon", "onebitadam", "onebitlamb", "zerooneadam")
"""Optimizers that DeepSpeed has under its own names, beside those of torch.optim."""

SECTION_OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16"}


def load_deepspeed_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, or give the default; raises ConfigError naming what cannot be used."""
    if path is None:
        return copy.deepcopy(DEFAULT)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed: {path!r} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed: {path!r} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"deepspeed: {path!r} holds no JSON object")
    for key in REFUSED:
        if key in config:
            raise ConfigError(
                f"deepspeed: {path!r} sets {key!r}, which per-sample gradients do not support; remove it"
            )
    for key in REFUSED_ENABLED:
        section = config.get(key, {})
        if section != {} and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(
                f"deepspeed: {path!r} sets {key!r}, which writes outside of the run directory or loads code "
                "by name; remove it, or set its enabled to false"
            )
    for key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"deepspeed: {path!r}: {key} is {config[key]!r}; it must be an object")
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"deepspeed: zero_optimization.stage {stage!r} is not allowed; it must be 0, 1, 2 or 3"
        )
    return config


def probe_dtype(model: ModelConfig, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The type of the weights: `model.dtype`, else the one the DeepSpeed file enables, else the device's.

    `auto` without a say of the file is bfloat16 on CUDA and float32 elsewhere. Raises ConfigError when file
    and `model.dtype` contradict each other.
    """
    enabled = [
        name for name, section in SECTION_OF_DTYPE.items() if config.get(section, {}).get("enabled") is True
    ]
    if model.dtype == "auto":
        name = enabled[0] if enabled else ("bfloat16" if device.type == "cuda" else "float32")
    else:
        name = model.dtype
        if enabled and name not in enabled:
            raise ConfigError(
                f"model.dtype: {name} contradicts the DeepSpeed file, which enables {enabled[0]}"
            )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_supported(probe: ProbeConfig, dtype: torch.dtype, stage: int, device: torch.device) -> None:
    """Raises ConfigError for a type of weights that cannot be probed as asked."""
    uses_engine = probe.mode == "train" or stage == 3
    if not uses_engine:
        return
    if dtype == torch.float64:
        raise ConfigError("model.dtype: float64 works in probe.mode frozen below ZeRO stage 3 only")
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError("model.dtype: DeepSpeed has no float16 on CPU; allowed: float32, bfloat16")
    if probe.mode == "train" and stage == 0 and dtype != torch.float32:
        # DeepSpeed would step on the 16-bit weights themselves, where small updates round to nothing.
        raise ConfigError("deepspeed: ZeRO stage 0 keeps no float32 weights to train; use stage 1, 2 or 3")


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage


def fill_auto(
    config: dict[str, Any],
    probe: ProbeConfig,
    dtype: torch.dtype,
    hidden_size: int,
    num_steps: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration with every "auto" filled in and what the probe decides set.

    Batches and accumulation belong to the plan: DeepSpeed sees micro-batches of nominal size 1 and is told at
    which of them a step ends. On CPU, Adam is torch's own.
    """
    config = copy.deepcopy(config)
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = ranks.world_size
    config.setdefault("optimizer", copy.deepcopy(DEFAULT["optimizer"]))
    # Unset, DeepSpeed clips as if at 1.0.
    config.setdefault("gradient_clipping", "auto")
    kind = str(config["optimizer"].get("type", ""))
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and not _is_optimizer(getattr(torch.optim, kind, None)):
        raise ConfigError(f"deepspeed: optimizer.type {kind!r} is not known; AdamW is the usual one")
    config["bf16"] = {**config.get("bf16", {}), "enabled": dtype == torch.bfloat16}
    config["fp16"] = {**config.get("fp16", {}), "enabled": dtype == torch.float16}
    config.setdefault("steps_per_print", 2**31)
    zero = config.setdefault("zero_optimization", {})
    for key, value in _zero_defaults(hidden_size).items():
        if zero.get(key) == "auto":
            zero[key] = value
    if ranks.device.type == "cpu" and config["optimizer"].get("type", "").lower() in ("adam", "adamw"):
        config["optimizer"].setdefault("params", {})["torch_adam"] = True
    values = {
        "lr": probe.learning_rate,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "gradient_clipping": probe.max_grad_norm,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": probe.learning_rate,
        "warmup_num_steps": 0,
        "total_num_steps": num_steps,
    }
    return _replace_auto(config, values, "")


def _is_optimizer(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


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
    blocks = {type(block) for block in expert_blocks(model).values()}
    if blocks and zero_stage(config) == 3:
        # Gathered whole: ranks whose tokens reach other experts would wait for each other.
        deepspeed.utils.set_z3_leaf_modules(model, sorted(blocks, key=lambda block: block.__name__))
    elif blocks:
        give_idle_experts_gradients(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    log.info("DeepSpeed engine: ZeRO stage %d, %d ranks", engine.zero_optimization_stage(), ranks.world_size)
    return engine
