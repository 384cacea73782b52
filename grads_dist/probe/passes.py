"""The passes of a probe over the corpus: features, training with statistics, statistics at frozen weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grads_dist.data.store import TokenStore
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import collate, dummy_batch
from grads_dist.probe.config import ProbeConfig
from grads_dist.probe.plan import Plan
from grads_dist.probe.progress import Progress
from grads_dist.probe.session import Session
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)

FROZEN_STEP = -1
"""`step` of rows that were probed at weights that no step of this run made."""


@dataclass(frozen=True)
class Work:
    """What every pass works with on this rank."""

    session: Session
    store: TokenStore
    config: ProbeConfig
    scores: ScoreShards
    features: FeatureShards | None

    @property
    def rank(self) -> int:
        """This rank."""
        return self.session.ranks.rank

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.session.ranks.world_size


def content_projection(hidden_size: int, config: ProbeConfig, device: torch.device) -> Tensor | None:
    """Gaussian projection [D, k] that keeps inner products in expectation, the same on every rank.

    None when the features have no more than `sketch_dim` dimensions.
    """
    if hidden_size <= config.sketch_dim:
        return None
    digest = hashlib.blake2b(b"content", digest_size=4).digest()
    generator = torch.Generator().manual_seed(config.seed * 2**32 + int.from_bytes(digest, "big"))
    gaussian = torch.randn(hidden_size, config.sketch_dim, generator=generator)
    return (gaussian / config.sketch_dim**0.5).to(device)


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
    progress = _progress(work, "probe", plan)
    feature_tokens = work.config.feature_tokens if work.features is not None else None
    for unit, batch, ends_unit in _unit_batches(work, plan):
        found = work.session.measure(batch, feature_tokens)
        if len(batch.rows):
            signal = work.scores.add(batch, found.head, found.stats, step)
            if work.features is not None and found.features is not None:
                work.features.add(batch, found.features)
            progress.update(len(batch.rows), batch.layout.segments.num_rows, signal)
        if ends_unit:
            work.scores.flush(f"{prefix}{unit:06d}")
            if work.features is not None:
                work.features.flush(f"{unit:06d}")
    progress.close()


def train_pass(work: Work, plan: Plan, steps: range, record: bool, first_step: int = 0) -> None:
    """Optimizer steps of a plan, with statistics of the micro-batches as they are trained on.

    Args:
        steps: which groups of the plan.
        record: whether statistics are read.
        first_step: optimizer steps made before this plan, for the table's `step`.
    """
    rows = sum(
        len(plan.batch(i)) for s in steps for i in list(plan.batches_of(s))[work.rank :: work.world_size]
    )
    progress = Progress("train" if not record else "probe", rows, work.session.ranks.is_main)
    _warn_of_idle_ranks(work, plan, steps)
    for step in steps:
        for batch, last in _step_batches(work, plan, step):
            found = work.session.train_micro_batch(batch, last, record)
            if not len(batch.rows):
                continue
            signal = None
            if found is not None:
                signal = work.scores.add(batch, found.head, found.stats, first_step + step)
            progress.update(len(batch.rows), batch.layout.segments.num_rows, signal)
        if work.scores.num_rows >= work.config.shard_rows:
            work.scores.flush(_train_shard(first_step + step, work.rank))
    work.scores.flush(_train_shard(first_step + steps.stop, work.rank))
    progress.close()


def _train_shard(step: int, rank: int) -> str:
    return f"step{step:08d}-rank{rank:05d}"


def _step_batches(work: Work, plan: Plan, step: int) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of one step and whether it is the last; every rank gets equally many."""
    device = work.session.ranks.device
    batches = plan.batches_of(step)
    weights = _sample_weights(work, plan.rows_of(step))
    start = int(plan.batch_offsets[batches.start])
    rounds = -(-len(batches) // work.world_size)
    for i in range(rounds):
        k = batches.start + i * work.world_size + work.rank
        last = i == rounds - 1
        if k >= batches.stop:
            yield dummy_batch(device), last
            continue
        span = slice(int(plan.batch_offsets[k]) - start, int(plan.batch_offsets[k + 1]) - start)
        yield collate(work.store, plan.batch(k), weights[span], device), last


def _sample_weights(work: Work, rows: np.ndarray) -> np.ndarray:
    """Weight of each row's loss in its step; the factor world size undoes DeepSpeed's mean over ranks."""
    if work.config.objective == "token_mean":
        labels = work.store.num_label_tokens[rows].astype(np.float64)
        return work.world_size * labels / labels.sum()
    return np.full(len(rows), work.world_size / len(rows))


def _unit_batches(work: Work, plan: Plan) -> Iterator[tuple[int, Batch, bool]]:
    """This rank's (unit, micro-batch, whether it ends the unit); where passes are collective, padded with
    dummies so that every rank gets equally many."""
    device = work.session.ranks.device
    counts = [
        sum(len(plan.batches_of(u)) for u in range(rank, plan.num_groups, work.world_size))
        for rank in range(work.world_size)
    ]
    for unit in range(work.rank, plan.num_groups, work.world_size):
        batches = plan.batches_of(unit)
        for k in batches:
            rows = plan.batch(k)
            # Any weight but 0 will do, since nothing is updated; the statistics are freed of it.
            yield unit, collate(work.store, rows, np.ones(len(rows)), device), k == batches.stop - 1
    if work.session.lockstep:
        for _ in range(max(counts) - counts[work.rank]):
            yield -1, dummy_batch(device), False


def _progress(work: Work, label: str, plan: Plan) -> Progress:
    rows = sum(len(plan.rows_of(u)) for u in range(work.rank, plan.num_groups, work.world_size))
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
