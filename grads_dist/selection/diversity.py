"""The content diversity D: how far a row is from its neighbours."""

from __future__ import annotations

import numpy as np

from grads_dist.selection.ranks import r
from grads_dist.similarity.knn import Neighbours


def mean_distance(neighbours: Neighbours) -> np.ndarray:
    """Mean cosine distance to the neighbours a row has, float64 [n]; 1 for a row without any."""
    found = (neighbours.ids >= 0).sum(axis=1)
    total = np.nansum(neighbours.cosine, axis=1, dtype=np.float64)
    # Rounded like the cosines: otherwise the order of a sum would rank rows with equal neighbourhoods.
    return np.round(1.0 - total / np.maximum(found, 1), 9)


def diversity(neighbours: Neighbours) -> np.ndarray:
    """D = r(mean cosine distance to the neighbours), float64 [n] (docs/selection.md, "Diversity")."""
    return r(mean_distance(neighbours))
