"""The content diversity D: how far a row is from its neighbours."""

from __future__ import annotations

import numpy as np

from grads_dist.selection.ranks import r
from grads_dist.similarity.knn import Neighbours

_BLOCK_ROWS = 1 << 18


def mean_distance(neighbours: Neighbours) -> np.ndarray:
    """Mean cosine distance to the neighbours a row has, float64 [n]; 1 for a row without any."""
    distance = np.empty(len(neighbours.ids))
    for start in range(0, len(distance), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        found = (np.asarray(neighbours.ids[block]) >= 0).sum(axis=1)
        total = np.nansum(neighbours.cosine[block], axis=1, dtype=np.float64)
        distance[block] = 1.0 - total / np.maximum(found, 1)
    # Rounded like the cosines: otherwise the order of a sum would rank rows with equal neighbourhoods.
    return np.round(distance, 9)


def diversity(neighbours: Neighbours) -> np.ndarray:
    """D = r(mean cosine distance to the neighbours), float64 [n] (docs/selection.md, "Diversity")."""
    return r(mean_distance(neighbours))
