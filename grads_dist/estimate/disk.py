"""What a probe leaves on the disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from grads_dist.config import Config
from grads_dist.data.layout import ARRAYS, OFFSETS
from grads_dist.estimate.facts import Facts
from grads_dist.table.schema import score_schema

STATUS_BYTES = 2
"""Of `ok`."""

CHECKPOINT_BYTES = (12, 16)
"""A trained parameter in a training checkpoint: float32 weights and Adam's moments, and with them the
model's own weights in 16 or 32 bits."""

MOST_CHECKPOINTS = 2
"""That exist at a time: the last, and the one being written."""


def row_bytes(targets: tuple[str, ...], id_bytes: float) -> float:
    """Bytes of a row of the score table without compression, by its schema."""
    total = 0.0
    for column in score_schema(targets):
        if pa.types.is_string(column.type):
            total += 4 + (id_bytes if column.name == "id" else STATUS_BYTES)
        else:
            total += column.type.bit_width / 8
    return total


def token_bytes(num_rows: float, num_tokens: float, id_bytes: float) -> float:
    """Bytes of the token store."""
    per_token = ARRAYS["tokens"].itemsize + ARRAYS["loss"].itemsize
    # The lengths of ids are kept as offsets alone.
    others = ("tokens", "loss", "id_bytes", "id_lengths")
    per_row = sum(kind.itemsize for name, kind in ARRAYS.items() if name not in others)
    per_row += len(OFFSETS) * np.dtype(np.int64).itemsize
    return num_tokens * per_token + num_rows * (per_row + id_bytes)


def feature_bytes(config: Config, facts: Facts, num_rows: float) -> float:
    """Bytes of all features of the corpus, merged, in float16."""
    probe = config.probe
    dims = 0
    for name in probe.feature_files:
        dims += min(facts.hidden_size, probe.sketch_dim) if name == "content" else probe.gradient_dim
    return num_rows * dims * np.dtype(np.float16).itemsize


def disk_use(
    config: Config, facts: Facts, num_rows: float, num_tokens: float, id_bytes: float
) -> dict[str, Any]:
    """Bytes of everything that a probe of `num_rows` usable rows writes, by name."""
    checkpoints = max(1, len(config.probe.checkpoints))
    one_row = row_bytes(tuple(facts.targets.members), id_bytes)
    table = one_row * num_rows * checkpoints
    features = feature_bytes(config, facts, num_rows)
    index = np.dtype(np.int64).itemsize * num_rows * len(config.probe.feature_files)
    found: dict[str, Any] = {
        "tokens": token_bytes(num_rows, num_tokens, id_bytes),
        "score_row": one_row,
        "score_shards": table,
        "scores": table,
        "feature_shards": features + index,
        "features": features,
        "model": float(facts.weight_bytes) if config.probe.save_model else 0.0,
    }
    found["total"] = sum(value for name, value in found.items() if name != "score_row")
    trains = config.probe.mode == "train"
    found["training_checkpoints"] = [
        float(MOST_CHECKPOINTS * size * facts.num_trained * trains) for size in CHECKPOINT_BYTES
    ]
    return found
