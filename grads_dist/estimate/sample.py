"""The tokens of a corpus, from the cache where it holds them, else from a sample of the rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.data.detect import resolve_formats
from grads_dist.data.encode import EncodedRow, Encoding, RowEncoder
from grads_dist.data.formats import read_id, used_columns
from grads_dist.data.rows import Broken, RowError
from grads_dist.data.tokenize import cached
from grads_dist.data.tokenizer import TokenizerSource
from grads_dist.errors import DataError
from grads_dist.probe.batches import TokenSource

RUN_ROWS = 10
"""Sampled rows come in runs of so many neighbours, because a table reads a whole group of rows for one."""

DEFAULT_ID_BYTES = 12


@dataclass(frozen=True)
class Sample:
    """What is known of a corpus of `num_rows` rows from `num_read` of them, all if `exact`.

    `num_tokens` and `num_label_tokens` int64 [n] are those of the n usable rows among them, `tokens` gives
    their ids; `run` int64 [n] says which run of neighbours each came with.
    """

    num_rows: int
    num_read: int
    num_tokens: np.ndarray
    num_label_tokens: np.ndarray
    num_truncated: int
    tokens: TokenSource
    exact: bool
    cached: bool = False
    run: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    num_runs: int = 0
    id_bytes: float = DEFAULT_ID_BYTES
    """Mean size of a row's id."""
    seconds: float = 0.0
    """What tokenizing the sample took."""

    @property
    def num_usable(self) -> int:
        """Usable rows of the corpus, estimated if not exact."""
        return round(self.num_rows * len(self.num_tokens) / self.num_read)

    def total(self, values: np.ndarray) -> tuple[float, float]:
        """The sum over all rows of the corpus of `values` [n], and its standard error.

        The error is that of the means of the runs: neighbours in a corpus are alike.
        """
        if self.exact:
            return float(values.sum()), 0.0
        total = self.num_rows * float(values.sum()) / self.num_read
        if self.num_runs < 2:
            return total, float("inf")
        sums = np.bincount(self.run, weights=values, minlength=self.num_runs)
        unseen = 1 - self.num_read / self.num_rows
        error = float(sums.std(ddof=1)) * self.num_runs**0.5 * unseen**0.5
        return total, self.num_rows / self.num_read * error


@dataclass(frozen=True)
class EncodedRows:
    """Rows in memory as a token source."""

    rows: list[EncodedRow]

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of row i, int32 [T_i]."""
        return self.rows[i].tokens

    def loss_mask(self, i: int) -> np.ndarray:
        """Which tokens of row i carry loss, bool [T_i]."""
        return self.rows[i].loss


def read_sample(
    config: DataConfig,
    source: TokenizerSource,
    vocab_size: int,
    size: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Look at `size` rows of the corpus, all of them where it has no more or the cache holds its tokens.

    Raises what `Corpus.open` and `tokenize` raise, and DataError when no sampled row can be used.
    """
    corpus = Corpus.open(config)
    store = cached(config, corpus, source, vocab_size)
    if store is not None:
        return Sample(
            num_rows=corpus.num_rows,
            num_read=corpus.num_rows,
            num_tokens=store.num_tokens.astype(np.int64),
            num_label_tokens=store.num_label_tokens.astype(np.int64),
            num_truncated=store.num_truncated,
            tokens=store,
            exact=True,
            cached=True,
        )
    encoding = Encoding(config, tuple(resolve_formats(config, corpus)), source, vocab_size)
    encoder = RowEncoder(encoding)
    start = clock()
    found = _Reading(encoding, encoder, corpus)
    starts = run_starts(corpus.num_rows, size, seed)
    for run, (first, stop) in enumerate(starts):
        found.read(run, first, stop)
    return found.sample(len(starts), clock() - start)


def run_starts(num_rows: int, size: int, seed: int) -> list[tuple[int, int]]:
    """(first row, end) of runs that hold about `size` of the rows, at a random place in equal parts each."""
    if size >= num_rows:
        return [(0, num_rows)]
    length = min(RUN_ROWS, size)
    count = size // length
    edges = np.linspace(0, num_rows, count + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    firsts = edges[:-1] + (rng.random(count) * (np.diff(edges) - length + 1)).astype(np.int64)
    return [(int(first), int(first) + length) for first in firsts]


class _Reading:
    """Rows as they are encoded."""

    def __init__(self, encoding: Encoding, encoder: RowEncoder, corpus: Corpus) -> None:
        self._encoding, self._encoder, self._corpus = encoding, encoder, corpus
        self._rows: list[EncodedRow] = []
        self._runs: list[int] = []
        self._id_bytes = self._num_read = 0
        self._fault: tuple[int, RowError] | None = None

    def read(self, run: int, first: int, stop: int) -> None:
        """Encode the rows from `first` to `stop`."""
        config = self._encoding.config
        self._num_read += stop - first
        for part, row_format in enumerate(self._encoding.formats):
            low, high = self._corpus.part_range(part, first, stop)
            if low >= high:
                continue
            for index, row in self._corpus.iter_rows(low, high, used_columns(config, row_format)):
                try:
                    if isinstance(row, Broken):
                        raise RowError("broken row", row.reason)
                    encoded = self._encoder.encode(row, row_format)
                    self._id_bytes += len(read_id(row, config, index).encode())
                except RowError as error:
                    self._fault = self._fault or (index, error)
                    continue
                self._rows.append(encoded)
                self._runs.append(run)

    def sample(self, num_runs: int, seconds: float) -> Sample:
        """What was read."""
        if not self._rows:
            assert self._fault is not None
            index, error = self._fault
            raise DataError(
                f"data.path: none of {self._num_read} sampled rows can be used; as row {index}: "
                f"{error.reason}"
            )
        return Sample(
            num_rows=self._corpus.num_rows,
            num_read=self._num_read,
            num_tokens=np.array([len(row.tokens) for row in self._rows], np.int64),
            num_label_tokens=np.array([int(row.loss.sum()) for row in self._rows], np.int64),
            num_truncated=sum(row.is_truncated for row in self._rows),
            tokens=EncodedRows(self._rows),
            exact=self._num_read == self._corpus.num_rows,
            run=np.array(self._runs, np.int64),
            num_runs=num_runs,
            id_bytes=self._id_bytes / len(self._rows),
            seconds=seconds,
        )
