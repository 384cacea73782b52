"""Options of the nearest-neighbour search."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from grads_dist.errors import ConfigError

LibraryName = Literal["auto", "faiss", "torch"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SimilarityConfig:
    """How the neighbours of each row are found."""

    features: str = "content"
    """Name of the feature vectors of the probe that rows are compared by."""

    k: int = 10
    """Number of neighbours of a row; part of the definition of diversity and redundancy."""

    index: str = "auto"
    """Index that is searched: exact, a FAISS factory string such as IVF4096,SQfp16, or auto (exact where that
    is affordable, else an index chosen by its estimated cost)."""

    recall: float = 0.95
    """Share of the true neighbours that an index which is not exact has to find, measured on a sample."""

    library: LibraryName = "auto"
    """Search library: faiss, torch, or auto (faiss where it serves the device, else torch)."""

    device: DeviceName = "auto"
    """Where to search: cpu, cuda, or auto (cuda where there is one)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used; raises `ConfigError` naming the field."""
        if not self.features or "/" in self.features or self.features in (".", ".."):
            raise ConfigError(f"similarity.features: {self.features!r} is not the name of a feature file")
        if self.k < 1:
            raise ConfigError(f"similarity.k: {self.k} is not allowed; allowed: a whole number of at least 1")
        if self.index not in ("auto", "exact") and not re.fullmatch(r"[A-Z][\w,()-]*", self.index):
            raise ConfigError(
                f"similarity.index: {self.index!r} is not allowed; "
                "allowed: auto, exact or a FAISS factory string"
            )
        if not 0 < self.recall <= 1:
            raise ConfigError(
                f"similarity.recall: {self.recall} is not allowed; allowed: a number above 0 and at most 1"
            )
        for name, allowed in {"library": get_args(LibraryName), "device": get_args(DeviceName)}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"similarity.{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
