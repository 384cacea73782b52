"""Features for the tests of similarity, and neighbours by the plainest of means."""

import numpy as np


def clustered(num_rows: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Features in clusters away from the origin, with copies, near-copies and two broken rows, float16."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    rows = centres[rng.integers(0, 20, num_rows)] + 0.4 * rng.normal(size=(num_rows, dim)) + 3
    sources = rng.integers(0, num_rows, num_rows // 10)
    rows[rng.integers(0, num_rows, len(sources))] = rows[sources]
    sources = rng.integers(0, num_rows, num_rows // 10)
    rows[rng.integers(0, num_rows, len(sources))] = rows[sources] + 0.002 * rng.normal(
        size=(len(sources), dim)
    )
    rows[num_rows // 3 : num_rows // 3 + min(50, num_rows // 8)] = rows[0]
    rows[-1], rows[-2] = np.nan, np.inf
    return rows.astype(np.float16)


def all_cosines(features: np.ndarray) -> np.ndarray:
    """Rounded cosines float64 [n, n] of centred rows as float32 vectors; -2 for rows without direction."""
    features = features.astype(np.float64)
    finite = np.isfinite(features).all(axis=1)
    centred = features - features[finite].mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    usable = finite & (norms > 1e-9)
    units = np.zeros(features.shape, np.float32)
    units[usable] = centred[usable] / norms[usable, None]
    units = units.astype(np.float64)
    cosine = np.minimum(np.round(units @ units.T, 6), 1.0)
    cosine[~usable] = cosine[:, ~usable] = -2
    return cosine


def neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, cosines) of the k nearest, equal cosines by row number, by sorting all pairs."""
    cosine = all_cosines(features)
    num_rows = len(features)
    width = max(0, min(k, num_rows - 1))
    ids, values = np.full((num_rows, width), -1), np.full((num_rows, width), np.nan)
    for i in range(num_rows):
        order = np.argsort(-cosine[i], kind="stable")
        others = order[(order != i) & (cosine[i, order] > -2)][:width]
        ids[i, : len(others)], values[i, : len(others)] = others, cosine[i, others]
    return ids, values.astype(np.float32)
