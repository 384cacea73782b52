"""What feature vectors are made with: the projection of content features, the sketches of gradients."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from grads_dist.errors import ConfigError
from grads_dist.model.anatomy import Anatomy
from grads_dist.probe.config import ProbeConfig
from grads_dist.stats.sketch import Sketcher
from grads_dist.stats.targets import Targets, resolve_targets


def content_projection(hidden_size: int, config: ProbeConfig, device: torch.device) -> Tensor | None:
    """Gaussian projection [D, k] that keeps inner products in expectation, the same on every rank.

    None when the features have no more than `sketch_dim` dimensions.
    """
    if hidden_size <= config.sketch_dim:
        return None
    digest = hashlib.blake2b(f"content/{config.seed}".encode(), digest_size=16).digest()
    # numpy's: torch's generator on CPU reads but 32 bits of its seed.
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    gaussian = generator.standard_normal((hidden_size, config.sketch_dim), dtype=np.float32)
    return torch.from_numpy(gaussian / np.float32(config.sketch_dim**0.5)).to(device)


def gradient_sketcher(config: ProbeConfig, anatomy: Anatomy) -> Sketcher | None:
    """The sketches that gradient features are; None where none are asked for.

    Raises ConfigError for `probe.gradient_targets` as `resolve_targets` does for `probe.targets`.
    """
    if "gradient" not in config.feature_names:
        return None
    return Sketcher(gradient_targets(config, anatomy), config.seed, config.gradient_dim)


def gradient_targets(config: ProbeConfig, anatomy: Anatomy) -> Targets:
    """What gradient features are of; unless named, `tied` stands for the embedding and the head."""
    if config.gradient_targets is not None:
        try:
            return resolve_targets(config.gradient_targets, anatomy)
        except ConfigError as error:
            raise ConfigError(str(error).replace("probe.targets", "probe.gradient_targets", 1)) from None
    targets = resolve_targets(config.targets, anatomy)
    if "tied" not in targets.members:
        return targets
    members = {name: m for name, m in targets.members.items() if name not in ("embedding", "lm_head")}
    return Targets(members, {name: targets.numel[name] for name in members})
