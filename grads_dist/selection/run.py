"""Selection from the files of a finished probe."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.checkpoints import fold_checkpoints
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import COMPARED_BY, how_to_get
from grads_dist.selection.relevant import read_relevance
from grads_dist.selection.scored import needs_graph
from grads_dist.selection.select import Selection, needed_columns, select
from grads_dist.selection.signal import signal_columns
from grads_dist.selection.write import write_selection
from grads_dist.similarity.knn import choose_backend
from grads_dist.table.schema import score_schema

if TYPE_CHECKING:
    from grads_dist.config import Config
    from grads_dist.data.corpus import Corpus

logger = logging.getLogger(__name__)


def check_selection(config: Config, targets: list[str]) -> None:
    """Find before a probe what would stop the selection after it; `targets` are the probe's.

    Raises:
        ConfigError: the probe writes no such features or columns, or the search library or its device is not
            there.
    """
    columns = score_schema(targets).names
    for name in signal_columns(config.selection.signal, targets):
        if name not in columns:
            raise ConfigError(
                f"selection.signal: {name!r} is not a column of the score table; "
                f"allowed: {', '.join(columns)}"
            )
        if config.probe.statistics == "moments" and name.endswith((".min", ".max")):
            raise ConfigError(
                f"selection.signal: {name!r} is not read with probe.statistics: moments; use signal norm, or "
                f"statistics: all"
            )
    criterion = config.selection.criterion
    if criterion in COMPARED_BY:
        missing = config.data.target is None or COMPARED_BY[criterion] not in config.probe.feature_names
        if missing:
            raise ConfigError(
                f"selection.criterion: {criterion} compares {COMPARED_BY[criterion]} features with a target "
                f"set; {how_to_get(criterion)}"
            )
    if not needs_graph(config.selection):
        return
    if config.probe.features == "none":
        raise ConfigError(
            "probe.features: none is not allowed, because selection.weights d or r, or "
            "selection.dedup_threshold, compare features; allowed: content, or weights d and r of 0"
        )
    if config.similarity.features not in config.probe.feature_files:
        raise ConfigError(
            f"similarity.features: {config.similarity.features!r} is not what the probe writes; "
            f"allowed: {', '.join(config.probe.feature_files)}"
        )
    choose_backend(config.similarity)


def run_selection(config: Config, rundir: RunDir, corpus: Corpus) -> dict[str, Any]:
    """Select from a run directory and write the selection into it; returns what summary.json holds.

    Raises:
        ConfigError: the run is not probed, or lacks what the configuration asks for.
        DataError: the score table, the features and the corpus do not belong together.
    """
    selection = select_from(config, rundir)
    counts = selection.summary["counts"] | {"corpus": corpus.num_rows, "rejected": _num_rejected(rundir)}
    folder = rundir.selection_dir(config.selection.name)
    summary = write_selection(
        replace(selection, summary=selection.summary | {"counts": counts}), corpus, folder
    )
    logger.info("select: %d rows in %s", len(selection.selected_index), folder / summary["subset"])
    return summary


def select_from(config: Config, rundir: RunDir) -> Selection:
    """Select from a run directory without writing; errors are those of `run_selection`."""
    for path in (rundir.scores, rundir.manifest):
        if not path.exists():
            raise ConfigError(f"output_dir: {str(rundir.root)!r} has no {path.name}; probe first")
    targets = list(json.loads(rundir.manifest.read_text(encoding="utf-8"))["targets"])
    table, targets = fold_checkpoints(_read_table(rundir, config.selection, targets), targets)
    features = _read_features(rundir, config)
    close = None
    if config.selection.criterion in COMPARED_BY:
        close = read_relevance(rundir, config.selection.criterion, config.probe.checkpoint_weights)
        _check_rows(close, table)
    return select(table, features, config.selection, config.similarity, targets, close)


def _read_table(rundir: RunDir, selection: SelectionConfig, targets: list[str]) -> pa.Table:
    """Only the columns that the selection needs; `select` names one that is missing.

    `checkpoint` is not there in runs of earlier versions, which knew but one.
    """
    present = set(pq.read_schema(rundir.scores).names)
    columns = [name for name in [*needed_columns(selection, targets), "checkpoint"] if name in present]
    return pq.read_table(rundir.scores, columns=columns)


def _check_rows(close: np.ndarray, table: pa.Table) -> None:
    if len(close) != table.num_rows:
        raise DataError(f"features of {len(close)} rows do not belong to a table of {table.num_rows} rows")


def _read_features(rundir: RunDir, config: Config) -> np.ndarray | None:
    path = rundir.features(config.similarity.features)
    if not needs_graph(config.selection):
        return None
    if not path.exists():
        found = (file.stem for file in path.parent.glob("*.npy"))
        available = sorted(name for name in found if not name.endswith(".target"))
        if not available:
            return None
        raise ConfigError(
            f"similarity.features: {config.similarity.features!r} is not among the features of the run; "
            f"allowed: {', '.join(available)}"
        )
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _num_rejected(rundir: RunDir) -> int | None:
    """Rows in rejected.jsonl; None where the run has no such file."""
    if not rundir.rejected.exists():
        return None
    with rundir.rejected.open("rb") as lines:
        return sum(1 for _ in lines)
