"""Controls: simple rankings that a selection has to beat."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection.checkpoints import without_checkpoint
from grads_dist.selection.noise import uniform
from grads_dist.selection.ranks import distinct
from grads_dist.selection.signal import read_column

CONTROLS = ("random", "length_matched_random", "loss", "grand", "el2n")
COMPARED_BY = {"rds": "content", "less": "gradient"}
"""The criteria that compare with a target set, and the features that they compare by."""

# So many rows of about one length are drawn from: with fewer, a control could only repeat the selection.
_ROWS_PER_BIN = 50


def control_score(
    name: str,
    table: pa.Table,
    targets: list[str],
    seed: int,
    reference: np.ndarray | None,
    relevance: np.ndarray | None = None,
) -> np.ndarray:
    """Score of every row under a control, float64 [n], the best highest (docs/selection.md, "Controls").

    Args:
        name: one of `CONTROLS` or `COMPARED_BY`.
        table: the candidate rows of the score table.
        targets: probed targets, for `grand`.
        seed: of the random controls.
        reference: bool [n], the selection whose lengths `length_matched_random` repeats; its other rows
        rank last.
        relevance: float64 [n], closeness to the target set, for those of `COMPARED_BY`.

    Raises:
        ConfigError: a column or the relevance is missing or, for `grand`, there is no target.
        DataError: a column is not finite.
    """
    if name in ("loss", "el2n"):
        return read_column(table, name, "selection.criterion")
    if name in COMPARED_BY:
        return _relevance(name, relevance)
    if name == "grand":
        return gradient_norm(table, targets)
    noise = uniform(table.column("index").to_numpy(), seed, name)
    if name == "random":
        return noise
    assert reference is not None
    return noise + _length_matched(table.column("num_label_tokens").to_numpy(), noise, reference)


def gradient_norm(table: pa.Table, targets: list[str]) -> np.ndarray:
    """Norm of the gradient over all probed targets, float64 [n]; errors as `control_score`.

    `tied` is the sum of the gradients of `embedding` and `lm_head`, which then are not counted again.
    """
    has_tied = "tied" in map(without_checkpoint, targets)
    parts = ("embedding", "lm_head") if has_tied else ()
    counted = [name for name in targets if without_checkpoint(name) not in parts]
    if not counted:
        raise ConfigError(
            "selection.criterion: grand needs at least one target, and the score table has none"
        )
    return np.sqrt(
        np.sum([read_column(table, f"{name}.sumsq", "selection.criterion") for name in counted], axis=0)
    )


def _relevance(name: str, relevance: np.ndarray | None) -> np.ndarray:
    if relevance is None:
        raise ConfigError(
            f"selection.criterion: {name} needs {COMPARED_BY[name]} features of a target set, and the run "
            f"has none; {how_to_get(name)}"
        )
    num_bad = int(np.count_nonzero(~np.isfinite(relevance)))
    if num_bad:
        raise DataError(f"{COMPARED_BY[name]} features are not finite in {num_bad} rows with status ok")
    return relevance


def how_to_get(name: str) -> str:
    """Which options of a probe give what a criterion of `COMPARED_BY` needs."""
    if name == "rds":
        return "probe with data.target set and content in probe.features"
    return (
        "probe with data.target set and gradient in probe.features (mode frozen, or train with probe.warmup)"
    )


def length_bins(lengths: np.ndarray) -> np.ndarray:
    """Bins of neighbouring lengths, int64 [n]: a new one starts with the first length after 50 rows."""
    _, group, counts = distinct(lengths)
    num_shorter = np.cumsum(counts) - counts
    return (num_shorter // _ROWS_PER_BIN)[group]


def _length_matched(lengths: np.ndarray, noise: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1.0 for as many rows of each bin as the reference has there, those with the largest noise; else 0.0."""
    bins = length_bins(lengths)
    quota = np.bincount(bins[reference], minlength=int(bins.max(initial=0)) + 1)
    order = np.lexsort((-noise, bins))
    sorted_bins = bins[order]
    starts = np.searchsorted(sorted_bins, sorted_bins, side="left")
    picked = np.arange(len(order)) - starts < quota[sorted_bins]
    result = np.empty(len(order))
    result[order] = picked
    return result
