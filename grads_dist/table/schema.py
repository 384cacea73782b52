"""The columns of the score table."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

ROW_FIELDS = [
    pa.field("index", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("status", pa.string()),
    pa.field("num_tokens", pa.int32()),
    pa.field("num_label_tokens", pa.int32()),
    pa.field("loss", pa.float32()),
    pa.field("el2n", pa.float32()),
    pa.field("step", pa.int32()),
    pa.field("checkpoint", pa.int32()),
    pa.field("token_hash", pa.int64()),
]
"""One row of the corpus at the weights of one checkpoint: `index` its number there, `status` ok or nonfinite,
`step` the optimizer step it was seen in (-1 in frozen mode), `checkpoint` the place of the weights in
`probe.checkpoints` (0 where there is one), `token_hash` a hash of token ids and loss mask that exact copies
share."""

STATISTICS = {
    "sum": pa.float64(),
    "sumsq": pa.float64(),
    "min": pa.float32(),
    "max": pa.float32(),
    "mean": pa.float32(),
    "std": pa.float32(),
    "norm": pa.float32(),
    "nonfinite": pa.int64(),
}
"""Of every target, named `<target>.<statistic>`."""


def score_schema(targets: Iterable[str]) -> pa.Schema:
    """The schema of the table and of its shards."""
    columns = [pa.field(f"{t}.{name}", kind) for t in targets for name, kind in STATISTICS.items()]
    return pa.schema(ROW_FIELDS + columns)
