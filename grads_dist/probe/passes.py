"""The passes of a probe over the corpus: features, training with statistics, statistics at frozen weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grads_dist.data.store import TokenStore
from grads_dist.errors import GradsDistError
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import collate, dummy_batch
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.plan import Plan, share_units
from grads_dist.probe.progress import Progress
from grads_dist.probe.session import Measurement, Session
from grads_dist.stats.sketch import unit_length
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)

FROZEN_STEP = -1
"""`step` of rows that were probed at weights that no step of this run made."""

FROZEN_WEIGHT = 1024.0
"""Weight of a loss where nothing is updated. Any would do, as the statistics are freed of it; a power of two
changes no bit of them, and a large one keeps small gradients of float16 models from underflowing."""

MAX_NONFINITE_STEPS = 2
"""Consecutive steps of which a rank may see nothing but non-finite rows before the run counts as diverged."""


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


def feature_pass(work: Work, plan: Plan) -> None:
    """Content features of all rows of the plan from forward passes at the present weights."""
    assert work.features is not None
    progress = _progress(work, "features", plan)
    for unit, batch, ends_unit in _unit_batches(work, plan):
        features = work.session.features(batch, work.config.feature_tokens)
        if len(batch.rows):
            work.features.add(batch, features)
            progress.update(len(batch.rows), batch.layout.segments.num_rows)
        if ends_unit:
            work.features.flush(f"{unit:06d}")
    progress.close()


def frozen_pass(work: Work, plan: Plan, step: int, prefix: str = "") -> None:
    """Statistics of all rows of the plan without an update, and features where this pass yields them."""
    progress = _progress(work, "probe" if work.scores is not None else "target", plan)
    feature_tokens = work.config.feature_tokens if work.features is not None else None
    for unit, batch, ends_unit in _unit_batches(work, plan):
        found = work.session.measure(batch, feature_tokens, sketching=work.sketches is not None)
        if len(batch.rows):
            signal = _add(work, batch, found, step)
            progress.update(len(batch.rows), batch.layout.segments.num_rows, signal)
        if ends_unit:
            if work.scores is not None:
                work.scores.flush(f"{prefix}{unit:06d}")
            for shards in (work.features, work.sketches):
                if shards is not None:
                    shards.flush(f"{unit:06d}")
    progress.close()


def _add(work: Work, batch: Batch, found: Measurement, step: int) -> np.ndarray | None:
    """Hand what a batch gave to where it goes; returns the rows' mean log norms, if they are scored."""
    if work.features is not None and found.features is not None:
        work.features.add(batch, found.features)
    if work.sketches is not None and found.sketch is not None:
        work.sketches.add(batch, unit_length(found.sketch))
    return None if work.scores is None else work.scores.add(batch, found.head, found.stats, step)


def train_pass(work: Work, plan: Plan, steps: range, record: bool, first_step: int = 0) -> None:
    """Optimizer steps of a plan, with statistics of the micro-batches as they are trained on.

    Args:
        steps: which groups of the plan.
        record: whether statistics are read.
        first_step: optimizer steps made before this plan, for the table's `step`.
    """
    assert work.scores is not None
    rows = plan.rows_of_rank(steps, work.rank, work.world_size)
    progress = Progress("probe" if record else "train", rows, work.session.ranks.is_main)
    _warn_of_idle_ranks(work, plan, steps)
    diverged = 0
    for step in steps:
        finite = _train_step(work, plan, step, record, first_step + step, progress)
        diverged = 0 if finite else diverged + 1
        if diverged >= MAX_NONFINITE_STEPS:
            raise GradsDistError(
                f"step {first_step + step}: every gradient is non-finite, for {diverged} steps; "
                f"lower probe.learning_rate, or look at the rows of that step"
            )
        if work.scores.num_rows >= work.config.shard_rows:
            work.scores.flush(_train_shard(first_step + step, work.rank))
    work.scores.flush(_train_shard(first_step + steps.stop, work.rank))
    progress.close()


def _train_step(work: Work, plan: Plan, step: int, record: bool, number: int, progress: Progress) -> bool:
    """This rank's part of one optimizer step; returns whether any of its losses and gradients is finite."""
    finite, seen = False, False
    for batch, last in _step_batches(work, plan, step):
        found = work.session.train_micro_batch(batch, last, record)
        if not len(batch.rows):
            continue
        signal = _add(work, batch, found, number) if found is not None else None
        seen = True
        finite = finite or signal is None or bool(np.isfinite(signal).any())
        progress.update(len(batch.rows), batch.layout.segments.num_rows, signal)
    return finite or not seen


def _train_shard(step: int, rank: int) -> str:
    return f"step{step:08d}-rank{rank:05d}"


def _step_batches(work: Work, plan: Plan, step: int) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of one step and whether it is the last; every rank gets equally many."""
    batches = plan.batches_of(step)
    weights = _sample_weights(work, plan.rows_of(step))
    start = int(plan.batch_offsets[batches.start])
    rounds = -(-len(batches) // work.world_size)
    for i in range(rounds):
        k = batches.start + i * work.world_size + work.rank
        last = i == rounds - 1
        if k >= batches.stop:
            yield dummy_batch(work.session.ranks.device), last
            continue
        span = slice(int(plan.batch_offsets[k]) - start, int(plan.batch_offsets[k + 1]) - start)
        yield work.collate(plan.batch(k), weights[span]), last


def _sample_weights(work: Work, rows: np.ndarray) -> np.ndarray:
    """Weight of each row's loss in its step; the factor world size undoes DeepSpeed's mean over ranks."""
    if work.config.objective == "token_mean":
        labels = work.store.num_label_tokens[rows].astype(np.float64)
        return work.world_size * labels / labels.sum()
    return np.full(len(rows), work.world_size / len(rows))


def _unit_batches(work: Work, plan: Plan) -> Iterator[tuple[int, Batch, bool]]:
    """This rank's (unit, micro-batch, whether it ends the unit).

    Where passes are collective they are padded with dummies, so that every rank gets equally many.
    """
    shares = share_units(plan, work.store.num_tokens, work.world_size)
    counts = [sum(len(plan.batches_of(unit)) for unit in share) for share in shares]
    for unit in shares[work.rank]:
        batches = plan.batches_of(unit)
        for k in batches:
            rows = plan.batch(k)
            yield unit, work.collate(rows, np.full(len(rows), FROZEN_WEIGHT)), k == batches.stop - 1
    if work.session.lockstep:
        for _ in range(max(counts) - counts[work.rank]):
            yield -1, dummy_batch(work.session.ranks.device), False


def _progress(work: Work, label: str, plan: Plan) -> Progress:
    share = share_units(plan, work.store.num_tokens, work.world_size)[work.rank]
    rows = sum(len(plan.rows_of(unit)) for unit in share)
    return Progress(label, rows, work.session.ranks.is_main)


def _warn_of_idle_ranks(work: Work, plan: Plan, steps: range) -> None:
    batches = len(range(plan.group_offsets[steps.start], plan.group_offsets[steps.stop]))
    slots = sum(-(-len(plan.batches_of(s)) // work.world_size) * work.world_size for s in steps)
    if slots and batches / slots < 0.8 and work.session.ranks.is_main:
        log.warning(
            "ranks are idle %.0f %% of the time: a step has %.1f micro-batches for %d ranks; lower "
            "probe.batch_tokens or raise probe.global_batch",
            100 * (1 - batches / slots),
            batches / max(1, len(steps)),
            work.world_size,
        )
