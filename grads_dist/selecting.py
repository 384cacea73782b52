"""The last stage, which needs no model: select from a run or a table, and compare selections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_dist.config import Config, TableConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import DataError
from grads_dist.preflight import absolute, absolute_table
from grads_dist.runtime.launcher import detect
from grads_dist.runtime.rundir import RunDir

if TYPE_CHECKING:
    from grads_dist.runtime.ranks import Ranks
    from grads_dist.selection.source import Source


def select(config: Config) -> str:
    """Select from a finished probe, without a model; returns what to tell the user. Collective.

    All ranks search the neighbours, rank 0 does the rest. Alone, no process group is started.
    """
    return select_with(config, _several_ranks())


def select_table(config: TableConfig, table: str, features: str | None) -> str:
    """Select from a Parquet table that no probe wrote, collectively like `select`; returns what to tell.

    Args:
        config: the selection, and `data` if a subset of a corpus is wanted.
        table: path of the score table.
        features: path of a .npy file, row k for row k of the table.
    """
    from grads_dist.selection.run import share_graph, table_selection
    from grads_dist.selection.source import table_source

    config = absolute_table(config)
    output = RunDir(Path(config.output_dir))
    scores = Path(table).expanduser().absolute()
    vectors = None if features is None else Path(features).expanduser().absolute()
    ranks = _several_ranks()

    def found() -> Source:
        return table_source(scores, vectors, config.selection, output)

    source = found() if ranks is None else ranks.on_all(found)
    if source.features:
        config = replace(config, similarity=replace(config.similarity, features=next(iter(source.features))))

    def rest() -> str:
        corpus = None if config.data is None else Corpus.open(config.data)
        return _told(table_selection(config, source, corpus), output.selection_dir(config.selection.name))

    if ranks is None:
        return rest()
    share_graph(source, config.selection, config.similarity, ranks)
    return ranks.on_main(rest)


def compare(output_dir: str, names: list[str]) -> str:
    """A table of several selections of one run, all of them without names. Rank 0 alone."""
    from grads_dist.selection.compare import compare_selections

    ranks = _several_ranks()
    output = RunDir(Path(output_dir).expanduser())
    if ranks is None:
        return compare_selections(output, names)
    return ranks.on_main(lambda: compare_selections(output, names))


def select_with(config: Config, ranks: Ranks | None) -> str:
    """`select` on ranks that are started already."""
    from grads_dist.selection.run import run_selection, share_graph
    from grads_dist.selection.source import run_source

    config = absolute(config)
    rundir = RunDir(Path(config.output_dir))

    def corpus() -> Corpus:
        found = Corpus.open(config.data)
        _check_corpus(rundir, found)
        return found

    def rest() -> str:
        return _told(run_selection(config, rundir, corpus()), rundir.selection_dir(config.selection.name))

    if ranks is None or ranks.world_size == 1:
        return rest()
    # What is wrong with the corpus is said before the search, which may take long.
    ranks.on_main(lambda: bool(corpus()))
    source = ranks.on_all(lambda: run_source(rundir))
    share_graph(source, config.selection, config.similarity, ranks)
    return ranks.on_main(rest)


def _told(summary: dict[str, Any], folder: Path) -> str:
    counts = summary["counts"]
    of = counts["scored"] if counts["corpus"] is None else counts["corpus"]
    return f"selected {counts['selected']} of {of} rows: {folder / summary.get('subset', 'selected.parquet')}"


def _several_ranks() -> Ranks | None:
    """The ranks, where there are several: one alone needs no torch."""
    if detect().world_size == 1:
        return None
    from grads_dist.runtime.ranks import Ranks

    return Ranks.start(detect())


def _check_corpus(rundir: RunDir, corpus: Corpus) -> None:
    """Refuse a corpus that changed since it was probed: row numbers would point at other rows."""
    if not rundir.manifest.exists():
        return
    probed = rundir.read_manifest()["corpus"]
    if probed != corpus.fingerprint:
        raise DataError(
            f"data.path: not the corpus that {str(rundir.root)!r} probed; restore it, or probe again"
        )
