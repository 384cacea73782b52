"""Comparing score tables and features of two runs, row by row, in any order of the corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXACT_COLUMNS = ("id", "status", "num_tokens", "num_label_tokens", "token_hash")
STATISTICS = ("sum", "sumsq", "min", "max", "mean", "std", "norm")


def read_scores(run: Path) -> pa.Table:
    """The score table of a run, sorted by id, which names a row whatever the order of the corpus."""
    return pq.read_table(run / "scores.parquet").sort_by("id")


def read_features(run: Path) -> np.ndarray:
    """Content features of a run as float64, in the order of `read_scores`."""
    ids = np.array(pq.read_table(run / "scores.parquet")["id"].to_pylist())
    return np.load(run / "features" / "content.npy").astype(np.float64)[np.argsort(ids)]


def numels(run: Path) -> dict[str, int]:
    """Elements of every target."""
    targets = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["targets"]
    return {name: constants["numel"] for name, constants in targets.items()}


def scales(table: pa.Table, target: str, numel: int) -> dict[str, np.ndarray]:
    """What an error of each statistic is measured against, one number a row.

    A sum cancels: its rounding is that of its terms, together at most norm * sqrt(numel). The smallest and
    the largest element are of one gradient and have the rounding of the larger.
    """
    column = {name: table[f"{target}.{name}"].to_numpy() for name in STATISTICS}
    norm = column["norm"].astype(np.float64)
    largest = np.maximum(-column["min"], column["max"]).astype(np.float64)
    return {
        "sum": norm * numel**0.5,
        "sumsq": column["sumsq"],
        "min": largest,
        "max": largest,
        "mean": norm / numel**0.5,
        "std": norm / numel**0.5,
        "norm": norm,
    }


def faults_between(found: pa.Table, truth: pa.Table, numel: dict[str, int], bound: float) -> list[str]:
    """Every place where `found` is further from `truth` than `bound`, relative to `scales`.

    Columns that `truth` lacks are not compared.
    """
    exact = [name for name in EXACT_COLUMNS if name in truth.column_names]
    faults = [name for name in exact if found[name].to_pylist() != truth[name].to_pylist()]
    faults += [f"{name} is missing" for name in truth.column_names if name not in found.column_names]
    checks = {k: np.abs(truth[k].to_numpy()) for k in ("loss", "el2n") if k in truth.column_names}
    for target, size in numel.items():
        checks |= {f"{target}.{k}": scale for k, scale in scales(truth, target, size).items()}
    for name, scale in checks.items():
        error = np.abs(found[name].to_numpy().astype(np.float64) - truth[name].to_numpy())
        ratio = error / np.maximum(scale, 1e-30)
        worst = int(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)))
        if not ratio[worst] <= bound:
            faults.append(f"{name} of {truth['id'][worst]}: {ratio[worst]:.2e} off")
    return faults
