"""Rows whose features are identical."""

from __future__ import annotations

import numpy as np

from grads_dist.similarity.points import UnitRows


def identical_rows(points: UnitRows) -> np.ndarray:
    """Label every row with the number of the first row that has the same features, int64 [n].

    A row without direction is alike to no other. Rows are matched by a 64-bit hash and then compared, so two
    rows with the same label are equal.
    """
    hashes = np.empty(points.num_rows, np.uint64)
    for start, stop in points.bounds():
        hashes[start:stop] = _hash(points.raw(start, stop))
    labels = _first_with_the_same(hashes)
    for start, stop in points.bounds():
        own = np.arange(start, stop)
        copies = own[labels[start:stop] != own]
        same = (points.take_raw(copies) == points.take_raw(labels[copies])).all(axis=1)
        same &= points.has_direction[copies]
        labels[copies[~same]] = copies[~same]
    return labels


def _first_with_the_same(hashes: np.ndarray) -> np.ndarray:
    """The number of the first entry that has the same value, int64."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(hashes)]
    labels = np.empty(len(hashes), np.int64)
    labels[order] = order[begins][np.cumsum(begins) - 1]
    return labels


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
