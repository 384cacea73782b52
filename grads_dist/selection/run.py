"""Selection from the files of a finished probe, or from a table that no probe wrote."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError, DataError, GradsDistError
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import COMPARED_BY
from grads_dist.selection.duplicates import candidates
from grads_dist.selection.labels import Labels, labels_of_corpus, unknown_column
from grads_dist.selection.origin import Origin
from grads_dist.selection.relevant import read_relevance
from grads_dist.selection.run_diagnostics import describe_more
from grads_dist.selection.scored import needs_features, needs_graph
from grads_dist.selection.select import Selection, select
from grads_dist.selection.source import CANDIDATE_COLUMNS, Source, run_source
from grads_dist.selection.stages import Stages
from grads_dist.selection.write import write_selection
from grads_dist.similarity.config import SimilarityConfig
from grads_dist.similarity.knn import knn
from grads_dist.similarity.points import UnitRows, unit_rows

if TYPE_CHECKING:
    from grads_dist.config import Config, TableConfig
    from grads_dist.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


def run_selection(config: Config, rundir: RunDir, corpus: Corpus) -> dict[str, Any]:
    """Select from a run directory and write the selection into it; returns what summary.json holds.

    Raises:
        ConfigError: the run is not probed, or lacks what the configuration asks for.
        DataError: the score table, the features and the corpus do not belong together.
    """
    selection = select_from(config, rundir, corpus)
    counts = {"corpus": corpus.num_rows, "rejected": _num_rejected(rundir)}
    manifest = rundir.read_manifest()
    origin = Origin(config.selection, config.data, config.model, config.probe, manifest)
    folder = rundir.selection_dir(config.selection.name)
    return _write(_with_counts(selection, counts), corpus, folder, origin)


def table_selection(config: TableConfig, source: Source, corpus: Corpus | None) -> dict[str, Any]:
    """Select from a table that no probe wrote, and write the selection; returns what summary.json holds.

    Without a corpus no subset is written. Errors are those of `run_selection`.
    """
    selection = _select_source(source, config.selection, config.similarity, corpus, None)
    selection = _with_counts(selection, {"corpus": None if corpus is None else corpus.num_rows})
    files = {"scores": source.scores, **source.features}
    read = {"table": {name: str(path) for name, path in files.items()}}
    origin = None if config.data is None else Origin(config.selection, config.data)
    folder = source.output.selection_dir(config.selection.name)
    return _write(replace(selection, summary=selection.summary | read), corpus, folder, origin)


def select_from(config: Config, rundir: RunDir, corpus: Corpus | None = None) -> Selection:
    """Select from a run directory without writing the selection; errors are those of `run_selection`.

    Neighbours that had to be searched are kept in the run directory. `corpus` is opened if it is needed.
    """
    source = run_source(rundir)
    stratify_by = config.selection.stratify_by
    if corpus is None and stratify_by is not None and stratify_by not in source.columns:
        corpus = Corpus.open(config.data)
    return _select_source(
        source, config.selection, config.similarity, corpus, config.probe.checkpoint_weights
    )


def share_graph(
    source: Source, selection: SelectionConfig, similarity: SimilarityConfig, ranks: Ranks
) -> None:
    """Search the neighbours on all ranks, into the folder where rank 0 will look for them. Collective.

    Every rank reads of the table what tells the candidates, and of the features the rows it searches with.
    Errors are those of `run_selection`, the same on every rank.
    """
    if not needs_graph(selection):
        return
    points: UnitRows | None = None
    failure: GradsDistError | None = None
    try:
        points = _points(source, selection, similarity)
    except GradsDistError as error:
        failure = error
    ranks.agree(failure)
    if not any(ranks.gather(points is not None)):
        return
    if points is None:
        failure = DataError(
            f"similarity.features: rank {ranks.rank} does not see the files of {similarity.features!r}"
        )
    ranks.agree(failure)
    assert points is not None
    knn(points, similarity, source.graph_folder(similarity.features), ranks)


def _with_counts(selection: Selection, counts: dict[str, int | None]) -> Selection:
    summary = selection.summary
    return replace(selection, summary=summary | {"counts": summary["counts"] | counts})


def _write(
    selection: Selection, corpus: Corpus | None, folder: Path, origin: Origin | None
) -> dict[str, Any]:
    summary = write_selection(selection, corpus, folder, origin)
    logger.info("select: %d rows in %s", len(selection.selected_index), folder)
    return summary


def _select_source(
    source: Source,
    selection: SelectionConfig,
    similarity: SimilarityConfig,
    corpus: Corpus | None,
    weights: list[float] | None,
) -> Selection:
    stages = Stages()
    with stages("read"):
        table, targets = source.selection_table(selection)
        features = _features(source, similarity.features, needed=needs_features(selection))
        labels = _labels(source, table, selection.stratify_by, corpus)
    close = None
    if selection.criterion in COMPARED_BY:
        with stages("relevance"):
            close = read_relevance(source.output, selection.criterion, weights)
            _check_rows(close, table)
    found = select(
        table,
        features,
        selection,
        similarity,
        targets,
        close,
        strata=None if labels is None else labels.codes,
        graph_folder=source.graph_folder(similarity.features),
    )
    with stages("diagnostics"):
        summary = describe_more(source, table, found, selection, weights, labels)
    seconds = {name: summary["seconds"].get(name, 0.0) + spent for name, spent in stages.seconds.items()}
    return replace(found, summary=summary | {"seconds": summary["seconds"] | seconds})


def _points(source: Source, selection: SelectionConfig, similarity: SimilarityConfig) -> UnitRows | None:
    """The candidates in feature space; None where the source has no features, which `select` will say."""
    features = _features(source, similarity.features, needed=True)
    if features is None:
        return None
    table, _ = source.table(list(CANDIDATE_COLUMNS))
    _check_rows(features, table)
    return unit_rows(features, candidates(table, selection.keep_duplicates).rows)


def _features(source: Source, name: str, needed: bool) -> np.ndarray | None:
    """The features that rows are compared by; where only the diagnostics read them, they may be missing."""
    if name in source.features:
        return source.read_features(name)
    if needed and source.features:
        raise ConfigError(
            f"similarity.features: {name!r} is not among the features of the run; "
            f"allowed: {', '.join(source.features)}"
        )
    return None


def _labels(source: Source, table: pa.Table, column: str | None, corpus: Corpus | None) -> Labels | None:
    """The strata of the table's rows, where the corpus has to tell them."""
    if column is None or column in table.column_names:
        return None
    if corpus is None:
        raise unknown_column(column, source.columns, "the corpus, as --data.path is not given")
    return labels_of_corpus(corpus, column, table.column("index").to_numpy())


def _check_rows(values: np.ndarray, table: pa.Table) -> None:
    if len(values) != table.num_rows:
        raise DataError(f"features of {len(values)} rows do not belong to a table of {table.num_rows} rows")


def _num_rejected(rundir: RunDir) -> int | None:
    """Rows in rejected.jsonl; None where the run has no such file."""
    if not rundir.rejected.exists():
        return None
    with rundir.rejected.open("rb") as lines:
        return sum(1 for _ in lines)
