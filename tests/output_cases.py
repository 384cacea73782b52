"""Selections that are written to a folder, for the tests of what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.model.config import ModelConfig
from grads_dist.selection.config import Output, SelectionConfig
from grads_dist.selection.origin import Origin
from grads_dist.selection.select import Selection
from grads_dist.selection.write import write_selection

TEXTS = [
    "plain",
    "007",
    "NA",
    "",
    'a "quoted" word',
    "two\nlines",
    "é 漢 \u2028",
    "null",
    "1e5",
    "comma, here",
]


def make_selection(num_rows: int, selected: list[int]) -> Selection:
    """Candidates are all rows of a corpus; the scores are no round numbers, and rank 1 is the last row."""
    nothing = np.full(num_rows, np.nan)
    summary = {
        "counts": {"scored": num_rows, "selected": len(selected), "copies": 0},
        "budget": {"asked": {"rows": len(selected)}, "unit": "rows", "limit": len(selected)},
    }
    return Selection(
        index=np.arange(num_rows),
        selected_ids=pa.chunked_array([[f"id-{i}" for i in selected]]),
        signal=nothing,
        gradient=nothing,
        diversity=nothing,
        redundancy=nothing,
        neighbour=np.full(num_rows, -1),
        score=np.arange(num_rows) / 7,
        rank=np.arange(num_rows, 0, -1),
        selected=np.isin(np.arange(num_rows), selected),
        copies=np.zeros(0, np.int64),
        originals=np.zeros(0, np.int64),
        summary=summary,
    )


def write(
    tmp_path: Path,
    corpus_path: Path | list[Path],
    selected: list[int],
    data: dict[str, Any] | None = None,
    model: ModelConfig | None = None,
    manifest: dict[str, Any] | None = None,
    name: str = "mine",
    **output: Any,
) -> tuple[Path, dict[str, Any]]:
    """Write the selection of these rows; returns its folder and what summary.json holds."""
    paths = [str(path) for path in corpus_path] if isinstance(corpus_path, list) else str(corpus_path)
    config = DataConfig(path=paths, cache_dir=str(tmp_path / "cache"), **(data or {}))
    corpus = Corpus.open(config)
    chosen = SelectionConfig(rows=len(selected), name=name, output=Output(**output))
    folder = tmp_path / "selection" / name
    origin = Origin(chosen, config, model, None, manifest or {})
    return folder, write_selection(make_selection(corpus.num_rows, selected), corpus, folder, origin)
