"""Inner-product search in blocks with torch: the fallback of faiss, and its oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# A block of inner products holds at most this many rows of queries and of the base: 128 MiB in float32.
_QUERY_ROWS = 512
_BASE_ROWS = 1 << 16


def searcher(units: np.ndarray, device: str) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """A function that finds the rows with the largest inner products with each query.

    Args:
        units: the rows that are searched, float32 [m, dim].
        device: "cpu" or "cuda", where they are kept.

    Returns:
        A function of queries, float32 [q, dim], and the results a query, at most m; it gives scores float32
        [q, results], falling, and row numbers int64 of the same shape.
    """
    base = torch.from_numpy(units).to(device)

    def find(queries: np.ndarray, num_results: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.empty((len(queries), num_results), np.float32)
        rows = np.empty((len(queries), num_results), np.int64)
        for start in range(0, len(queries), _QUERY_ROWS):
            block = torch.from_numpy(queries[start : start + _QUERY_ROWS]).to(device)
            block_scores, block_rows = _best(block, base, num_results)
            scores[start : start + len(block)] = block_scores.cpu().numpy()
            rows[start : start + len(block)] = block_rows.cpu().numpy()
        return scores, rows

    return find


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
