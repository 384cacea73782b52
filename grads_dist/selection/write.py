"""The files of a selection."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from grads_dist.errors import ConfigError
from grads_dist.runtime.rundir import atomic_write
from grads_dist.selection.axolotl import axolotl_stanza
from grads_dist.selection.card import Facts, card
from grads_dist.selection.config import Output
from grads_dist.selection.exported import Exported, UnreadableError, describe_export, subset_pattern
from grads_dist.selection.llama_factory import llama_factory_stanza
from grads_dist.selection.loading import stanza_name
from grads_dist.selection.origin import Origin
from grads_dist.selection.select import Selection

if TYPE_CHECKING:
    from grads_dist.data.corpus import Corpus

_WRITTEN = ("subset", "subset.jsonl", "subset.csv", "subset.parquet", "selected.parquet")
_STAGED = "staged"
_DESCRIPTIONS = ("README.md", "dataset_info.json", "axolotl.yaml")


def write_selection(
    selection: Selection, corpus: Corpus | None, folder: Path, origin: Origin | None = None
) -> dict[str, Any]:
    """Write the subset, what describes it and summary.json to `folder`; returns what summary.json holds.

    The subset holds the original rows in corpus order, and row k of selected.parquet is about row k of it.
    What an earlier selection left in the folder is removed once the new subset is whole, and summary.json is
    written last, so that it stands for a complete selection.

    Args:
        selection: what is written.
        corpus: holds the rows; without it no subset is written.
        folder: of this selection; made where it is not there.
        origin: what the selection was made from. Without it the subset is one file, with no card or stanzas.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: the corpus does not hold a selected row, or a row has a column that `output.scores` adds.
    """
    summary = dict(selection.summary)
    with _staging(folder) as staged:
        if corpus is not None:
            output = Output() if origin is None else origin.selection.output
            subset = _write_subset(selection, corpus, staged, output)
            summary["subset"] = subset_pattern(subset, corpus.form)
        with _writable(folder):
            _remove_previous(folder, staged)
        if corpus is not None:
            subset = subset.rename(folder / subset.name)
    with atomic_write(folder / "selected.parquet") as path:
        pq.write_table(selected_table(selection), path)
    if corpus is not None and origin is not None:
        exported = describe_export(subset, corpus, origin.data, int(selection.selected.sum()))
        reasons = _write_stanzas(exported, origin.selection.name, folder)
        facts = Facts(exported, summary, origin, corpus.fingerprint, reasons)
        _write_text(folder / "README.md", card(facts))
    _write_text(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
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
    return table.add_column(1, "id", selection.selected_ids)


def _write_subset(selection: Selection, corpus: Corpus, folder: Path, output: Output) -> Path:
    rows = np.flatnonzero(selection.selected)
    columns = {"grads_score": selection.score[rows], "grads_rank": selection.rank[rows]}
    added = columns if output.scores else None
    return corpus.write_subset(selection.selected_index, folder, output.rows_per_file, added)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for what is not whole yet; removed at the end."""
    staged = folder / f".tmp-{os.getpid()}-{_STAGED}"
    with _writable(folder):
        staged.mkdir(parents=True, exist_ok=True)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output_dir: {str(folder)!r} cannot be written ({error.strerror}); allowed: a writable folder"
        ) from error


def _remove_previous(folder: Path, staged: Path) -> None:
    """Remove what selections write, summary.json first, and what a killed one left; nothing else."""
    (folder / "summary.json").unlink(missing_ok=True)
    names = (*_WRITTEN, *_DESCRIPTIONS, "summary.json", _STAGED)
    left = [path for name in names for path in folder.glob(f".tmp-*-{name}") if path != staged]
    for path in [*(folder / name for name in (*_WRITTEN, *_DESCRIPTIONS)), *left]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_stanzas(exported: Exported, name: str, folder: Path) -> dict[str, str]:
    """Write dataset_info.json and axolotl.yaml; returns trainer -> why it cannot read the rows, where so."""
    reasons = {}
    try:
        info = {stanza_name(name): llama_factory_stanza(exported)}
        _write_text(folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")
    except UnreadableError as reason:
        reasons["LLaMA-Factory"] = str(reason)
    try:
        stanza = {"datasets": [axolotl_stanza(exported)]}
        _write_text(folder / "axolotl.yaml", yaml.safe_dump(stanza, sort_keys=False))
    except UnreadableError as reason:
        reasons["axolotl"] = str(reason)
    return reasons


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
