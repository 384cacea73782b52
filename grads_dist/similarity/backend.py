"""Which library searches, and on which device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from grads_dist.errors import ConfigError
from grads_dist.similarity import faiss_index
from grads_dist.similarity.config import SimilarityConfig


@dataclass(frozen=True)
class Backend:
    """The library and the device of a search, and why they were chosen."""

    library: str
    device: str
    reason: str


def choose_backend(config: SimilarityConfig) -> Backend:
    """Resolve `auto` to a library and a device.

    Raises:
        ConfigError: what was asked for by name is not there, or cannot serve the index asked for.
    """
    device = _device(config)
    by_name = config.index not in ("auto", "exact")
    if config.library == "torch":
        if by_name:
            raise ConfigError(
                f"similarity.index: {config.index!r} needs faiss, and similarity.library is torch; "
                "allowed with torch: auto, exact"
            )
        return Backend("torch", device, "asked for")
    if not faiss_index.is_installed():
        if config.library == "faiss":
            raise ConfigError(
                "similarity.library: faiss is not installed; install faiss-cpu or faiss-gpu, or give torch"
            )
        if by_name:
            raise ConfigError(
                f"similarity.index: {config.index!r} needs faiss, which is not installed; "
                "install faiss-cpu or faiss-gpu, or give auto or exact"
            )
        return Backend("torch", device, "faiss is not installed")
    if device == "cuda" and faiss_index.num_gpus() == 0:
        if config.device == "cuda" and (config.library == "faiss" or by_name):
            raise ConfigError(
                "similarity.device: the installed faiss cannot use cuda; "
                "give cpu, or similarity.library torch"
            )
        if config.library == "auto" and not by_name:
            return Backend("torch", "cuda", "the installed faiss cannot use the GPU")
        return Backend("faiss", "cpu", "the installed faiss cannot use the GPU")
    return Backend(
        "faiss", device, "asked for" if config.library == "faiss" else f"faiss is there and serves {device}"
    )


def _device(config: SimilarityConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    torch = importlib.import_module("torch")
    available = bool(torch.cuda.is_available())
    if config.device == "cuda" and not available:
        raise ConfigError("similarity.device: cuda is not available here; give cpu or auto")
    return "cuda" if available else "cpu"
