"""How close rows are to a target set: cosines of their features to those of its rows."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from grads_dist.errors import DataError

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 1 << 14
_TARGET_ROWS = 1 << 10
# Matrix products differ in the seventh decimal between libraries, which must not decide between equal rows.
_DECIMALS = {"max": 6, "mean": 12}


def relevance(features: np.ndarray, target: np.ndarray, reduce: Literal["max", "mean"]) -> np.ndarray:
    """The largest, or the mean, cosine of each row to the target rows, float64 [n]; not centred.

    A row without a direction (all zeros) has cosine 0 to all; one with a value that is not finite gives
    NaN. Target rows of either kind are left out.

    Args:
        features: [n, k] of any float type, possibly a memory map.
        target: [m, k].
        reduce: what is made of a row's m cosines.

    Raises DataError when no target row has a direction, or widths differ.
    """
    if features.shape[1] != target.shape[1]:
        raise DataError(
            f"features of width {features.shape[1]} do not belong to a target set of width {target.shape[1]}"
        )
    units = _units(np.asarray(target))
    usable = np.isfinite(units).all(1) & units.any(1)
    if not usable.any():
        raise DataError(f"none of the {len(target)} rows of the target set has a direction in feature space")
    if not usable.all():
        logger.warning(
            "%d of %d target rows have no direction, and are left out", (~usable).sum(), len(usable)
        )
    units = units[usable]
    # The mean of cosines is the product with the mean of the unit vectors.
    compared = units.mean(0, keepdims=True) if reduce == "mean" else units.astype(np.float32)
    result = np.empty(len(features))
    for start in range(0, len(features), _BLOCK_ROWS):
        block = _units(np.asarray(features[start : start + _BLOCK_ROWS])).astype(compared.dtype)
        result[start : start + len(block)] = _largest(block, compared)
    return np.round(result, _DECIMALS[reduce])


def _largest(block: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """The largest product of each row with the compared ones, some of these at a time."""
    found = np.full(len(block), -np.inf)
    for start in range(0, len(compared), _TARGET_ROWS):
        products = block @ compared[start : start + _TARGET_ROWS].T
        found = np.maximum(found, products.max(1))
    return found


def _units(features: np.ndarray) -> np.ndarray:
    """Rows divided by their norms, float64; rows of zeros stay."""
    rows = features.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return rows / np.where(norms > 0, norms, 1.0)
