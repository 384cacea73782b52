"""The token store: every usable row's tokens and loss mask, memory-mapped from flat arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from grads_dist.data.layout import META, REJECTED
from grads_dist.errors import DataError

SCHEMA = 3


class Ids(Sequence[str]):
    """The rows' ids, decoded when asked for."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        self._text = text
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, item: int) -> str: ...

    @overload
    def __getitem__(self, item: slice) -> list[str]: ...

    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self[k] for k in range(*item.indices(len(self)))]
        k = range(len(self))[item]
        return self._text[self._offsets[k] : self._offsets[k + 1]].tobytes().decode("utf-8")


class TokenStore:
    """Read-only tokens of the usable rows, in corpus order; opened by path on every rank."""

    def __init__(self, path: Path, meta: dict) -> None:
        self.path = path
        """The folder."""
        self.meta = meta
        """Counts and choices, as written when the store was made."""
        self.num_rows: int = meta["num_rows"]
        """N, the number of usable rows."""
        self.num_truncated: int = meta["num_truncated"]
        """How many of them were cut at max_length."""
        self.num_rejected: int = meta["num_rejected"]
        """How many corpus rows cannot be used."""
        self.pad_token_id: int = meta["pad_token_id"]
        self.vocab_size: int = meta["vocab_size"]
        """Every token id is below it."""
        self.index = self._load("index")
        """int64[N], row numbers in the corpus, ascending."""
        self.num_tokens = self._load("num_tokens")
        """int32[N]."""
        self.num_label_tokens = self._load("num_label_tokens")
        """int32[N], at least 1: how many tokens of the row carry loss."""
        self.token_hash = self._load("token_hash")
        """int64[N], equal for equal tokens."""
        self.ids: Sequence[str] = Ids(self._load("id_bytes"), self._load("id_offsets"))
        """The id column, or the row number as text."""
        self._offsets = self._load("offsets")
        self._tokens = self._load("tokens")
        self._loss = self._load("loss")

    @staticmethod
    def open(path: Path) -> TokenStore:
        """Map the store in the folder `path`. Raises DataError when this version cannot read it."""
        path = Path(path)
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            if meta.get("schema") != SCHEMA:
                raise DataError(f"{str(path)!r} holds tokens of schema {meta.get('schema')}, not {SCHEMA}")
            return TokenStore(path, meta)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{str(path)!r} is no whole token store ({error})") from error

    def tokens(self, i: int) -> np.ndarray:
        """int32[T], the token ids of the store's row `i`."""
        return self._tokens[self._offsets[i] : self._offsets[i + 1]]

    def loss_mask(self, i: int) -> np.ndarray:
        """bool[T]: token t is a target that carries loss. Never the first, which nothing predicts."""
        return self._loss[self._offsets[i] : self._offsets[i + 1]].view(np.bool_)

    def iter_rejected(self) -> Iterator[tuple[int, str]]:
        """(row number, reason) of the corpus rows that cannot be used, ascending."""
        with (self.path / REJECTED).open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                yield record["index"], record["reason"]

    def _load(self, name: str) -> np.ndarray:
        array = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        # A plain view: slices of np.memmap are memmap objects themselves, which is slow for many small ones.
        return np.asarray(array)
