"""Feature vectors made ready for cosines, and rows whose features are identical."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BLOCK_ROWS = 1 << 16
# A row this close to the corpus mean, relative to the mean's length, points nowhere but along rounding noise.
_ZERO = 1e-6


def unit_vectors(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre features on their mean and normalise them.

    Args:
        features: [n, k] of any float type, possibly a memory map.

    Returns:
        Unit vectors float32 [m, k] of the rows that have a direction, and the numbers of these rows, int64
        [m]. Rows with a value that is not finite, and rows equal to the mean, have none.
    """
    finite = _finite_rows(features)
    mean = _mean(features, finite)
    smallest = _ZERO * np.linalg.norm(mean)
    units = np.empty(features.shape, np.float32)
    rows = np.empty(len(features), np.int64)
    count = 0
    for start, block in _blocks(features):
        numbers = np.flatnonzero(finite[start : start + len(block)])
        centred = block[numbers].astype(np.float64) - mean
        norms = np.linalg.norm(centred, axis=1)
        directed = norms > smallest
        added = slice(count, count + int(directed.sum()))
        units[added] = centred[directed] / norms[directed, None]
        rows[added] = numbers[directed] + start
        count = added.stop
    return units[:count], rows[:count]


def identical_rows(features: np.ndarray) -> np.ndarray:
    """Label every row with the number of the first row that has the same features, int64 [n].

    Rows with a value that is not finite are alike to no other. Rows are matched by a 64-bit hash and then
    compared, so two rows with the same label are equal.
    """
    hashes = np.empty(len(features), np.uint64)
    for start, block in _blocks(features):
        hashes[start : start + len(block)] = _hash(block)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    labels = first[inverse].astype(np.int64)
    for start, block in _blocks(features):
        own = np.arange(start, start + len(block))
        copies = np.flatnonzero(labels[own] != own)
        # Equality also fails where a value is NaN; infinities are excluded by hand.
        same = (block[copies] == features[labels[own[copies]]]).all(axis=1) & np.isfinite(block[copies]).all(
            axis=1
        )
        labels[own[copies[~same]]] = own[copies[~same]]
    return labels


def _blocks(features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(features), _BLOCK_ROWS):
        yield start, np.asarray(features[start : start + _BLOCK_ROWS])


def _finite_rows(features: np.ndarray) -> np.ndarray:
    finite = np.empty(len(features), bool)
    for start, block in _blocks(features):
        finite[start : start + len(block)] = np.isfinite(block).all(axis=1)
    return finite


def _mean(features: np.ndarray, finite: np.ndarray) -> np.ndarray:
    total = np.zeros(features.shape[1])
    for start, block in _blocks(features):
        total += block[finite[start : start + len(block)]].sum(axis=0, dtype=np.float64)
    return total / max(1, int(finite.sum()))


def _hash(block: np.ndarray) -> np.ndarray:
    """A multiply-add hash of each row, uint64 [rows]; 0.0 and -0.0 hash alike."""
    words = (
        np.ascontiguousarray(block + block.dtype.type(0)).view(f"u{block.dtype.itemsize}").astype(np.uint64)
    )
    factors = np.random.default_rng(0).integers(1 << 63, size=words.shape[1], dtype=np.uint64) * np.uint64(2)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(32)
    return (words * (factors + np.uint64(1))).sum(axis=1, dtype=np.uint64)
