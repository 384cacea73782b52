"""The Vendi score: how many different rows a set of rows amounts to, by the cosines between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from grads_dist.selection.sampling import random_subset, sample

WIDE = 1024
"""Features of more dimensions than this are wide."""

# Rows whose eigenvalues take about a second: for wide features those of the m x m form, m being the rows.
_MOST_ROWS, _MOST_WIDE_ROWS = 10_000, 2_000


def vendi_score(units: np.ndarray) -> float | None:
    """exp of the entropy of the eigenvalues of X^T X / m (Friedman and Dieng, 2023, in its dual form).

    1 where all rows are alike, m where all are orthogonal. Rows of zeros are left out; None where none is
    left.

    Args:
        units: unit rows X, [m, dim]. With fewer rows than dimensions X X^T / m is used, which has the same
            eigenvalues but for zeros.
    """
    rows = units[units.any(axis=1)].astype(np.float64)
    if not len(rows):
        return None
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(gram / len(rows))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-np.sum(positive * np.log(positive))))


def describe_vendi(
    features: np.ndarray, places: np.ndarray, index: np.ndarray, selected: np.ndarray, seed: int
) -> dict[str, Any]:
    """Vendi scores of the selected rows, of as many random ones, and of all, each of a seeded sample.

    The score grows with the number of rows: selected and random can be compared, and all with neither.
    Features are centred on the mean of the sample of all; rows without a direction are left out.

    Args:
        features: of the rows of the score table, [rows, dim], possibly a memory map.
        places: where the candidates stand in it, int64 [n].
        index: their row numbers in the corpus, int64 [n].
        selected: bool [n].
        seed: of the samples.
    """
    most = _MOST_ROWS if features.shape[1] <= WIDE else _MOST_WIDE_ROWS
    everything = np.ones(len(index), bool)
    baseline = random_subset(index, int(selected.sum()), seed)
    centre = None
    result: dict[str, Any] = {"dimensions": features.shape[1]}
    for name, members in {"all": everything, "selected": selected, "random": baseline}.items():
        rows = np.asarray(features[places[sample(np.flatnonzero(members), index, most, seed, "vendi")]])
        rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
        if centre is None:
            centre = rows.mean(axis=0) if len(rows) else np.zeros(features.shape[1])
        units = _units(rows - centre, float(np.linalg.norm(centre)))
        result[name] = vendi_score(units)
        result[f"rows_{name}"] = int(units.any(axis=1).sum())
    return result


def _units(centred: np.ndarray, scale: float) -> np.ndarray:
    """Rows divided by their norms; zeros for one no longer than rounding leaves at the centre's `scale`."""
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    directed = norms > 1e-6 * scale
    return np.where(directed, centred, 0.0) / np.where(directed, norms, 1.0)
