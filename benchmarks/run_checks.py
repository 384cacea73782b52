"""What a run that was stopped by force must hold in the end, beside one that nobody disturbed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from score_tables import faults_between, numels, read_features, read_scores

BOUND = 32 * float(np.finfo(np.float32).eps)
"""On statistics, relative: batches of a run that goes on may be cut in other places."""
FEATURE_BOUND = 2.0**-10
"""On features, which are float16, relative."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    lost: int
    """Corpus rows that are neither in the table nor rejected."""
    doubled: int
    """Those that are there more than once."""
    exact: bool
    """Whether the table equals the reference in every bit."""
    faults: tuple[str, ...]
    """Everything else that differs from the reference, or is left over."""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.faults)


def check_run(run: Path, reference: Path, num_rows: int) -> Outcome:
    """Compare a finished run with an undisturbed one over the same corpus of `num_rows` rows."""
    counts = np.bincount(_rows(run), minlength=num_rows)
    found, truth = read_scores(run), read_scores(reference)
    faults = []
    if len(counts) > num_rows:
        faults.append(f"row {len(counts) - 1} is none of the corpus")
    if found["index"].to_pylist() != truth["index"].to_pylist():
        faults.append("the table holds other rows")
    else:
        faults += faults_between(found, truth, numels(reference), BOUND)
        faults += [] if found["step"].equals(truth["step"]) else ["step"]
        faults += _features(run, reference)
    faults += [f"{name} differs" for name in _different(run, reference)]
    faults += [f"{path.relative_to(run)} is left over" for path in _left(run)]
    lost, doubled = int((counts[:num_rows] == 0).sum()), int((counts > 1).sum())
    return Outcome(lost, doubled, found.equals(truth), tuple(faults))


def _rows(run: Path) -> np.ndarray:
    """Numbers of all corpus rows in the table and in rejected.jsonl."""
    rejected = [json.loads(line)["index"] for line in (run / "rejected.jsonl").read_text().splitlines()]
    scored = pq.read_table(run / "scores.parquet", columns=["index"])["index"].to_numpy()
    return np.concatenate([scored, np.array(rejected, np.int64)])


def _features(run: Path, reference: Path) -> list[str]:
    found, truth = read_features(run), read_features(reference)
    error = np.abs(found - truth) - FEATURE_BOUND * np.abs(truth)
    return [] if error.max() <= 1e-6 else [f"features: {error.max():.2e} beyond the bound"]


def _different(run: Path, reference: Path) -> list[str]:
    """What must be equal in every byte, or row for row, and is not."""
    names = ["rejected.jsonl", "selection/default/subset.jsonl"]
    different = [name for name in names if (run / name).read_bytes() != (reference / name).read_bytes()]
    rows = [
        pq.read_table(folder / "selection/default/selected.parquet")["index"] for folder in (run, reference)
    ]
    return different if rows[0].equals(rows[1]) else [*different, "the selection"]


def _left(run: Path) -> list[Path]:
    """Files that should have gone: of cut writes, the lock, checkpoints."""
    anywhere = [path for pattern in (".tmp-*", ".merge-*", "tmp*") for path in run.rglob(pattern)]
    return [*anywhere, *run.glob(".lock*"), *run.glob("checkpoints")]
