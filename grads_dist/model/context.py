"""How long a row the model can take."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from grads_dist.data.config import DataConfig
from grads_dist.errors import ConfigError

log = logging.getLogger(__name__)

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies change with the longest row of a batch, beyond a length."""


def within_context(data: DataConfig, text_config: Any) -> DataConfig:
    """Cut rows at the model's context: what it has learned positions for, or was trained with.

    Args:
        text_config: the model's own configuration, as `load_text_config` gives it.

    Raises ConfigError where longer rows would make each other's gradients depend on their batch.
    """
    context = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") in BATCH_DEPENDENT_ROPE and original and data.max_length > original:
        raise ConfigError(
            f"data.max_length: {data.max_length} is beyond {original}, where {rope['rope_type']} positions "
            f"depend on the longest row of a batch; allowed: at most {original}"
        )
    if context is None or data.max_length <= context:
        return data
    log.info("data.max_length %d is beyond the model's context; rows are cut at %d", data.max_length, context)
    return replace(data, max_length=int(context))
