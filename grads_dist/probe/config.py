"""How the preliminary epoch runs and what is read from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grads_dist.errors import ConfigError


@dataclass(frozen=True)
class ProbeConfig:
    """The preliminary epoch: its objective, its batches, and the weights whose gradients are read."""

    mode: Literal["train", "frozen"] = "train"
    """train: read statistics while the preliminary epoch trains; frozen: at the given weights, no update."""

    targets: list[str] | dict[str, str] = field(default_factory=lambda: ["embedding", "lm_head"])
    """Names (embedding, lm_head, tied, layers, linear), or a map from a name to a regular expression that
    matches whole parameter names; all that one pattern matches is merged into that target."""

    objective: Literal["sample_mean", "token_mean"] = "sample_mean"
    """What an optimizer step minimises: the mean of the samples' losses, or the mean over all its tokens."""

    global_batch: int = 64
    """Samples in one optimizer step, over all ranks."""

    batch_tokens: int = 4096
    """Padded tokens in one micro-batch of one rank; a longer sample is a micro-batch of its own."""

    learning_rate: float = 1e-5
    """Learning rate of the preliminary epoch (AdamW, constant, unless the DeepSpeed JSON says otherwise)."""

    max_grad_norm: float = 1.0
    """Gradient clipping of the preliminary epoch; 0 turns it off."""

    warmup: float | None = None
    """Share of the epoch after which the weights are frozen (0 < warmup < 1); unset, they never are."""

    warmup_probe: Literal["everything", "rest"] = "everything"
    """With warmup: probe everything at the frozen weights, or only the rows that were not trained on (the
    others keep the statistics read while they were trained on)."""

    epochs: int = 1
    """Preliminary epochs; statistics are read in the last."""

    features: Literal["content", "none"] = "content"
    """Features for similarity: content = mean last hidden state over the tokens that carry loss."""

    feature_tokens: Literal["label", "all"] = "label"
    """Tokens that a content feature is averaged over."""

    sketch_dim: int = 256
    """Content features with more dimensions than this are reduced to it by a seeded random projection."""

    head_chunk_mib: int = 256
    """Memory for the LM head's logits at any moment, in MiB."""

    shard_rows: int = 2048
    """Rows in one shard of the score table, roughly."""

    seed: int = 0
    """Seed of the epoch's order and of the projection."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "batch_tokens", "epochs", "sketch_dim", "head_chunk_mib", "shard_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"probe.{name}: {getattr(self, name)} is not allowed; it must be at least 1"
                )
        if self.warmup is not None and not 0 < self.warmup < 1:
            raise ConfigError(f"probe.warmup: {self.warmup} is not allowed; it must lie between 0 and 1")
        if self.warmup is not None and self.mode == "frozen":
            raise ConfigError("probe.warmup: only probe.mode train trains; unset it, or set probe.mode train")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"probe.{name}: {getattr(self, name)} is not allowed; it must be 0 or more")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"probe.seed: {self.seed} is not allowed; it must lie in 0 .. {2**31 - 1}")
        if not self.targets:
            raise ConfigError("probe.targets: empty; name at least one target, e.g. [embedding, lm_head]")
