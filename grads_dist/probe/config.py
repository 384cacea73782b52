"""How the preliminary epoch runs and what is read from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from grads_dist.errors import ConfigError

FEATURES = ("content", "gradient")


@dataclass(frozen=True)
class ProbeConfig:
    """The preliminary epoch: its objective, its batches, and the weights whose gradients are read."""

    mode: Literal["train", "frozen"] = "train"
    """train: read statistics while the preliminary epoch trains; frozen: at the given weights, no update."""

    targets: list[str] | dict[str, str] = field(default_factory=lambda: ["embedding", "lm_head"])
    """Names (embedding, lm_head, tied, layers, linear, experts, norms, biases, adapters), or a map from a
    name to a regular expression that matches whole parameter names; all that one pattern matches is merged
    into that target."""

    statistics: Literal["all", "moments"] = "all"
    """all, or only moments (sum, squares, mean, std, norm): min and max are then NaN, and the products of
    short samples need not be formed where no weight gradient is summed from them."""

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

    features: Literal["content", "gradient", "none"] | list[Literal["content", "gradient"]] = "content"
    """Features to write, one name or a list: content = mean last hidden state over the tokens that carry
    loss, gradient = random projections of gradients at frozen weights (mode frozen, or warmup)."""

    feature_tokens: Literal["label", "all"] = "label"
    """Tokens that a content feature is averaged over."""

    sketch_dim: int = 256
    """Content features with more dimensions than this are reduced to it by a seeded random projection."""

    gradient_targets: list[str] | dict[str, str] | None = None
    """What gradient features are of, as for targets; unset: of all targets."""

    gradient_dim: int = 4096
    """Dimensions of a gradient feature: the square of the size of both sides of its projections."""

    checkpoints: list[str] = field(default_factory=list)
    """Mode frozen: probe at the weights of each of these (folders or hub ids of one architecture) instead of
    those of model.name_or_path alone; the score table has a row for each row of the corpus and checkpoint."""

    checkpoint_weights: list[float] | None = None
    """Weight of each checkpoint in the criterion less, such as its learning rate; unset: all alike."""

    save_model: bool = False
    """Mode train: save the probed model to model/ in the run directory, as transformers does."""

    head_chunk_mib: int = 256
    """Memory for the LM head's logits at any moment, in MiB."""

    shard_rows: int = 2048
    """Rows in one shard of the score table, roughly."""

    checkpoint_steps: int | None = None
    """Mode train: optimizer steps between two checkpoints; unset: as many as take five minutes."""

    seed: int = 0
    """Seed of the epoch's order and of the projections."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "batch_tokens", "epochs", "sketch_dim", "head_chunk_mib", "shard_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"probe.{name}: {getattr(self, name)} is not allowed; it must be at least 1"
                )
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise ConfigError(
                f"probe.checkpoint_steps: {self.checkpoint_steps} is not allowed; it must be at least 1"
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
        if self.save_model and self.mode == "frozen":
            raise ConfigError("probe.save_model: only probe.mode train changes the model; unset it")
        self._check_features()
        self._check_checkpoints()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that are written, content first."""
        wanted = [self.features] if isinstance(self.features, str) else self.features
        return tuple(name for name in FEATURES if name in wanted)

    @property
    def feature_files(self) -> tuple[str, ...]:
        """Their names in the run directory: gradients have one for each of several checkpoints."""
        files: list[str] = []
        for name in self.feature_names:
            files += [name] if name == "content" else gradient_files(len(self.checkpoints))
        return tuple(files)

    def _check_features(self) -> None:
        if isinstance(self.features, (list, tuple)):
            if not self.features or not set(self.features) <= set(FEATURES):
                allowed = ", ".join(FEATURES)
                raise ConfigError(
                    f"probe.features: {self.features!r} is not allowed; allowed: none, or a list of {allowed}"
                )
        if self.gradient_dim < 1 or math.isqrt(self.gradient_dim) ** 2 != self.gradient_dim:
            raise ConfigError(
                f"probe.gradient_dim: {self.gradient_dim} is not allowed; it must be the square of a whole "
                f"number, e.g. 4096"
            )
        if self.gradient_targets is not None and not self.gradient_targets:
            raise ConfigError("probe.gradient_targets: empty; name at least one target, or leave it unset")
        if "gradient" not in self.feature_names or self.mode == "frozen":
            return
        if self.warmup is None:
            raise ConfigError(
                "probe.features: gradient needs weights that stay the same; set probe.mode frozen, or "
                "probe.warmup"
            )
        if self.warmup_probe == "rest":
            raise ConfigError(
                "probe.warmup_probe: rest probes but some rows at the frozen weights, and probe.features "
                "gradient needs all; allowed: everything"
            )

    def _check_checkpoints(self) -> None:
        if self.checkpoints and self.mode != "frozen":
            raise ConfigError(
                "probe.checkpoints: only probe.mode frozen probes several; unset it, or set that"
            )
        weights = self.checkpoint_weights
        if weights is None:
            return
        if len(weights) != len(self.checkpoints):
            raise ConfigError(
                f"probe.checkpoint_weights: {len(weights)} weights for {len(self.checkpoints)} "
                f"probe.checkpoints; allowed: one for each"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise ConfigError(
                f"probe.checkpoint_weights: {weights} is not allowed; allowed: numbers of at least 0, not "
                "all of them 0"
            )


def gradient_files(num_checkpoints: int) -> list[str]:
    """Names of the gradient features of each checkpoint in the run directory."""
    return [f"gradient.{c}" for c in range(num_checkpoints)] if num_checkpoints > 1 else ["gradient"]
