"""The probe stage: from tokens to shards of the score table and of features, on all ranks."""

from __future__ import annotations

import logging

import numpy as np

from grads_dist.config import Config
from grads_dist.data.store import TokenStore
from grads_dist.probe.passes import (
    FROZEN_STEP,
    Work,
    content_projection,
    feature_pass,
    frozen_pass,
    train_pass,
)
from grads_dist.probe.plan import Plan, frozen_plan, train_plan
from grads_dist.probe.session import Session
from grads_dist.runtime.ranks import Ranks
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)


def run_probe(config: Config, ranks: Ranks, rundir: RunDir, store: TokenStore) -> dict:
    """Probe all rows of the store; returns what the manifest says of it. Collective."""
    probe = config.probe
    steps_per_epoch = -(-store.num_rows // probe.global_batch)
    session = Session(config, ranks, num_steps=steps_per_epoch * probe.epochs)
    features = None
    if probe.features != "none":
        width = session.model.anatomy.embedding_dim
        projection = content_projection(width, probe, ranks.device)
        features = FeatureShards(rundir.features_dir(probe.features), store, projection)
    work = Work(session, store, probe, ScoreShards(rundir.scores_dir, store, session.targets), features)
    everything = np.arange(store.num_rows)
    sweep = frozen_plan(store.num_tokens, everything, probe.shard_rows, probe.batch_tokens)
    if probe.mode == "frozen":
        frozen_pass(work, sweep, FROZEN_STEP)
        num_steps = 0
    else:
        num_steps = _train(work, sweep)
    # Ranks end at different times, and the collective below would time out.
    ranks.barrier()
    return {
        "targets": {name: {"numel": numel} for name, numel in session.targets.numel.items()},
        "features": {} if features is None else {probe.features: {"weights": "initial"}},
        "plan": {"optimizer_steps": num_steps, "rows": store.num_rows, "world_size": ranks.world_size},
        "nonfinite_rows": sum(ranks.gather(work.scores.num_nonfinite)),
        "model_commit": getattr(session.model.anatomy.model.config, "_commit_hash", None),
        "zero_stage": session.stage,
        "deepspeed": session.deepspeed if session.engine is not None else None,
    }


def _train(work: Work, sweep: Plan) -> int:
    """Features first, with the initial weights; then the epochs. Returns the number of optimizer steps."""
    config, store = work.config, work.store
    if work.features is not None:
        feature_pass(work, sweep)
        # Ranks end this pass at different times, and a collective of the training would time out.
        work.session.ranks.barrier()
    steps_made = 0
    for epoch in range(config.epochs):
        plan = train_plan(store.num_tokens, config.global_batch, config.batch_tokens, config.seed, epoch)
        if epoch < config.epochs - 1:
            train_pass(work, plan, range(plan.num_groups), record=False, first_step=steps_made)
            steps_made += plan.num_groups
    if config.warmup is None:
        train_pass(work, plan, range(plan.num_groups), record=True, first_step=steps_made)
        return steps_made + plan.num_groups
    return _warm_up_and_freeze(work, plan, steps_made)


def _warm_up_and_freeze(work: Work, plan: Plan, steps_made: int) -> int:
    """Train on a share of the epoch, then probe the other rows, or all, at the weights reached."""
    config, store = work.config, work.store
    assert config.warmup is not None
    warm = max(1, round(config.warmup * plan.num_groups))
    rest = config.warmup_probe == "rest"
    train_pass(work, plan, range(warm), record=rest, first_step=steps_made)
    work.session.freeze()
    trained = plan.order[: plan.batch_offsets[plan.group_offsets[warm]]]
    rows = np.arange(store.num_rows)
    if rest:
        rows = np.setdiff1d(rows, trained)
    log.info("weights frozen after %d of %d steps; probing %d rows at them", warm, plan.num_groups, len(rows))
    frozen = frozen_plan(store.num_tokens, rows, config.shard_rows, config.batch_tokens)
    unfeatured = Work(work.session, store, config, work.scores, None)
    frozen_pass(unfeatured, frozen, steps_made + warm, prefix="frozen")
    return steps_made + warm
