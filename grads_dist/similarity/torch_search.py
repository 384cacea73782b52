"""Exact inner-product search in blocks with torch: the fallback of faiss, and its oracle."""

from __future__ import annotations

import numpy as np
import torch

# A block of inner products holds at most this many rows of queries and of the base: 128 MiB in float32.
_QUERY_ROWS = 512
_BASE_ROWS = 1 << 16


def search(unit: np.ndarray, num_results: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the largest inner products with each row, itself included.

    Args:
        unit: unit vectors, float32 [m, k].
        num_results: results a row, at most m.
        device: "cpu" or "cuda".

    Returns:
        Cosines float32 [m, num_results], falling, and row numbers int64 of the same shape.
    """
    base = torch.from_numpy(unit).to(device)
    cosine = np.empty((len(unit), num_results), np.float32)
    ids = np.empty((len(unit), num_results), np.int64)
    for start in range(0, len(unit), _QUERY_ROWS):
        values, rows = _best(base[start : start + _QUERY_ROWS], base, num_results)
        cosine[start : start + len(values)] = values.cpu().numpy()
        ids[start : start + len(rows)] = rows.cpu().numpy()
    return cosine, ids


def _best(queries: torch.Tensor, base: torch.Tensor, num_results: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of each block of the base, merged block by block."""
    values = queries.new_empty((len(queries), 0))
    rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, len(base), _BASE_ROWS):
        products = queries @ base[start : start + _BASE_ROWS].T
        new_values, new_rows = products.topk(min(num_results, products.shape[1]), dim=1)
        values = torch.cat([values, new_values], dim=1)
        rows = torch.cat([rows, new_rows + start], dim=1)
        values, kept = values.topk(min(num_results, values.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return values, rows
