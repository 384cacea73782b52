"""Several selections of one run, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grads_dist.errors import ConfigError, DataError
from grads_dist.runtime.rundir import RunDir

_UNKNOWN = "-"


@dataclass(frozen=True)
class Chosen:
    """What a selection left behind."""

    name: str
    index: np.ndarray
    """Rows of the corpus, ascending, int64."""
    summary: dict[str, Any]
    """What summary.json holds."""


def compare_selections(run: RunDir, names: Sequence[str]) -> str:
    """A table of the selections and one of their overlaps; all selections of the run where none is named.

    What a selection does not tell is shown as "-", and left out where none does.

    Raises:
        ConfigError: the run has no selection, or none of that name.
        DataError: the files of a selection cannot be read.
    """
    found = [_read(run, name) for name in _existing(run, names)]
    text = _grid(_known([["selection", *(title for title, _ in _COLUMNS)], *map(_row, found)]))
    if len(found) > 1:
        text += "\n\n" + _OVERLAP_TITLE + "\n" + _grid(_overlaps(found))
    return f"{text}\n\n{_NOTES}"


def overlap(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Jaccard index of two sets of rows, not empty, and the share of the smaller that is in the other."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common), common / min(len(one), len(other))


def _existing(run: RunDir, names: Sequence[str]) -> list[str]:
    folder = run.selection_dir("any").parent
    there = sorted(path.parent.name for path in folder.glob("*/summary.json"))
    if not there:
        raise ConfigError(f"output_dir: {str(run.root)!r} holds no selection; allowed: a folder with one")
    for name in names:
        if name not in there:
            raise ConfigError(f"compare: {name!r} is no selection of the run; allowed: {', '.join(there)}")
    return list(dict.fromkeys(names)) or there


def _read(run: RunDir, name: str) -> Chosen:
    folder = run.selection_dir(name)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        index = pq.read_table(folder / "selected.parquet", columns=["index"]).column("index").to_numpy()
    except (OSError, ValueError) as error:
        raise DataError(f"compare: selection {name!r} cannot be read ({error})") from error
    return Chosen(name, np.sort(index), summary)


def _row(chosen: Chosen) -> list[str]:
    cells = []
    for _, read in _COLUMNS:
        try:
            cells.append(read(chosen.summary))
        except (KeyError, TypeError, IndexError):
            cells.append(_UNKNOWN)
    return [chosen.name, *cells]


def _known(rows: list[list[str]]) -> list[list[str]]:
    """The columns in which some row has a value."""
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {_UNKNOWN}]
    return [list(row) for row in zip(*columns, strict=True)]


def _overlaps(found: list[Chosen]) -> list[list[str]]:
    names = [chosen.name for chosen in found]
    cells = {(name, name): "" for name in names}
    for one, other in itertools.combinations(found, 2):
        jaccard, share = overlap(one.index, other.index)
        cells[other.name, one.name] = f"{jaccard:.2f} / {share:.0%}"
    rows = [[name, *(cells.get((name, other), "") for other in names[:-1])] for name in names[1:]]
    return [["", *names[:-1]], *rows]


def _mean(term: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: f"{summary['terms']['spread_selected'][term]['mean']:.2f}"


def _vendi(summary: Mapping[str, Any]) -> str:
    return f"{summary['vendi'][summary['similarity']['features']]['selected']:.1f}"


def _gradient_vendi(summary: Mapping[str, Any]) -> str:
    name = next((name for name in summary["vendi"] if name.partition(".")[0] == "gradient"), "")
    return f"{summary['vendi'][name]['selected']:.1f}"


def _near_duplicates(summary: Mapping[str, Any]) -> str:
    shares = summary["redundancy"]
    return f"{shares['all']['near_duplicates']:.1%} -> {shares['selected']['near_duplicates']:.1%}"


_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("criterion", lambda summary: summary["selection"]["criterion"]),
    ("pick", lambda summary: summary["selection"]["pick"]),
    ("rows", lambda summary: f"{summary['counts']['selected']:,}"),
    ("tokens", lambda summary: f"{summary['shares']['num_tokens']['sum_selected']:,}"),
    ("length", lambda summary: f"{summary['shares']['num_label_tokens']['mean_selected']:.1f}"),
    ("loss", lambda summary: f"{summary['shares']['loss']['mean_selected']:.2f}"),
    ("G", _mean("G")),
    ("D", _mean("D")),
    ("R", _mean("R")),
    ("coverage", lambda summary: f"{summary['coverage']['selected'][1]:.1%}"),
    ("Vendi", _vendi),
    ("gradient Vendi", _gradient_vendi),
    ("near-duplicates", _near_duplicates),
)

_OVERLAP_TITLE = "Overlap: shared rows as Jaccard index / share of the smaller selection"
_NOTES = """\
length: mean label tokens a row. loss, G, D, R: means over the selected rows.
coverage: share of the corpus that has a selected row within a cosine of 0.8. Vendi: how many rows without
anything in common the selection amounts to (from 1 to the dimensions of the features).
near-duplicates: share of rows with another at a cosine of 0.95 or more, in the corpus -> in the selection."""


def _grid(rows: list[list[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
