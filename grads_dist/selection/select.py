"""From a score table and features to the selected rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grads_dist.selection.choose import Choice, choose
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.content import describe_content
from grads_dist.selection.diagnostics import (
    COMPARED_ROWS,
    describe_budget,
    describe_controls,
    describe_counts,
    describe_shares,
    describe_signal,
    describe_strata,
    describe_terms,
)
from grads_dist.selection.ranks import positions
from grads_dist.selection.scored import Scored, score_rows
from grads_dist.selection.signal import signal_columns
from grads_dist.selection.stages import Stages
from grads_dist.similarity.config import SimilarityConfig


@dataclass(frozen=True)
class Selection:
    """The selected rows and why; arrays run over the n candidate rows by rising corpus index."""

    index: np.ndarray
    """int64 [n], row number in the corpus."""

    selected_ids: pa.ChunkedArray
    """string [selected], of the selected rows by rising corpus index."""

    signal: np.ndarray
    """float64 [n], after adjustment."""

    gradient: np.ndarray
    """G, float64 [n]; NaN under a control."""

    diversity: np.ndarray
    """D, float64 [n]; NaN where no graph was needed."""

    redundancy: np.ndarray
    """R, float64 [n]; NaN where no graph was needed."""

    neighbour: np.ndarray
    """int64 [n], corpus index of the row that R is due to, -1 for none."""

    score: np.ndarray
    """float64 [n]."""

    rank: np.ndarray
    """int64 [n], place from 1 in the order of the pick (docs/selection.md, "Picks"), ties by index."""

    selected: np.ndarray
    """bool [n]."""

    copies: np.ndarray
    """int64 [m], corpus index of rows whose tokens equal those of an earlier row."""

    originals: np.ndarray
    """int64 [m], corpus index of the first row with these tokens."""

    summary: dict[str, Any]
    """What summary.json holds (docs/selection.md, "Summary")."""

    @property
    def selected_index(self) -> np.ndarray:
        """Corpus index of the selected rows, rising, int64."""
        return self.index[self.selected]


def select(
    table: pa.Table,
    features: np.ndarray | None,
    selection: SelectionConfig,
    similarity: SimilarityConfig,
    targets: list[str],
    relevance: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    graph_folder: Path | None = None,
) -> Selection:
    """Select rows of a score table (docs/selection.md).

    The result depends on the arguments alone, and not on the order of the table's rows.

    Args:
        table: score table; at least the columns that `needed_columns` names.
        features: [rows of the table, k], possibly a memory map; None if there are none.
        selection: what is scored and how much is picked.
        similarity: how neighbours are found.
        targets: names of the probed targets.
        relevance: [rows of the table], closeness to the target set, for the criteria rds and less.
        strata: [rows of the table], labels for `stratify_by`; by default its column of the score table.
        graph_folder: where the neighbours are kept and found again.

    Raises:
        ConfigError: a column or the features that the configuration needs are missing, or it leaves no row.
        DataError: no row has status ok, or table and features do not belong together.
    """
    stages = Stages()
    scored = score_rows(table, features, selection, similarity, targets, stages, strata, graph_folder)
    with stages("pick"):
        close = None if relevance is None else relevance[scored.found.rows]
        choice = choose(scored, table.num_rows, selection, targets, close)
    with stages("diagnostics"):
        result = _result(table, scored, choice, selection)
        summary = _summary(scored, choice, result, table.num_rows, selection, targets)
    if features is not None:
        with stages("content"):
            summary |= describe_content(
                features,
                scored.found.rows,
                result.index,
                result.selected,
                name=similarity.features,
                seed=selection.seed,
                points=scored.points,
                graph=scored.graph,
            )
    options = {"selection": asdict(selection), "similarity": asdict(similarity)}
    return replace(result, summary=options | summary | {"seconds": stages.seconds})


def needed_columns(selection: SelectionConfig, targets: list[str]) -> list[str]:
    """Columns of the score table that `select` reads, if they are there."""
    fixed = ["index", "id", "status", "num_tokens", "num_label_tokens", "loss", "el2n", "step", "token_hash"]
    norms = [f"{target}.sumsq" for target in targets]
    strata = [] if selection.stratify_by is None else [selection.stratify_by]
    return list(dict.fromkeys(fixed + signal_columns(selection.signal, targets) + norms + strata))


def _result(table: pa.Table, scored: Scored, choice: Choice, selection: SelectionConfig) -> Selection:
    index = scored.index
    unknown = np.full(len(index), np.nan)
    terms = scored.terms if selection.criterion == "grads" else None
    shadow = np.full(len(index), -1, np.int64) if terms is None else terms.shadow
    return Selection(
        index=index,
        selected_ids=table.column("id").take(pa.array(scored.found.rows[choice.selected])),
        signal=scored.signal.values,
        gradient=unknown if terms is None else terms.gradient,
        diversity=unknown if terms is None else terms.diversity,
        redundancy=unknown if terms is None else terms.redundancy,
        neighbour=np.where(shadow >= 0, index[shadow], -1),
        score=choice.score,
        rank=positions(choice.value) + 1,
        selected=choice.selected,
        copies=scored.found.copies,
        originals=scored.found.originals,
        summary={},
    )


def _summary(
    scored: Scored,
    choice: Choice,
    result: Selection,
    num_scored: int,
    selection: SelectionConfig,
    targets: list[str],
) -> dict[str, Any]:
    terms = {"G": result.gradient, "D": result.diversity, "R": result.redundancy, "score": result.score}
    estimate = None if scored.criterion is None else scored.criterion.density
    tau = scored.terms.tau if scored.terms is not None and selection.criterion == "grads" else None
    search = None if scored.graph is None else scored.graph.search
    return {
        "counts": describe_counts(num_scored, scored.found, int(choice.allowed.sum()), choice.selected),
        "budget": describe_budget(selection, choice.budget),
        "shares": describe_shares(scored.table, choice.selected),
        "near_duplicates": _near_duplicates(choice, selection),
        "terms": describe_terms(terms, choice.selected) | {"tau": tau},
        "signal": describe_signal(scored.signal, scored.table, estimate),
        "overlap": describe_controls(scored.table, targets, selection, choice.budget, choice.selected),
        "overlap_rows": min(len(result.index), COMPARED_ROWS),
        "strata": None if scored.strata is None else describe_strata(scored.strata, choice.selected),
        "neighbours": None if search is None else asdict(search),
    }


def _near_duplicates(choice: Choice, selection: SelectionConfig) -> dict[str, Any] | None:
    """Whether certainly no two selected rows reach the threshold; None where there is none."""
    if choice.distinct is None:
        return None
    return {"threshold": selection.dedup_threshold, "exact": choice.distinct}
