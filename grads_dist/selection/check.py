"""What is checked before a probe, so that nothing stops the selection after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grads_dist.errors import ConfigError
from grads_dist.selection.controls import COMPARED_BY, how_to_get
from grads_dist.selection.foreign import infer_targets
from grads_dist.selection.labels import labels_of_corpus
from grads_dist.selection.scored import needs_features, needs_graph
from grads_dist.selection.signal import is_over_targets, signal_columns
from grads_dist.similarity.backend import choose_backend
from grads_dist.similarity.faiss_index import FaissIndex
from grads_dist.table.schema import score_schema

if TYPE_CHECKING:
    from grads_dist.config import Config
    from grads_dist.data.corpus import Corpus


def check_selection(config: Config, targets: list[str], hidden_size: int | None = None) -> None:
    """Find before a probe what would stop the selection after it.

    Args:
        config: the configuration.
        targets: names of the probe's targets.
        hidden_size: width of the model's hidden states, where it is known.

    Raises:
        ConfigError: the probe writes no such features or columns, or the search library, its device or its
            index are not there.
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
    is_over_targets(config.selection, _seen_by_signal(config, targets))
    _check_features(config, hidden_size)


def check_strata(config: Config, corpus: Corpus) -> None:
    """Find before a probe whether `stratify_by` is a column by which rows can be told apart.

    Reads a column of the corpus through, which takes little beside a probe. Raises ConfigError.
    """
    column = config.selection.stratify_by
    if column is None or column in score_schema([]).names or infer_targets([column]):
        return
    labels_of_corpus(corpus, column)


def _seen_by_signal(config: Config, targets: list[str]) -> list[str]:
    """Each target at each checkpoint is one of its own (docs/selection.md, "Checkpoints")."""
    num_checkpoints = max(1, len(config.probe.checkpoints))
    return [f"{target}@{c}" for target in targets for c in range(num_checkpoints)]


def _check_features(config: Config, hidden_size: int | None) -> None:
    if not needs_features(config.selection):
        return
    if config.probe.features == "none":
        raise ConfigError(
            f"probe.features: none is not allowed, because {_reader(config)} compares features; "
            "allowed: content, or weights d and r of 0, pick topk or gumbel, and no dedup_threshold"
        )
    name = config.similarity.features
    if name not in config.probe.feature_files:
        raise ConfigError(
            f"similarity.features: {name!r} is not what the probe writes; "
            f"allowed: {', '.join(config.probe.feature_files)}"
        )
    if not needs_graph(config.selection):
        return
    backend = choose_backend(config.similarity)
    width = config.probe.gradient_dim
    if name == "content":
        width = min(config.probe.sketch_dim, hidden_size or config.probe.sketch_dim)
    if backend.library == "faiss" and config.similarity.index not in ("auto", "exact"):
        FaissIndex.by_name(config.similarity.index, width)


def _reader(config: Config) -> str:
    selection = config.selection
    if selection.dedup_threshold is not None:
        return "selection.dedup_threshold"
    if selection.pick == "cluster":
        return "selection.pick: cluster"
    return "selection.weights d or r"
