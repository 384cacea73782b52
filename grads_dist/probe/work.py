"""What every pass works with on a rank: the model, the rows, and where the numbers go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grads_dist.data.store import TokenStore
from grads_dist.errors import GradsDistError
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import collate, rehearsal_batch
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.memory import is_out_of_memory, name_rows, refusal
from grads_dist.probe.progress import Progress
from grads_dist.probe.session import Measurement, Session
from grads_dist.runtime.journal import Journal
from grads_dist.stats.sketch import unit_length
from grads_dist.stats.tensors import HostCopy
from grads_dist.table.shards import FeatureShards, ScoreShards, SentScores

log = logging.getLogger(__name__)

COSTLY_LENGTH = 1024
"""Tokens of a row at which attention, which grows with their square, is taken to cost as much as all else.
In a model of width d it does at about 6 d: so long rows have too much time rather than too little."""


@dataclass(frozen=True)
class Sent:
    """A micro-batch whose numbers are on their way to the host; None: there are none of a kind."""

    batch: Batch
    scores: SentScores | None = None
    features: HostCopy | None = None
    sketches: HostCopy | None = None


@dataclass(frozen=True)
class Work:
    """What every pass works with on this rank, and where the numbers go; None: nowhere."""

    session: Session
    store: TokenStore
    config: ProbeConfig
    scores: ScoreShards | None
    features: FeatureShards | None
    """Content features."""
    sketches: FeatureShards | None = None
    """Gradient features."""
    limits: Path | None = None
    """Where a rank that runs out of memory says how large batches may be from then on."""
    journal: Journal = Journal()

    @property
    def rank(self) -> int:
        """This rank."""
        return self.session.ranks.rank

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.session.ranks.world_size

    def collate(self, rows: np.ndarray, weights: np.ndarray) -> Batch:
        """The batch of the given rows of the store, on this rank's device."""
        avoid = self.session.model.anatomy.head_counts
        return collate(self.store, rows, weights, self.session.ranks.device, avoid)

    def send(self, batch: Batch, found: Measurement) -> Sent:
        """Start what a batch gave on its way to where it goes.

        All that needs memory on the device is here: a batch that runs out of it is tried again, and has not
        been added. Numbers of one batch travel while the next is computed.
        """
        features = sketches = None
        if self.features is not None and found.features is not None:
            features = self.features.send(found.features)
        if self.sketches is not None and found.sketch is not None:
            sketches = self.sketches.send(unit_length(found.sketch))
        scores = None if self.scores is None else self.scores.send(found.head, found.stats)
        return Sent(batch, scores, features, sketches)

    def receive(self, sent: Sent, step: int, progress: Progress) -> np.ndarray | None:
        """Hand a batch's numbers over, waiting for them; the rows' mean log norms, if they are scored."""
        batch, loss, signal = sent.batch, None, None
        if self.scores is not None and sent.scores is not None:
            loss, signal = self.scores.receive(batch, sent.scores, step)
        if self.features is not None and sent.features is not None:
            self.features.receive(batch, sent.features)
        if self.sketches is not None and sent.sketches is not None:
            self.sketches.receive(batch, sent.sketches)
        progress.update(
            len(batch.rows), batch.layout.segments.num_rows, signal, loss, None if step < 0 else step
        )
        return signal

    @contextmanager
    def showing(self, label: str, rows: int, done: int = 0) -> Iterator[Progress]:
        """The progress of a pass over `rows` rows of this rank, `done` of which an earlier start made."""
        ranks, journal = self.session.ranks, self.journal
        progress = Progress(label, rows, ranks.is_main, journal.metrics, journal.trackers, done)
        yield progress
        progress.close()

    def describe(self, batch: Batch) -> str:
        """What the main thread is at while it works on a batch, for the report of a failure."""
        if not len(batch.rows):
            return "nothing, beside the other ranks"
        return f"rows {name_rows(self.store.index[batch.rows.numpy()])}"

    def beat(self, batch: Batch, before: str = "", kind: str = "") -> None:
        """Say that this rank begins with a batch, with `before` before its rows; `kind` as in `Ranks`."""
        cost = batch_cost(*batch.input_ids.shape)
        self.session.ranks.beat(f"{before}{self.describe(batch)}", kind, cost)

    def does_not_fit(self, rows: np.ndarray) -> GradsDistError:
        """The error for a batch of these rows of the store that ran out of memory."""
        longest = int(self.store.num_tokens[rows].max())
        return refusal(self.store.index[rows], longest, self.config.batch_tokens, self.limits)

    def rehearse(self, batches: list[np.ndarray], record: bool) -> None:
        """Pass batches as large as these first, whose numbers go nowhere: memory runs out now or never.

        record: whether the pass reads statistics. Collective where passes are.
        """
        for rows in batches:
            shape = (len(rows), int(self.store.num_tokens[rows].max()))
            doing = f"rehearsal of the largest batch, rows {name_rows(self.store.index[rows])}"
            self.session.ranks.beat(doing, "rehearsal", batch_cost(*shape))
            try:
                device, vocab_size = self.session.ranks.device, self.session.model.anatomy.vocab_size
                self.session.rehearse(rehearsal_batch(*shape, vocab_size, device), record)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            raise self.does_not_fit(rows)


def batch_cost(num_rows: int, num_tokens: int) -> float:
    """What a batch of so many rows of so many tokens costs, roughly in proportion to its time."""
    return num_rows * num_tokens * (1 + num_tokens / COSTLY_LENGTH)
