"""From a score table of several checkpoints to one row for each row of the corpus."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grads_dist.errors import DataError


def fold_checkpoints(table: pa.Table, targets: list[str]) -> tuple[pa.Table, list[str]]:
    """Make the statistics of each checkpoint a target of their own (docs/selection.md, "Checkpoints").

    The target `T` at checkpoint c becomes `T@c`, with columns `T@c.max` and so on. All other numbers with a
    fraction, and the statistics under their plain names, are means over the checkpoints; a row is `ok` where
    it is at all of them. A table of one checkpoint stays as it is.

    Returns the table by rising corpus index, and the targets.

    Raises DataError when a row is not there once for each checkpoint.
    """
    if "checkpoint" not in table.column_names or not table.num_rows:
        return table, targets
    checkpoint, index = table["checkpoint"].to_numpy(), table["index"].to_numpy()
    count = int(checkpoint.max()) + 1
    if count == 1:
        return table, targets
    order = np.lexsort((checkpoint, index))
    places = np.arange(len(order)) % count
    if count > len(order) or len(order) % count or not np.array_equal(checkpoint[order], places):
        raise DataError(f"the score table does not hold every row once for each of {count} checkpoints")
    parts = [table.take(pa.array(order[c::count])) for c in range(count)]
    columns = {name: _combine(name, parts) for name in table.column_names if name != "checkpoint"}
    for target in targets:
        for name in table.column_names:
            if name.rpartition(".")[0] == target:
                statistic = name.rpartition(".")[2]
                columns |= {f"{target}@{c}.{statistic}": part[name] for c, part in enumerate(parts)}
    return pa.table(columns), [f"{target}@{c}" for target in targets for c in range(count)]


def without_checkpoint(target: str) -> str:
    """The name of a target that may be one of `fold_checkpoints`."""
    name, _, checkpoint = target.rpartition("@")
    return name if name and checkpoint.isdecimal() else target


def _combine(name: str, parts: list[pa.Table]) -> pa.ChunkedArray | pa.Array:
    if name == "status":
        ok = np.all([np.asarray(pa.compute.equal(part[name], "ok")) for part in parts], axis=0)
        return pa.array(np.where(ok, "ok", "nonfinite"))
    first = parts[0][name]
    if not pa.types.is_floating(first.type):
        return first
    return pa.array(np.mean([part[name].to_numpy() for part in parts], axis=0))
