"""Gaussian kernel density of two signals together at their own values, by FFT on a grid."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from scipy.fft import irfft2, next_fast_len, rfft2

from grads_dist.selection.config import Bandwidth
from grads_dist.selection.density import Density, choose_bandwidth, density
from grads_dist.selection.ranks import is_constant

logger = logging.getLogger(__name__)

_GRID_PER_BANDWIDTH = 64
# Fewer points a bandwidth than this smooth more than the bandwidth does.
_COARSE = 8
_MAX_SIDE = 1 << 12
_REACH = 8.0  # bandwidths after which the kernel is cut off, as in density.py
_BLOCK_ROWS = 1 << 19


def joint_density(pair: np.ndarray, rule: Bandwidth) -> Density:
    """Density over two signals, float64 [2, n], at each of their points (docs/selection.md, "Density").

    Where one of them is constant it is the density over the other.
    """
    constant = [is_constant(signal) for signal in pair]
    if any(constant):
        other = density(pair[int(constant[0])], rule)
        widths = [0.0 if c else other.bandwidth for c in constant]
        return Density(other.values, widths[0], other.rule, widths[1])
    chosen = [choose_bandwidth(signal, rule, dims=2) for signal in pair]
    bandwidths = np.array([bandwidth for bandwidth, _ in chosen])
    values = gaussian_kde_2d(pair, bandwidths)
    lowest = 1.0 / (pair.shape[1] * 2 * np.pi * bandwidths.prod())
    rule_used = " and ".join(dict.fromkeys(used for _, used in chosen))
    return Density(np.maximum(values, lowest), float(bandwidths[0]), rule_used, float(bandwidths[1]))


def gaussian_kde_2d(pair: np.ndarray, bandwidths: np.ndarray) -> np.ndarray:
    """Density with a diagonal Gaussian kernel at each point, float64 [n]: on a grid, by FFT.

    Points are binned linearly and the result is interpolated. The grid has 64 points a bandwidth, which keeps
    the relative error below 1e-3, but at most 4096 along a signal: docs/selection.md tells what that reaches.

    Args:
        pair: float64 [2, n], none of the two constant.
        bandwidths: float64 [2], standard deviations of the kernel.
    """
    low = pair.min(axis=1) - _REACH * bandwidths
    width = np.ptp(pair, axis=1) + 2 * _REACH * bandwidths
    wanted = np.ceil(width / bandwidths * _GRID_PER_BANDWIDTH).astype(np.int64) + 2
    shape = tuple(next_fast_len(int(side), real=True) for side in np.minimum(wanted, _MAX_SIDE))
    step = width / (np.array(shape) - 1)
    if (bandwidths < _COARSE * step).any():
        logger.warning("density: outliers stretch the signals, their grid is coarser than the bandwidth asks")
    mass = np.zeros(shape[0] * shape[1])
    for _, corners in _corners(pair, low, step, shape[1]):
        for cell, share in corners:
            mass += np.bincount(cell, weights=share, minlength=len(mass))
    # The margins are as wide as the kernel reaches, so that what wraps around lands on no point.
    kernels = [
        _kernel(side, h / bandwidth) for side, h, bandwidth in zip(shape, step, bandwidths, strict=True)
    ]
    spectrum = rfft2(mass.reshape(shape))
    spectrum *= np.fft.fft(kernels[0]).real[:, None] * np.fft.rfft(kernels[1]).real[None]
    grid = irfft2(spectrum, s=shape, overwrite_x=True).ravel()
    result = np.zeros(pair.shape[1])
    for rows, corners in _corners(pair, low, step, shape[1]):
        for cell, share in corners:
            result[rows] += grid[cell] * share
    return result / (pair.shape[1] * 2 * np.pi * bandwidths.prod())


def _corners(
    pair: np.ndarray, low: np.ndarray, step: np.ndarray, num_columns: int
) -> Iterator[tuple[slice, list[tuple[np.ndarray, np.ndarray]]]]:
    """Blocks of rows, and for each of the four grid points around a point its number and its share."""
    for start in range(0, pair.shape[1], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        place = (pair[:, rows] - low[:, None]) / step[:, None]
        below = place.astype(np.int64)
        (x, y), (up, right) = below, place - below
        cell = x * num_columns + y
        yield (
            rows,
            [
                (cell, (1 - up) * (1 - right)),
                (cell + 1, (1 - up) * right),
                (cell + num_columns, up * (1 - right)),
                (cell + num_columns + 1, up * right),
            ],
        )


def _kernel(num_points: int, step: float) -> np.ndarray:
    """The kernel around point 0 of a ring; `step` is the distance of its points in bandwidths."""
    places = np.arange(num_points)
    offset = np.minimum(places, num_points - places) * step
    return np.where(offset <= _REACH, np.exp(-0.5 * offset**2), 0.0)
