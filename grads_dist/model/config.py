"""Which model is probed and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The causal language model whose gradients are read."""

    name_or_path: str | None = None
    """Folder or hub id of a causal language model in the transformers format."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    adapter: str | None = None
    """Folder or hub id of a PEFT adapter (LoRA). It alone is trained; the base model stays frozen."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the weights while probing; auto is bfloat16 on CUDA and float32 on CPU."""

    attn_implementation: str | None = None
    """Attention implementation of transformers (eager, sdpa, flash_attention_2); its default if unset."""

    trust_remote_code: bool = False
    """Run Python code that the model repository brings along. Leave it off for models you do not trust."""

    gradient_checkpointing: Literal["none", "nonreentrant", "reentrant"] = "none"
    """Recompute activations in the backward pass instead of keeping them."""
