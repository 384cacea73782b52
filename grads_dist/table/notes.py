"""What a shard of the score table says beside its rows, in the metadata of its Parquet schema."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_KEY = b"grads_dist"


@dataclass
class Notes:
    """Counts and rejections of some rows; they add up over shards."""

    head_counts: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """Samples whose head statistics a bound vouched for, rows formed for them, samples formed whole."""

    rejected: dict[int, str] = field(default_factory=dict)
    """Corpus rows that could not be probed, each with the reason."""

    def on(self, schema: pa.Schema) -> pa.Schema:
        """The schema with these notes."""
        content = {"head_counts": self.head_counts.tolist(), "rejected": list(self.rejected.items())}
        return schema.with_metadata({_KEY: json.dumps(content).encode()})

    def add(self, schema: pa.Schema) -> None:
        """Take in the notes of a shard, which may have none."""
        text = (schema.metadata or {}).get(_KEY)
        if text is not None:
            content = json.loads(text)
            self.head_counts += content["head_counts"]
            self.rejected.update((int(index), str(reason)) for index, reason in content["rejected"])


def read_notes(paths: Iterable[Path]) -> Notes:
    """The notes of several shards together."""
    total = Notes()
    for path in paths:
        total.add(pq.read_schema(path))
    return total
