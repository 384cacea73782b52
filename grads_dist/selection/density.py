"""Gaussian kernel density of a signal at its own values, by FFT on a grid."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.fft import dct
from scipy.optimize import brentq

from grads_dist.selection.config import Bandwidth
from grads_dist.selection.ranks import is_constant

logger = logging.getLogger(__name__)

_GRID_PER_BANDWIDTH = 128
_MAX_GRID = 1 << 21
_REACH = 8.0  # bandwidths after which the kernel, 1e-14 of its peak, is cut off
_ISJ_BINS = 1 << 12
_BLOCK_ROWS = 1 << 20
# A quartile range below this share of the whole range is what rounding leaves of none.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Density:
    """A density at the points it was estimated from."""

    values: np.ndarray
    """float64 [n], positive."""

    bandwidth: float
    """Standard deviation of the kernel; 0 for a constant signal, whose density is 1 at every row."""

    rule: str
    """The bandwidth rule that was used: silverman, isj or constant."""

    second_bandwidth: float | None = None
    """Of a density over two signals, that along the second; 0 where one is constant."""


def density(signal: np.ndarray, rule: Bandwidth) -> Density:
    """Density of a signal, float64 [n], at each of its values (docs/selection.md, "Density")."""
    if is_constant(signal):
        return Density(np.ones(len(signal)), 0.0, "constant")
    bandwidth, used = choose_bandwidth(signal, rule)
    values = gaussian_kde(signal, bandwidth)
    # A row's own kernel bounds its density from below; rounding of the FFT may fall under that far out.
    lowest = 1.0 / (len(signal) * bandwidth * np.sqrt(2 * np.pi))
    return Density(np.maximum(values, lowest), bandwidth, used)


def gaussian_kde(signal: np.ndarray, bandwidth: float) -> np.ndarray:
    """Gaussian kernel density at each point, float64 [n]: on a grid, by FFT.

    Points are binned linearly and the result is interpolated. The grid has 128 points a bandwidth, which
    keeps the relative error below 1e-3 even on steep flanks.
    """
    # Its import takes a third of a second, which every rank of a probe would pay.
    from scipy.signal import fftconvolve

    low = float(signal.min()) - _REACH * bandwidth
    width = float(np.ptp(signal)) + 2 * _REACH * bandwidth
    num_points = int(min(_MAX_GRID, width / bandwidth * _GRID_PER_BANDWIDTH)) + 2
    if num_points > _MAX_GRID:
        logger.warning("density: outliers stretch the signal, its grid is coarser than the bandwidth asks")
    step = width / (num_points - 1)
    mass = np.zeros(num_points)
    for _, below, share in _places(signal, low, step):
        mass += np.bincount(below, weights=1.0 - share, minlength=num_points)
        mass += np.bincount(below + 1, weights=share, minlength=num_points)
    num_steps = int(np.ceil(_REACH * bandwidth / step))
    offsets = np.arange(-num_steps, num_steps + 1) * step / bandwidth
    kernel = np.exp(-0.5 * offsets**2) / (len(signal) * bandwidth * np.sqrt(2 * np.pi))
    grid = fftconvolve(mass, kernel, mode="same")
    result = np.empty(len(signal))
    for rows, below, share in _places(signal, low, step):
        result[rows] = grid[below] * (1.0 - share) + grid[below + 1] * share
    return result


def _places(signal: np.ndarray, low: float, step: float) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of rows, the grid point below each, and how far it is to the next one, in [0, 1)."""
    for start in range(0, len(signal), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        place = (signal[rows] - low) / step
        below = place.astype(np.int64)
        yield rows, below, place - below


def choose_bandwidth(signal: np.ndarray, rule: Bandwidth, dims: int = 1) -> tuple[float, str]:
    """Bandwidth of a signal that is not constant, and the rule that gave it; `dims` as for `silverman`."""
    if rule == "isj":
        bandwidth = improved_sheather_jones(signal)
        if bandwidth is not None:
            return bandwidth, "isj"
        logger.warning(
            "density: the isj bandwidth has no solution here (few rows or many ties), silverman is used"
        )
    return silverman(signal, dims), "silverman"


def silverman(signal: np.ndarray, dims: int = 1) -> float:
    """min(std, IQR / 1.349) (4 / (d + 2) n)^(1 / (d + 4)), `dims` d being the signals of the density.

    The std alone where more than half of the rows are equal but for rounding.
    """
    low, high = np.percentile(signal, [25, 75])
    spread = float(signal.std(ddof=1))
    if high - low > _ROUNDING * float(np.ptp(signal)):
        spread = min(spread, float(high - low) / 1.3489795003921634)
    return spread * (len(signal) * (dims + 2) / 4) ** (-1 / (dims + 4))


def improved_sheather_jones(signal: np.ndarray) -> float | None:
    """Bandwidth of Botev, Grotowski and Kroese (2010), equation 30; None where its equation has no root.

    Heavy ties and few rows are where it has none.
    """
    reach = float(np.ptp(signal))
    low = float(signal.min()) - reach / 2
    counts, _ = np.histogram(signal, bins=_ISJ_BINS, range=(low, low + 2 * reach))
    energy = (dct(counts / len(signal))[1:] / 2) ** 2
    squares = np.arange(1, _ISJ_BINS, dtype=np.float64) ** 2
    num_distinct = len(np.unique(signal))

    def gap(t: float) -> float:
        return _isj_gap(t, num_distinct, squares, energy)

    for upper in np.geomspace(1e-8, 0.1, 29):
        if gap(0.0) * gap(upper) < 0:
            return float(np.sqrt(brentq(gap, 0.0, upper))) * 2 * reach
    return None


def _isj_gap(t: float, num_distinct: int, squares: np.ndarray, energy: np.ndarray) -> float:
    """t - xi gamma^[5](t), whose root is the squared bandwidth in units of the grid's range."""
    norm = _derivative_norm(7, t, squares, energy)
    for order in range(6, 1, -1):
        if norm == 0:  # underflow: no bandwidth near this t
            return -1.0
        odd_product = float(np.prod(np.arange(1, 2 * order, 2)))
        constant = (1 + 0.5 ** (order + 0.5)) / 3 * odd_product / np.sqrt(2 * np.pi)
        time = (2 * constant / (num_distinct * norm)) ** (2 / (3 + 2 * order))
        norm = _derivative_norm(order, time, squares, energy)
    return t - (2 * num_distinct * np.sqrt(np.pi) * norm) ** -0.4 if norm > 0 else -1.0


def _derivative_norm(order: int, t: float, squares: np.ndarray, energy: np.ndarray) -> float:
    return 2 * np.pi ** (2 * order) * float(np.sum(squares**order * energy * np.exp(-squares * np.pi**2 * t)))
