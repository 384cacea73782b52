"""Smooth fits of a signal on a row's length or step, and their removal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.selection.ranks import distinct

_MAX_TERMS = 8
_ROWS_PER_TERM = 10
_TAIL = 0.001  # share of the rows beyond each outer knot


@dataclass(frozen=True)
class Detrended:
    """A signal without what another column explains."""

    residual: np.ndarray
    """float64 [n], mean zero."""

    r2: float
    """Share of the variance that was explained and removed."""


def remove_trend(signal: np.ndarray, column: np.ndarray, log: bool) -> Detrended:
    """Subtract the least-squares fit of a restricted cubic spline (docs/selection.md, "Length").

    The fit has at most 8 terms, at most one for 10 rows and at most one for each distinct value, so that it
    follows the trend and not the rows. It is found on the means over rows with equal values, which is the
    same fit.

    Args:
        signal: float64 [n].
        column: whole numbers [n] the trend runs over, positive where `log` is set.
        log: fit on the logarithm of the column.
    """
    values, group, counts = distinct(column)
    means = np.bincount(group, weights=signal) / counts
    x = np.log(values.astype(np.float64)) if log else values.astype(np.float64)
    residual = signal - _fit(x, means, counts.astype(np.float64))[group]
    total = float(np.mean((signal - signal.mean()) ** 2))
    left = float(np.mean(residual**2))
    # What a perfect fit leaves is rounding; kept, it would be ranked like a signal.
    if left <= 1e-18 * max(total, float(np.mean(signal**2))):
        return Detrended(np.zeros(len(signal)), 1.0 if len(values) > 1 and total > 0 else 0.0)
    return Detrended(residual, 1.0 - left / total)


def _fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares on the distinct values x, rising; fitted values at x."""
    num_terms = int(min(_MAX_TERMS, len(x), max(1, weights.sum() // _ROWS_PER_TERM)))
    basis = _basis(x, weights, num_terms)
    root = np.sqrt(weights)
    coefficients = np.linalg.lstsq(basis * root[:, None], y * root, rcond=None)[0]
    return basis @ coefficients


def _basis(x: np.ndarray, weights: np.ndarray, num_terms: int) -> np.ndarray:
    """Terms of a cubic spline that is linear beyond its outer knots, [len(x), num_terms].

    Linear ends keep a few very long rows from bending the fit. The knots are evenly spaced, so that short and
    long rows are followed as closely as those of the usual length.
    """
    if num_terms == 1:
        return np.ones((len(x), 1))
    scaled = (x - x[0]) / (x[-1] - x[0])
    columns = [np.ones(len(x)), scaled]
    if num_terms > 2:
        reached = np.cumsum(weights) / weights.sum()
        low, high = scaled[np.searchsorted(reached, [_TAIL, 1 - _TAIL])]
        knots = np.linspace(low, high, num_terms) if low < high else np.linspace(0.0, 1.0, num_terms)
        columns += _curved_terms(scaled, knots)
    return np.stack(columns, axis=1)


def _curved_terms(x: np.ndarray, knots: np.ndarray) -> list[np.ndarray]:
    """The nonlinear terms of a restricted cubic spline (Harrell, Regression Modeling Strategies, 2.4.5)."""
    last, before = knots[-1], knots[-2]

    def cubed(knot: float) -> np.ndarray:
        return np.maximum(x - knot, 0.0) ** 3

    return [
        cubed(knot)
        - cubed(before) * (last - knot) / (last - before)
        + cubed(last) * (before - knot) / (last - before)
        for knot in knots[:-2]
    ]
