"""What the tests of the library share: batches, datasets of tokens, and the comparison with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from tiny import Rows, autograd_gradients, autograd_loss, five, untie
from torch import Tensor, nn

from grads_dist.model.anatomy import dissect
from grads_dist.stats.statistics import Statistics
from grads_dist.stats.targets import TIED, Targets

IGNORED = -100


def batch_of(rows: Rows, chosen: Sequence[int] | None = None, left: bool = False) -> dict[str, Tensor]:
    """A padded batch with labels, as a collator makes it."""
    chosen = range(len(rows.ids)) if chosen is None else chosen
    length = max(len(rows.ids[i]) for i in chosen)
    shape = (len(chosen), length)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for s, i in enumerate(chosen):
        size = len(rows.ids[i])
        at = slice(length - size, length) if left else slice(0, size)
        row = torch.from_numpy(rows.ids[i]).long()
        ids[s, at], mask[s, at] = row, 1
        labels[s, at] = torch.where(torch.from_numpy(rows.masks[i]), row, IGNORED)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    # Padding on the left moves the positions, unless the model is told.
    return batch | ({"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if left else {})


def dataset_of(rows: Rows) -> Dataset:
    """The rows as a tokenized dataset with ids of their own."""
    labels = [
        [int(t) if carries else IGNORED for t, carries in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows.ids, rows.masks, strict=True)
    ]
    names = [f"row{i}" for i in range(len(rows.ids))]
    return Dataset.from_dict({"input_ids": [x.tolist() for x in rows.ids], "labels": labels, "id": names})


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """Pads on the right."""

    def pad(name: str, value: int) -> Tensor:
        parts = [torch.as_tensor(example[name]) for example in examples]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    ids = pad("input_ids", 0)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "labels": pad("labels", IGNORED), "attention_mask": mask.long()}


def gradients_of(model: nn.Module, rows: Rows, i: int) -> dict[str, Tensor]:
    """The oracle: autograd's gradients of row i's loss, each use of a tied weight alone and both together."""
    both = autograd_gradients(model, rows, i)
    anatomy = dissect(model)
    if not anatomy.tied:
        return both
    return autograd_gradients(untie(copy.deepcopy(model)), rows, i) | {
        TIED: both[f"{anatomy.embedding_name}.weight"]
    }


def check(
    stats: dict[str, Statistics], targets: Targets, gradients: list[dict[str, Tensor]], bound: float
) -> None:
    """Compare every statistic of every target and sample with that of its gradients by parameter."""
    faults = []
    for sample, by_name in enumerate(gradients):
        for target, parameters in targets.members.items():
            truth, numel = five([by_name[name] for name in parameters]), targets.numel[target]
            found = stats[target]
            values = {name: getattr(found, name)[sample].item() for name in ("sum", "sumsq", "min", "max")}
            values |= {"mean": found.mean(numel)[sample].item(), "std": found.std(numel)[sample].item()}
            faults += _faults(values, truth, numel, bound, f"{target} sample {sample}")
            assert found.nonfinite[sample] == 0
    assert not faults, "\n".join(faults[:20])


def _faults(
    values: dict[str, float], truth: dict[str, float], numel: int, bound: float, where: str
) -> list[str]:
    # A sum may cancel: its error is that of its terms.
    scales = {"sum": truth["norm"] * numel**0.5, "mean": truth["norm"] / numel**0.5}
    return [
        f"{where} {key}: {value!r} instead of {truth[key]!r}"
        for key, value in values.items()
        if not abs(value - truth[key]) <= bound * max(abs(truth[key]), scales.get(key, 0.0), 1e-30)
    ]


def check_table(
    path: Path, model: nn.Module, rows: Rows, targets: dict[str, list[str]], bound: float
) -> pa.Table:
    """Compare a score table with the oracle: one record a row, and its loss and statistics; returns it."""
    table = pq.read_table(path)
    assert table["index"].to_pylist() == list(range(len(rows.ids)))
    assert table["num_tokens"].to_pylist() == [len(ids) for ids in rows.ids]
    assert table["num_label_tokens"].to_pylist() == [int(mask.sum()) for mask in rows.masks]
    assert set(table["status"].to_pylist()) == {"ok"}
    faults = []
    for i, record in enumerate(table.to_pylist()):
        gradients = gradients_of(model, rows, i)
        for target, parameters in targets.items():
            parts = [gradients[name] for name in parameters]
            truth, numel = five(parts), sum(part.numel() for part in parts)
            values = {key: record[f"{target}.{key}"] for key in truth}
            faults += _faults(values, truth, numel, bound, f"{target} row {i}")
        faults += _faults(
            {"loss": record["loss"]},
            {"loss": autograd_loss(model, rows, i).item(), "norm": 0},
            1,
            bound,
            f"row {i}",
        )
    assert not faults, "\n".join(faults[:20])
    return table
