"""Optimizer steps of the preliminary epoch, with statistics of the micro-batches as they are trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from grads_dist.errors import GradsDistError
from grads_dist.model.probed import Batch
from grads_dist.probe.batches import dummy_batch
from grads_dist.probe.checkpoints import Checkpoints
from grads_dist.probe.memory import is_out_of_memory, largest_batches
from grads_dist.probe.plan import Plan
from grads_dist.probe.progress import Progress
from grads_dist.probe.work import Sent, Work

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 2
"""Consecutive steps in which no rank sees a finite row before the run counts as diverged."""


def train_pass(
    work: Work,
    plan: Plan,
    steps: range,
    record: bool,
    first_step: int = 0,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Optimizer steps of a plan, with statistics of the micro-batches as they are trained on. Collective.

    Args:
        steps: which groups of the plan.
        record: whether statistics are read.
        first_step: optimizer steps made before this plan, for the table's `step`.
        checkpoints: where the state goes every so often, and when the run is asked to stop.

    Raises Interrupted on all ranks when one of them was asked to stop, with everything written.
    """
    assert work.scores is not None
    ranks, skipped = work.session.ranks, work.session.num_skipped
    rows = plan.rows_of_rank(range(steps.stop), work.rank, work.world_size)
    done = plan.rows_of_rank(range(steps.start), work.rank, work.world_size)
    _warn_of_idle_ranks(work, plan, steps)
    lost = 0
    label = "probe" if record else "train"
    with ranks.working(label), work.showing(label, rows, done) as progress:
        if steps:
            work.rehearse([plan.batch(k) for k in largest_batches(plan, work.store.num_tokens)], record)
        for step in steps:
            made = first_step + step + 1
            finite = _train_step(work, plan, step, record, made - 1, progress)
            due = checkpoints is not None and ranks.is_main and checkpoints.due(made)
            stops, due, finite = ranks.any_of(ranks.stop_requested() is not None, due, finite)
            lost = 0 if finite else lost + 1
            if lost >= MAX_NONFINITE_STEPS:
                ranks.agree(_divergence(made - 1))
            last = step == steps[-1]
            if last and not stops:
                # The last moment at which a signal finds the state of the epoch worth keeping.
                (stops,) = ranks.any_of(ranks.stop_requested() is not None)
            if stops or due or last or work.scores.num_rows >= work.config.shard_rows:
                _flush(work, made)
            if checkpoints is not None and (stops or due):
                with ranks.unwatched():
                    checkpoints.save(made)
            if stops:
                break
    if work.session.num_skipped > skipped:
        log.warning(
            "%d optimizer steps were skipped: their gradients were not finite",
            work.session.num_skipped - skipped,
        )
    ranks.meet()


def _divergence(step: int) -> GradsDistError:
    return GradsDistError(
        f"step {step}: every gradient is non-finite, for {MAX_NONFINITE_STEPS} steps; "
        f"lower probe.learning_rate, or look at the rows of that step"
    )


def _flush(work: Work, steps: int) -> None:
    """Write the rows of the steps up to the `steps`-th that are not written; resume.py reads the name."""
    assert work.scores is not None
    name = f"step{steps:08d}-rank{work.rank:05d}-rows{work.scores.num_rows:06d}"
    # A file system may take its time.
    with work.session.ranks.unwatched():
        work.scores.flush(name, work.session.num_skipped)


def _train_step(work: Work, plan: Plan, step: int, record: bool, number: int, progress: Progress) -> bool:
    """This rank's part of one optimizer step; returns whether it saw a loss and gradients that are finite."""
    finite, before = False, None
    for batch, last in _step_batches(work, plan, step):
        kind = "step" if last else "micro-batch"
        work.beat(batch, f"step {number}, ", kind)
        sent = _train_micro_batch(work, batch, last, record)
        # Numbers are asked for when the next micro-batch is under way.
        finite |= _receive(work, before, number, progress)
        before = sent
    return finite | _receive(work, before, number, progress)


def _receive(work: Work, sent: Sent | None, step: int, progress: Progress) -> bool:
    """Add the rows of a micro-batch; whether any of them is finite, as far as is known."""
    if sent is None:
        return False
    signal = work.receive(sent, step, progress)
    return signal is None or bool(np.isfinite(signal).any())


def _train_micro_batch(work: Work, batch: Batch, last: bool, record: bool) -> Sent | None:
    """Train on one micro-batch and start its numbers on their way; None for a batch without rows."""
    try:
        found = work.session.train_micro_batch(batch, last, record)
        sent = None
        if len(batch.rows):
            # Before the update, which then need not be waited for.
            sent = Sent(batch) if found is None else work.send(batch, found)
        work.session.update()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return sent
    raise work.does_not_fit(batch.rows.numpy())


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
