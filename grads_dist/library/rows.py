"""Which dataset row each row of a training batch is, through shuffling, workers and ranks.

The trainer's own sampler, collator and column removal are kept: rows carry their number past them, and a
batch leaves the collator with the facts of its rows, which are taken out before the model sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grads_dist.data.encode import token_hash
from grads_dist.errors import ConfigError
from grads_dist.library.inputs import IGNORED

KEY = "grads_dist_rows"
"""Under which a row carries its number, and a batch the facts of its rows."""


@dataclass(frozen=True)
class RowFacts:
    """What the score table says of the rows of a batch besides their gradients; one number a row."""

    index: np.ndarray
    num_tokens: np.ndarray
    num_label_tokens: np.ndarray
    token_hash: np.ndarray


class NumberedRows(torch.utils.data.Dataset):
    """A map-style dataset whose rows carry their number."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` with its number."""
        return _with_number(self._rows[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as the dataset itself reads them."""
        if not hasattr(self._rows, "__getitems__"):
            return [self[index] for index in indices]
        rows = self._rows.__getitems__(indices)
        return [_with_number(row, index) for row, index in zip(rows, indices, strict=True)]


def _with_number(row: Any, index: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"ScoreTableCallback: rows of train_dataset are of type {type(row).__name__}; allowed: "
            f"dictionaries"
        )
    return {**row, KEY: index}


class FactsCollator:
    """A collator that hands the rows on without their number, and adds their facts to the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch of the rows with its RowFacts under KEY."""
        numbers = [row[KEY] for row in rows]
        batch = self._collate([{name: row[name] for name in row if name != KEY} for row in rows])
        batch[KEY] = facts_of(numbers, batch)
        return batch


def facts_of(numbers: Sequence[int], batch: Any) -> RowFacts:
    """The facts of a collated batch on the CPU.

    Raises ConfigError when it does not hold one row of token ids and labels for each number.
    """
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or len(ids) != len(numbers):
        raise ConfigError(
            "ScoreTableCallback: the collator does not make one row of input_ids and labels of each dataset "
            "row (packing? no labels?)"
        )
    loss = labels != IGNORED
    loss[:, 0] = False
    tokens, hashes = [], []
    for sample in range(len(numbers)):
        real = slice(None) if mask is None else mask[sample].bool()
        row, carries = ids[sample][real].numpy(), loss[sample][real].numpy()
        tokens.append(len(row))
        hashes.append(token_hash(row, carries))
    return RowFacts(
        index=np.array(numbers, dtype=np.int64),
        num_tokens=np.array(tokens, dtype=np.int32),
        num_label_tokens=loss.sum(1).numpy().astype(np.int32),
        token_hash=np.array(hashes, dtype=np.int64),
    )


@contextmanager
def numbered(trainer: Any) -> Iterator[None]:
    """While inside, the trainer builds its training data with numbered rows; afterwards it is as it was."""
    dataset, collator, columns = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
    trainer._set_signature_columns_if_needed()
    kept = trainer._signature_columns
    rows = trainer._remove_unused_columns(dataset) if hasattr(dataset, "remove_columns") else dataset
    sampler = trainer._get_train_sampler
    trainer.train_dataset, trainer.data_collator = NumberedRows(rows), FactsCollator(collator)
    trainer._signature_columns = [*kept, KEY]
    # Some samplers look at the dataset's columns.
    trainer._get_train_sampler = lambda _=None: sampler(dataset)
    try:
        yield
    finally:
        trainer.train_dataset, trainer.data_collator = dataset, collator
        trainer._signature_columns = columns
        del trainer._get_train_sampler


def ids_of(dataset: Any, indices: Sequence[int]) -> list[str]:
    """What the `id` column says of the rows; their numbers where there is none."""
    if "id" not in (getattr(dataset, "column_names", None) or ()):
        return [str(index) for index in indices]
    return [str(value) for value in dataset.select_columns(["id"])[list(indices)]["id"]]
