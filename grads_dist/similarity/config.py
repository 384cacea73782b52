"""Options of the nearest-neighbour search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from grads_dist.errors import ConfigError

IndexName = Literal["auto", "faiss", "torch"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SimilarityConfig:
    """How the neighbours of each row are found."""

    features: str = "content"
    """Name of the feature vectors of the probe that rows are compared by."""

    k: int = 10
    """Number of neighbours of a row; part of the definition of diversity and redundancy."""

    index: IndexName = "auto"
    """Search library: faiss, torch, or auto (faiss where it serves the device, else torch)."""

    device: DeviceName = "auto"
    """Where to search: cpu, cuda, or auto (cuda where there is one)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used; raises `ConfigError` naming the field."""
        if not self.features or "/" in self.features or self.features in (".", ".."):
            raise ConfigError(f"similarity.features: {self.features!r} is not the name of a feature file")
        if self.k < 1:
            raise ConfigError(f"similarity.k: {self.k} is not allowed; allowed: a whole number of at least 1")
        if self.index not in get_args(IndexName):
            raise ConfigError(
                f"similarity.index: {self.index!r} is not one of {', '.join(get_args(IndexName))}"
            )
        if self.device not in get_args(DeviceName):
            raise ConfigError(
                f"similarity.device: {self.device!r} is not one of {', '.join(get_args(DeviceName))}"
            )
