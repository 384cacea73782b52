"""Synthetic corpora of any size for the benchmarks of selection: feature vectors and score tables.

    python benchmarks/select_data.py 1000000 --dim 128 --to FOLDER

writes FOLDER/features.npy and FOLDER/scores.parquet. Both depend on the seed and the row numbers alone, and
are made in blocks, so that they may be larger than memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_CLUSTERS = 2000
CLUSTER_DIMS = 32
SPREAD = 0.5
"""Standard deviation of a cluster in its subspace; that of the cluster centres is 1."""
NOISE = 0.05
"""Standard deviation of a row in all dimensions."""
OFFSET = 2.0
"""Length of what all rows have in common, as mean hidden states do."""
NEAR_DUPLICATES, NEAR_NOISE = 0.05, 0.01
EXACT_DUPLICATES = 0.02
COPIED_TEXTS = 0.01
_BLOCK_ROWS = 1 << 16


def make_features(path: Path, num_rows: int, dim: int, seed: int) -> np.ndarray:
    """Write feature vectors, float16 [num_rows, dim], to a .npy file; returns its memory map.

    Gaussian clusters of Zipf sizes in a random subspace, noise in all dimensions and a common offset; some
    rows are an earlier row of their block with a little noise, some are exactly an earlier row. Which row
    is copied is skewed as well, so that a few have dozens of copies.
    """
    shared = np.random.default_rng([seed, 0])
    axes = np.linalg.qr(shared.normal(size=(dim, min(CLUSTER_DIMS, dim))))[0].T.astype(np.float32)
    centres = shared.normal(size=(NUM_CLUSTERS, len(axes))).astype(np.float32)
    offset = shared.normal(size=dim).astype(np.float32)
    offset *= OFFSET / np.linalg.norm(offset)
    shares = 1.0 / np.arange(1, NUM_CLUSTERS + 1)
    shares /= shares.sum()
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_rows, dim))
    for number, start in enumerate(range(0, num_rows, _BLOCK_ROWS)):
        count = min(_BLOCK_ROWS, num_rows - start)
        draw = np.random.default_rng([seed, 1, number])
        inside = centres[draw.choice(NUM_CLUSTERS, count, p=shares)]
        inside = inside + SPREAD * draw.standard_normal(inside.shape, np.float32)
        rows = inside @ axes + NOISE * draw.standard_normal((count, dim), np.float32) + offset
        _copy_some(rows, draw)
        out[start : start + count] = rows
    out.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def make_table(num_rows: int, seed: int, targets: list[str]) -> pa.Table:
    """A score table as a frozen probe writes it: lengths are log-normal, and statistics fall with them.

    One row in a hundred is a copy of an earlier one (same `token_hash`, same numbers), and 0.1 % are not
    finite. Losses are rounded, so that there are ties.
    """
    draw = np.random.default_rng([seed, 2])
    label_tokens = np.clip(draw.lognormal(4.5, 1.0, num_rows), 1, 4096).astype(np.int32)
    prompt_tokens = np.clip(draw.lognormal(4.0, 0.8, num_rows), 1, 4096).astype(np.int32)
    hardness = draw.standard_normal(num_rows)
    loss = np.exp(0.4 * hardness - 0.1 * np.log(label_tokens) + 0.6).round(3).astype(np.float32)
    columns: dict[str, np.ndarray] = {
        "num_tokens": label_tokens + prompt_tokens,
        "num_label_tokens": label_tokens,
        "loss": loss,
        "el2n": np.clip(loss / 3 + 0.05 * draw.standard_normal(num_rows), 0, 1.4).astype(np.float32),
        "step": np.full(num_rows, -1, np.int32),
        "token_hash": draw.integers(-(1 << 63), (1 << 63) - 1, num_rows),
    }
    for target in targets:
        columns |= _statistics(target, label_tokens, hardness, draw)
    source = np.arange(num_rows)
    copies = np.flatnonzero(draw.random(num_rows) < COPIED_TEXTS)
    source[copies] = draw.integers(0, copies + 1)
    status = np.where(draw.random(num_rows) < 0.001, "nonfinite", "ok")[source]
    table = {
        "index": np.arange(num_rows),
        "id": pa.array(np.arange(num_rows)).cast(pa.string()),
        "status": status,
    }
    return pa.table(table | {name: values[source] for name, values in columns.items()})


def _statistics(
    target: str, label_tokens: np.ndarray, hardness: np.ndarray, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """The columns of one target: log norm falls with log length and rises with hardness."""
    num_rows, numel = len(label_tokens), 1 << 24

    def noise(scale: float) -> np.ndarray:
        return scale * draw.standard_normal(num_rows)

    log_norm = 1.0 - 0.45 * np.log(label_tokens) + 0.3 * hardness + noise(0.15)
    norm = np.exp(log_norm)
    mean = norm * noise(1.0) / np.sqrt(numel)
    return {
        f"{target}.sum": mean * numel,
        f"{target}.sumsq": norm**2,
        f"{target}.min": (-norm * np.exp(noise(0.2) - 3)).astype(np.float32),
        f"{target}.max": (norm * np.exp(noise(0.2) - 3)).astype(np.float32),
        f"{target}.mean": mean.astype(np.float32),
        f"{target}.std": (norm / np.sqrt(numel)).astype(np.float32),
        f"{target}.norm": norm.astype(np.float32),
        f"{target}.nonfinite": np.zeros(num_rows, np.int64),
    }


def _copy_some(rows: np.ndarray, draw: np.random.Generator) -> None:
    """Overwrite some rows by near or exact copies of earlier ones."""
    kind = draw.random(len(rows))
    copies = np.flatnonzero(kind < NEAR_DUPLICATES + EXACT_DUPLICATES)
    source = (copies * draw.random(len(copies)) ** 2).astype(np.int64)
    near = kind[copies] < NEAR_DUPLICATES
    rows[copies] = rows[source]
    rows[copies[near]] += NEAR_NOISE * draw.standard_normal((int(near.sum()), rows.shape[1]), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=["embedding", "lm_head"])
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    make_features(options.to / "features.npy", options.rows, options.dim, options.seed)
    pq.write_table(make_table(options.rows, options.seed, options.targets), options.to / "scores.parquet")


if __name__ == "__main__":
    main()
