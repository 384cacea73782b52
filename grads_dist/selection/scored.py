"""The candidate rows of a score table with everything that ranks them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from grads_dist.errors import ConfigError, DataError
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.criteria import GradientCriterion, gradient_criterion
from grads_dist.selection.duplicates import Candidates, candidates, rows_of
from grads_dist.selection.labels import Labels
from grads_dist.selection.score import Terms, combine
from grads_dist.selection.signal import Signal, compute_signal
from grads_dist.selection.stages import Stages
from grads_dist.selection.strata import find_strata
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import Neighbours, knn
from grads_dist.similarity.points import UnitRows, unit_rows


@dataclass(frozen=True)
class Scored:
    """n candidate rows, by rising corpus index, and what is known of them."""

    table: pa.Table
    """The candidates' rows of the score table: the columns of numbers, without `token_hash`."""

    found: Candidates
    """Where they stand in the score table, and what was left out."""

    signal: Signal
    """The signal."""

    criterion: GradientCriterion | None
    """G; None under a control that does not need it."""

    points: UnitRows | None
    """The features of the rows; None where there are none."""

    graph: Neighbours | None
    """The neighbours; None where neither a weight nor `dedup_threshold` needs them."""

    terms: Terms | None
    """G, D, R and score; None under a control that does not need them."""

    strata: Labels | None
    """The strata; None without `stratify_by`."""

    @property
    def index(self) -> np.ndarray:
        """Row number in the corpus, int64 [n]."""
        return self.table.column("index").to_numpy()

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each row, int32 [n]."""
        return self.table.column("num_tokens").to_numpy()


def score_rows(
    table: pa.Table,
    features: np.ndarray | None,
    selection: SelectionConfig,
    similarity: SimilarityConfig,
    targets: list[str],
    stages: Stages,
    strata: np.ndarray | None = None,
    graph_folder: Path | None = None,
) -> Scored:
    """Score the rows of a score table; arguments and errors are those of `select.select`."""
    _check_features(table, features, selection)
    with stages("candidates"):
        found = candidates(table, selection.keep_duplicates)
        if len(found.rows) == 0:
            raise DataError(f"none of the {table.num_rows} rows of the score table has status ok")
        rows = rows_of(_numbers(table), found.rows)
        labels = find_strata(table, selection.stratify_by, strata)
        if labels is not None:
            labels = replace(labels, codes=labels.codes[found.rows])
    with stages("signal"):
        signal = compute_signal(rows, selection, targets)
    criterion, points, graph, terms = None, None, None, None
    if needs_terms(selection):
        with stages("criterion"):
            index = rows.column("index").to_numpy()
            criterion = gradient_criterion(signal.values, index, selection, signal.pair)
    if features is not None:
        with stages("neighbours"):
            points = unit_rows(features, found.rows)
            graph = knn(points, similarity, graph_folder) if needs_graph(selection) else None
    if criterion is not None:
        with stages("score"):
            terms = combine(criterion, graph, selection.weights)
    return Scored(rows, found, signal, criterion, points, graph, terms, labels)


def needs_terms(selection: SelectionConfig) -> bool:
    """Whether rows are scored by gradients: to be picked, or to give a control its lengths or size."""
    if selection.criterion in ("grads", "length_matched_random"):
        return True
    return selection.gradient == "zscore" and not selection.has_budget


def needs_graph(selection: SelectionConfig) -> bool:
    """Whether the configuration asks for the neighbours of the rows."""
    weighted = selection.weights.d != 0 or selection.weights.r != 0
    return selection.dedup_threshold is not None or (weighted and needs_terms(selection))


def needs_features(selection: SelectionConfig) -> bool:
    """Whether the configuration reads the features."""
    return selection.pick == "cluster" or needs_graph(selection)


def _numbers(table: pa.Table) -> pa.Table:
    """Without the columns that only `candidates` reads, and the texts, of which few are ever needed."""
    numeric = (pa.types.is_integer, pa.types.is_floating)
    return table.select(
        [c.name for c in table.schema if c.name != "token_hash" and any(is_(c.type) for is_ in numeric)]
    )


def _check_features(table: pa.Table, features: np.ndarray | None, selection: SelectionConfig) -> None:
    if features is None and needs_features(selection):
        weights, threshold = selection.weights, selection.dedup_threshold
        if threshold is not None:
            raise ConfigError(
                f"selection.dedup_threshold: {threshold} compares features, "
                "and the run has none; allowed: null, or a run probed with features"
            )
        if selection.pick == "cluster":
            raise ConfigError(
                "selection.pick: cluster compares features, and the run has none; "
                "allowed: topk or gumbel, or a run probed with features"
            )
        raise ConfigError(
            f"selection.weights: d {weights.d} and r {weights.r} compare features, and the run has none; "
            "set both to 0, or probe with features"
        )
    if features is not None and (features.ndim != 2 or len(features) != table.num_rows):
        raise DataError(
            f"features of shape {list(features.shape)} do not belong to a table of {table.num_rows} rows"
        )
