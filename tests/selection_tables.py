"""Score tables made of random numbers, with the structure that selection looks for."""

import numpy as np
import pyarrow as pa

TARGETS = ["embedding", "lm_head"]


def score_table(num_rows: int, seed: int = 0, targets: list[str] = TARGETS) -> pa.Table:
    """A table as the probe writes it, all rows finite and distinct; the signal grows with the length."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, 400, num_rows).astype(np.int32)
    columns = {
        "index": np.arange(num_rows, dtype=np.int64),
        "id": [f"row-{i}" for i in range(num_rows)],
        "status": ["ok"] * num_rows,
        "num_tokens": labels + rng.integers(10, 60, num_rows).astype(np.int32),
        "num_label_tokens": labels,
        "loss": rng.gamma(4.0, 0.5, num_rows).astype(np.float32),
        "el2n": np.random.default_rng([seed, 1]).uniform(0, 1.4, num_rows).astype(np.float32),
        "step": np.sort(rng.integers(0, 20, num_rows)).astype(np.int32),
        "token_hash": rng.permutation(num_rows).astype(np.int64) * 1_000_003,
    }
    for target in targets:
        columns |= statistics(target, labels, rng)
    return pa.table(columns)


def statistics(target: str, labels: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of one target; the head's sum is rounding, as under softmax cross-entropy."""
    numel = 5000
    norm = np.exp(rng.normal(0, 0.4, len(labels)) - 0.5 * np.log(labels))
    total = norm * rng.normal(size=len(labels)) * (1e-7 if target == "lm_head" else 1.0)
    std = np.sqrt(np.maximum(norm**2 / numel - (total / numel) ** 2, 0))
    peak = norm * rng.uniform(0.05, 0.2, len(labels))
    small = {"min": -peak * rng.uniform(0.7, 1.3, len(labels)), "max": peak, "mean": total / numel}
    small |= {"std": std, "norm": norm}
    columns = {f"{target}.sum": total, f"{target}.sumsq": norm**2}
    columns |= {f"{target}.{name}": values.astype(np.float32) for name, values in small.items()}
    return columns | {f"{target}.nonfinite": np.zeros(len(labels), np.int64)}


def clustered_features(num_rows: int, seed: int = 0, num_clusters: int = 12, dims: int = 16) -> np.ndarray:
    """Features in clusters, float16 [num_rows, dims]."""
    rng = np.random.default_rng(seed + 1)
    centres = rng.normal(size=(num_clusters, dims)) * 2 + 3
    return (centres[rng.integers(0, num_clusters, num_rows)] + rng.normal(size=(num_rows, dims))).astype(
        np.float16
    )


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with a column replaced."""
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))
