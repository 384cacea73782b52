"""The files of a selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.runtime.rundir import atomic_write
from grads_dist.selection.select import Selection

if TYPE_CHECKING:
    from grads_dist.data.corpus import Corpus


def write_selection(selection: Selection, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Write the subset, selected.parquet and summary.json to `folder`; returns what summary.json holds.

    The subset holds the original rows in corpus order, and line k of selected.parquet is about row k of it.
    summary.json is written last, so that it stands for a complete selection.

    Raises:
        DataError: the corpus does not hold a selected row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary_path = folder / "summary.json"
    summary_path.unlink(missing_ok=True)
    subset = corpus.write_subset(selection.selected_index, folder)
    with atomic_write(folder / "selected.parquet") as path:
        pq.write_table(selected_table(selection), path)
    summary = selection.summary | {"subset": subset.name}
    with atomic_write(summary_path) as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return summary


def selected_table(selection: Selection) -> pa.Table:
    """The selected rows: index, id, score, rank, G, D, R, index of the row that shadowed it (-1: none)."""
    rows = np.flatnonzero(selection.selected)
    columns = {
        "index": selection.index,
        "score": selection.score,
        "rank": selection.rank,
        "G": selection.gradient,
        "D": selection.diversity,
        "R": selection.redundancy,
        "neighbour": selection.neighbour,
    }
    table = pa.table({name: values[rows] for name, values in columns.items()})
    return table.add_column(1, "id", selection.ids.take(pa.array(rows)))
