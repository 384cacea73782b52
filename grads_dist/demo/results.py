"""What a finished run of the demo left behind, read back, and the rows worth showing."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_dist.config import load_config
from grads_dist.runtime.rundir import RunDir
from grads_dist.selection.run import select_from
from grads_dist.selection.select import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """A run's table, its selection with the scores of all candidates, and the corpus it is about."""

    rows: list[dict[str, Any]]
    """The corpus, by row number."""
    table: pa.Table
    """The columns of the score table that the report tells about."""
    selection: Selection
    summary: dict[str, Any]
    """What the run wrote to summary.json."""


def read_results(run: RunDir, corpus: Path) -> Results:
    """Read a run directory and score its rows again.

    A run keeps the scores of what it selected; those of the other rows follow from its table within a second.
    """
    logger.info("scoring the rows again, to show those that were not selected")
    config = load_config(run.config)
    summary = run.selection_dir(config.selection.name) / "summary.json"
    with corpus.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return Results(
        rows=rows,
        table=pq.read_table(run.scores, columns=["num_tokens", "num_label_tokens", "loss", "step"]),
        selection=select_from(config, run),
        summary=json.loads(summary.read_text(encoding="utf-8")),
    )


def choose_examples(selection: Selection, count: int) -> dict[str, np.ndarray]:
    """Return positions among the candidates of up to `count` rows each: top, median, shadowed, lowest.

    `shadowed` are the rows with the largest similarity reduction, ties by row, and only rows that have one.
    """
    order = np.argsort(selection.rank)
    middle = max(0, (len(order) - count) // 2)
    reduced = np.argsort(-selection.redundancy, kind="stable")
    return {
        "top": order[:count],
        "median": order[middle : middle + count],
        "shadowed": reduced[selection.neighbour[reduced] >= 0][:count],
        "lowest": order[::-1][:count],
    }


def epoch_losses(table: pa.Table) -> tuple[float, float]:
    """Return the mean loss of the rows in the first and in the last tenth of the epoch's steps."""
    step, loss = table.column("step").to_numpy(), table.column("loss").to_numpy()
    tenth = (step.max() - step.min()) / 10
    return float(loss[step <= step.min() + tenth].mean()), float(loss[step >= step.max() - tenth].mean())
