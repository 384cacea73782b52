"""Diagnostics that read more of a run than the selection did: other features, the target set, strata."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from grads_dist.selection.budget import resolve_budget
from grads_dist.selection.config import SelectionConfig
from grads_dist.selection.controls import COMPARED_BY
from grads_dist.selection.diagnostics import describe_strata, picked_too
from grads_dist.selection.labels import Labels
from grads_dist.selection.relevant import read_relevance, relevance_files
from grads_dist.selection.sampling import sample
from grads_dist.selection.select import Selection
from grads_dist.selection.source import Source
from grads_dist.selection.vendi import describe_vendi

# A sample of at most so many rows, and so many numbers of features, is compared with the target set.
_MOST_ROWS, _MOST_NUMBERS = 100_000, 40_000_000


def describe_more(
    source: Source,
    table: pa.Table,
    found: Selection,
    config: SelectionConfig,
    weights: list[float] | None,
    labels: Labels | None,
) -> dict[str, Any]:
    """The selection's summary with what else the source tells of it (docs/selection.md, "Summary").

    Args:
        source: where the selection was read from.
        table: the score table, as `Source.table` gives it.
        found: the selection.
        config: its options.
        weights: of the checkpoints, for the control less.
        labels: the strata of the table's rows, where the corpus told them.
    """
    places = _places(table, found.index)
    summary = dict(found.summary)
    if labels is not None:
        summary["strata"] = describe_strata(replace(labels, codes=labels.codes[places]), found.selected)
    vendi = summary.get("vendi", {})
    for name in _kinds(list(source.features), list(vendi)):
        features = source.read_features(name)
        vendi = vendi | {name: describe_vendi(features, places, found.index, found.selected, config.seed)}
    if vendi:
        summary["vendi"] = vendi
    for criterion in COMPARED_BY if source.is_run else ():
        if criterion != config.criterion:
            summary["overlap"] |= _overlap(source, table, places, found, criterion, config, weights)
    return summary


def _places(table: pa.Table, index: np.ndarray) -> np.ndarray:
    """Where the candidates stand in the table, int64 [n]."""
    numbers = table.column("index").to_numpy()
    order = np.argsort(numbers, kind="stable")
    return order[np.searchsorted(numbers, index, sorter=order)]


def _kinds(names: list[str], known: list[str]) -> list[str]:
    """One feature file of each kind that is not known yet; gradient.0 and gradient.1 are of one kind."""
    seen = {name.partition(".")[0] for name in known}
    chosen = []
    for name in sorted(names):
        kind = name.partition(".")[0]
        if kind not in seen:
            seen.add(kind)
            chosen.append(name)
    return chosen


def _overlap(
    source: Source,
    table: pa.Table,
    places: np.ndarray,
    found: Selection,
    criterion: str,
    config: SelectionConfig,
    weights: list[float] | None,
) -> dict[str, Any]:
    """Share of the selected rows that this criterion picks too; nothing where the run has no target set."""
    names = relevance_files(source.output, criterion)
    if not names:
        return {}
    widest = max(source.read_features(name).shape[1] for name in names)
    size = min(_MOST_ROWS, max(1, _MOST_NUMBERS // widest))
    rows = sample(np.arange(len(places)), found.index, size, config.seed, criterion)
    close = np.nan_to_num(read_relevance(source.output, criterion, weights, places[rows]), nan=-np.inf)
    num_tokens = table.column("num_tokens").to_numpy()[places[rows]]
    budget = resolve_budget(config, table.num_rows)
    return {criterion: picked_too(close, num_tokens, budget, found.selected[rows])}
