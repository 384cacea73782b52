"""Sweeps: passes over rows in any order, at fixed weights, which can go on where they stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from grads_dist.model.probed import Batch
from grads_dist.probe.batches import dummy_batch
from grads_dist.probe.memory import is_out_of_memory, largest_batches, release
from grads_dist.probe.plan import Plan, share_units
from grads_dist.probe.progress import Progress
from grads_dist.probe.work import Sent, Work
from grads_dist.table.notes import OUT_OF_MEMORY
from grads_dist.table.spans import Span, span_name

log = logging.getLogger(__name__)

FROZEN_STEP = -1
"""`step` of rows that were probed at weights that no step of this run made."""

FROZEN_WEIGHT = 1024.0
"""Weight of a loss where nothing is updated. Any would do, as the statistics are freed of it; a power of two
changes no bit of them, and a large one keeps small gradients of float16 models from underflowing."""

FEATURES = "features"
"""Label of a sweep without statistics."""

FLUSH_SECONDS = 300.0
"""A rank writes what it has after so long, also within a unit: no more than that is lost with it."""

Process = Callable[[Batch], Sent | None]
"""Computes a batch's numbers and starts them on their way; None for a batch without rows."""


def feature_pass(work: Work, plan: Plan) -> None:
    """Content features of all rows of the plan from forward passes at the present weights. Collective."""
    assert work.features is not None
    shards = work.features

    def process(batch: Batch) -> Sent | None:
        features = work.session.features(batch, work.config.feature_tokens)
        return Sent(batch, features=shards.send(features)) if len(batch.rows) else None

    _Sweep(work, plan, FEATURES, process).run()


def frozen_pass(work: Work, plan: Plan, step: int, prefix: str = "") -> None:
    """Statistics of all rows of the plan without an update, and features where this pass yields them.

    Collective: all ranks meet at the end, where a run that was asked to stop does.
    """
    feature_tokens = work.config.feature_tokens if work.features is not None else None

    def process(batch: Batch) -> Sent | None:
        found = work.session.measure(batch, feature_tokens, sketching=work.sketches is not None)
        return work.send(batch, found) if len(batch.rows) else None

    label = "probe" if work.scores is not None else "target"
    _Sweep(work, plan, label, process, step, prefix).run()


@dataclass
class _Sweep:
    """One sweep on this rank: its batches, and when what came of them is written."""

    work: Work
    plan: Plan
    label: str
    process: Process
    step: int = FROZEN_STEP
    prefix: str = ""
    _limit: float = float("inf")
    """Padded tokens that did not fit once: batches of as many are split before they are tried."""
    _sent: Sent | None = None
    """The last batch, whose numbers are asked for when the next one is under way."""

    def run(self) -> None:
        work, ranks = self.work, self.work.session.ranks
        shares = share_units(self.plan, work.store.num_tokens, work.world_size)
        rows = sum(len(self.plan.rows_of(group)) for group in shares[work.rank])
        with ranks.working(self.label), work.showing(self.label, rows) as progress:
            if work.session.lockstep:
                largest = largest_batches(self.plan, work.store.num_tokens)
                work.rehearse([self.plan.batch(k) for k in largest], record=self.label != FEATURES)
            flushed, written = 0, time.monotonic()
            for group, batch, seen, ends in self._batches(shares):
                work.beat(batch)
                self._try(batch, progress)
                stops = self._stops()
                late = time.monotonic() - written > FLUSH_SECONDS
                if group >= 0 and (ends or stops or late):
                    self._receive(progress)
                    self._flush(group, flushed, seen)
                    flushed, written = (0 if ends else seen), time.monotonic()
                if stops:
                    break
        ranks.meet()

    def _batches(self, shares: list[list[int]]) -> Iterator[tuple[int, Batch, int, bool]]:
        """This rank's (group, micro-batch, rows of the group so far, whether it ends the group).

        Where passes are collective they are padded with dummies, so that every rank gets equally many.
        """
        work, plan = self.work, self.plan
        counts = [sum(len(plan.batches_of(group)) for group in share) for share in shares]
        for group in shares[work.rank]:
            batches, seen = plan.batches_of(group), 0
            for k in batches:
                rows = plan.batch(k)
                seen += len(rows)
                yield group, self._collate(rows), seen, k == batches.stop - 1
        if work.session.lockstep:
            for _ in range(max(counts) - counts[work.rank]):
                yield -1, dummy_batch(work.session.ranks.device), 0, False

    def _collate(self, rows: np.ndarray) -> Batch:
        return self.work.collate(rows, np.full(len(rows), FROZEN_WEIGHT))

    def _stops(self) -> bool:
        ranks = self.work.session.ranks
        asked = ranks.stop_requested() is not None
        # Where passes are collective all ranks must leave after the same one.
        return ranks.any_of(asked)[0] if self.work.session.lockstep else asked

    def _try(self, batch: Batch, progress: Progress) -> None:
        """Process a batch; where it does not fit into memory its halves, down to single rows.

        A row that does not fit alone is rejected. Under ZeRO-3 nothing can be tried again by one rank alone,
        and a pass for features has no table to reject rows in: there all ranks end.
        """
        rows, padded = batch.rows.numpy(), batch.input_ids.numel()
        if padded < self._limit or len(rows) < 2:
            try:
                sent = self.process(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                self._receive(progress)
                self._sent = sent
                return
            # Only here, where the exception and the tensors that it holds are gone.
            release(self.work.session.ranks.device)
            self._limit = min(self._limit, padded)
        if self.work.session.lockstep or self.work.scores is None:
            raise self.work.does_not_fit(rows)
        if len(rows) == 1:
            self._reject(int(rows[0]))
            return
        log.warning("%s: %s are tried as two batches", OUT_OF_MEMORY, self.work.describe(batch))
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            self._try(self._collate(half), progress)

    def _receive(self, progress: Progress) -> None:
        """Add the rows of the last batch, if that has not been done."""
        sent, self._sent = self._sent, None
        if sent is not None:
            self.work.receive(sent, self.step, progress)

    def _reject(self, row: int) -> None:
        assert self.work.scores is not None
        reason = f"{OUT_OF_MEMORY}: its {self.work.store.num_tokens[row]} tokens do not fit alone"
        log.warning("row %d: %s", self.work.store.index[row], reason)
        self.work.scores.reject(row, reason)

    def _flush(self, group: int, start: int, stop: int) -> None:
        """Write the rows `start` to `stop` of a group; the table last, since it says what is complete."""
        assert self.plan.spans is not None
        unit, first, _ = self.plan.spans[group].tolist()
        name = span_name(Span(unit, first + start, first + stop))
        # A file system may take its time.
        with self.work.session.ranks.unwatched():
            for shards in (self.work.features, self.work.sketches):
                if shards is not None:
                    shards.flush(name)
            if self.work.scores is not None:
                self.work.scores.flush(self.prefix + name)
