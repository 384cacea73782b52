"""What a shard of the score table says beside its rows, in the metadata of its Parquet schema."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OUT_OF_MEMORY = "out of memory"
"""What the reason of a row begins with that has tokens and does not fit into memory alone."""

_KEY = b"grads_dist"


@dataclass
class Notes:
    """Counts and rejections of some rows; they add up over shards."""

    head_counts: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """Samples whose head statistics a bound vouched for, rows formed for them, samples formed whole."""

    rejected: dict[int, str] = field(default_factory=dict)
    """Corpus rows that could not be probed, each with the reason."""

    skipped_steps: int = 0
    """Optimizer steps left out before these rows were written, of all shards the most."""

    def on(self, schema: pa.Schema) -> pa.Schema:
        """The schema with these notes."""
        content = {
            "head_counts": self.head_counts.tolist(),
            "rejected": list(self.rejected.items()),
            "skipped_steps": self.skipped_steps,
        }
        return schema.with_metadata({_KEY: json.dumps(content).encode()})

    def add(self, schema: pa.Schema) -> None:
        """Take in the notes of a shard, which may have none."""
        text = (schema.metadata or {}).get(_KEY)
        if text is not None:
            content = json.loads(text)
            self.head_counts += content["head_counts"]
            self.skipped_steps = max(self.skipped_steps, int(content["skipped_steps"]))
            self.rejected.update((int(index), str(reason)) for index, reason in content["rejected"])


def read_notes(paths: Iterable[Path]) -> Notes:
    """The notes of several shards together."""
    total = Notes()
    for path in paths:
        total.add(pq.read_schema(path))
    return total
