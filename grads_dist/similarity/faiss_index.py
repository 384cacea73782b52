"""Exact inner-product search with faiss; the only module that imports it.

faiss is imported inside the functions and after torch: loaded first, its CUDA libraries can break torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import numpy as np


def is_installed() -> bool:
    """Whether faiss can be imported."""
    return importlib.util.find_spec("faiss") is not None


def num_gpus() -> int:
    """GPUs that the installed faiss can search on; 0 for the CPU build."""
    faiss = _load()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def search(unit: np.ndarray, num_results: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest inner products with each row; as `torch_search.search`."""
    faiss = _load()
    index = faiss.IndexFlatIP(unit.shape[1])
    if device == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(unit)
    cosine, ids = index.search(unit, num_results)
    return cosine, ids


def _load() -> ModuleType:
    importlib.import_module("torch")
    return importlib.import_module("faiss")
