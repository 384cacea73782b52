"""How close the rows of a run are to its target set, from the feature files of its probe."""

from __future__ import annotations

import numpy as np

from grads_dist.errors import ConfigError
from grads_dist.probe.config import gradient_files
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.controls import how_to_get
from grads_dist.similarity.relevance import relevance


def read_relevance(
    rundir: RunDir, criterion: str, weights: list[float] | None, rows: np.ndarray | None = None
) -> np.ndarray:
    """Closeness of rows of the corpus to the target set, float64 [n] (docs/selection.md, "Controls").

    Args:
        rundir: a probed run.
        criterion: rds (the largest cosine of content features) or less (the mean cosine of gradient features,
            averaged over checkpoints).
        weights: of the checkpoints; None: all alike.
        rows: which rows of the score table, int64 [n]; None: all.

    Raises:
        ConfigError: the run has no such features, or not as many checkpoints as there are weights.
        DataError: the target set has no row that can be compared with.
    """
    if criterion == "rds":
        return _of_files(rundir, "content", criterion, rows)
    names = _gradient_names(rundir)
    if weights is None:
        weights = [1.0] * len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"probe.checkpoint_weights: {len(weights)} weights for the {len(names)} checkpoints of the run; "
            "allowed: one for each"
        )
    parts = [
        weight * _of_files(rundir, name, criterion, rows) for weight, name in zip(weights, names, strict=True)
    ]
    return np.sum(parts, axis=0) / sum(weights)


def relevance_files(rundir: RunDir, criterion: str) -> list[str]:
    """Names of the features that a criterion compares; none where the run lacks them, or the target set's."""
    names = ["content"] if criterion == "rds" else _gradient_names(rundir)
    files = [rundir.features(name) for stem in names for name in (stem, RunDir.of_target(stem))]
    return names if all(path.exists() for path in files) else []


def _gradient_names(rundir: RunDir) -> list[str]:
    checkpoints = rundir.read_manifest().get("checkpoints", [])
    return gradient_files(len(checkpoints))


def _of_files(rundir: RunDir, name: str, criterion: str, rows: np.ndarray | None) -> np.ndarray:
    arrays = []
    for path in (rundir.features(name), rundir.features(RunDir.of_target(name))):
        if not path.exists():
            raise ConfigError(
                f"selection.criterion: {criterion} needs {path.relative_to(rundir.root)}, which the run does "
                f"not have; {how_to_get(criterion)}"
            )
        arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
    features, target = arrays
    return relevance(
        features if rows is None else features[rows], target, "max" if criterion == "rds" else "mean"
    )
