"""The gradient criterion G: what a row's signal is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.density import Density, density
from grads_dist.selection.joint_density import joint_density
from grads_dist.selection.noise import gumbel
from grads_dist.selection.ranks import average_rank, r, z


@dataclass(frozen=True)
class GradientCriterion:
    """G of n rows."""

    values: np.ndarray
    """float64 [n] in [0, 1]."""

    eligible: np.ndarray
    """bool [n]: rows that may be picked at all; the criterion zscore cuts rows off, all others do not."""

    density: Density | None
    """The density of the signal, where the criterion uses it."""


def gradient_criterion(
    signal: np.ndarray, index: np.ndarray, config: SelectionConfig, pair: np.ndarray | None = None
) -> GradientCriterion:
    """G of every row by the configured variant (docs/selection.md, "Gradient criterion").

    Args:
        signal: float64 [n].
        index: row numbers in the corpus, int64 [n]; the variant `flatten` draws by them.
        config: names the variant and holds its parameters.
        pair: float64 [2, n], what the density is over instead of the signal.
    """
    everyone = np.ones(len(signal), bool)
    if config.gradient == "magnitude":
        return GradientCriterion(r(signal), everyone, None)
    if config.gradient == "band":
        low, high = np.quantile(signal, config.band)
        return GradientCriterion(((signal >= low) & (signal <= high)).astype(np.float64), everyone, None)
    if config.gradient == "zscore":
        inside = np.abs(z(signal)) <= config.zscore
        return GradientCriterion(inside.astype(np.float64), inside, None)
    if pair is None:
        estimate = density(signal, config.bandwidth)
    else:
        estimate = joint_density(pair, config.bandwidth)
    return GradientCriterion(_from_density(signal, estimate.values, index, config), everyone, estimate)


def _from_density(
    signal: np.ndarray, p: np.ndarray, index: np.ndarray, config: SelectionConfig
) -> np.ndarray:
    if config.gradient == "density":
        return r(p)
    if config.gradient == "density_magnitude":
        # Of ranks and not of shares: their products are exact, so that equal products are ties.
        return r(average_rank(p) * average_rank(signal))
    if config.gradient == "rare":
        return 1.0 - r(p)
    return r(gumbel(index, config.seed, "flatten") - np.log(p))
