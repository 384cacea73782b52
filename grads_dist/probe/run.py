"""The probe stage: from tokens to shards of the score table and of features, on all ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.config import Config
from grads_dist.data.store import TokenStore
from grads_dist.probe.config import gradient_files
from grads_dist.probe.features import content_projection
from grads_dist.probe.passes import FROZEN_STEP, Work, feature_pass, frozen_pass, train_pass
from grads_dist.probe.plan import Plan, frozen_plan, train_plan
from grads_dist.probe.save import save_model
from grads_dist.probe.session import Session
from grads_dist.runtime.ranks import Ranks
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)


def run_probe(
    config: Config, ranks: Ranks, rundir: RunDir, store: TokenStore, target: TokenStore | None = None
) -> dict:
    """Probe all rows of the store, at the weights of every checkpoint; returns what the manifest says of it.

    The rows of `target`, the target set, get features alone. Collective.
    """
    checkpoints = config.probe.checkpoints
    if not checkpoints:
        return _probe_at(config, ranks, rundir, (store, target), 0)
    found = []
    for number in range(len(checkpoints)):
        log.info("checkpoint %d of %d: %s", number + 1, len(checkpoints), checkpoints[number])
        at = at_checkpoint(config, number)
        found.append(_probe_at(at, ranks, rundir, (store, target), number))
    features = {name: about for part in found for name, about in part["features"].items()}
    nonfinite = sum(part["nonfinite_rows"] for part in found)
    commits = [part["model_commit"] for part in found]
    whole = {"features": features, "nonfinite_rows": nonfinite, "model_commit": commits}
    return {**found[0], **whole, "checkpoints": checkpoints}


def at_checkpoint(config: Config, number: int) -> Config:
    """The configuration of a probe of one of `probe.checkpoints`: a model, or an adapter on the model."""
    name, model = config.probe.checkpoints[number], config.model
    if (Path(name) / "adapter_config.json").is_file():
        return replace(config, model=replace(model, adapter=name))
    # A revision is one of the model that it was given for.
    revision = model.revision if name == model.name_or_path else None
    return replace(config, model=replace(model, name_or_path=name, revision=revision))


def _probe_at(
    config: Config,
    ranks: Ranks,
    rundir: RunDir,
    stores: tuple[TokenStore, TokenStore | None],
    checkpoint: int,
) -> dict:
    """Probe at the weights of one model."""
    probe, (store, target_store) = config.probe, stores
    steps_per_epoch = -(-store.num_rows // probe.global_batch)
    session = Session(config, ranks, num_steps=steps_per_epoch * probe.epochs)
    work = _work(session, config, rundir, store, checkpoint)
    target = None
    if target_store is not None:
        target = _work(session, config, rundir, target_store, checkpoint, is_target=True)
    if probe.mode == "frozen":
        frozen_pass(work, _sweep(work), FROZEN_STEP, prefix=f"checkpoint{checkpoint}-" if checkpoint else "")
        _probe_target(target)
        num_steps = 0
    else:
        num_steps = _train(work, target)
    if probe.save_model:
        save_model(session, config, rundir.model)
    # Ranks end at different times, and the collective below would time out.
    ranks.barrier()
    assert work.scores is not None
    manifest = {
        "targets": {name: {"numel": numel} for name, numel in session.targets.numel.items()},
        "features": _describe_features(work, num_steps, checkpoint),
        "plan": {"optimizer_steps": num_steps, "rows": store.num_rows, "world_size": ranks.world_size},
        "nonfinite_rows": sum(ranks.gather(work.scores.num_nonfinite)),
        "lm_head": _describe_head(np.sum(ranks.gather(work.scores.head_counts), axis=0)),
        "model_commit": getattr(session.model.anatomy.model.config, "_commit_hash", None),
        "zero_stage": session.stage,
        "deepspeed": session.deepspeed if session.engine is not None else None,
    }
    if checkpoint < len(probe.checkpoints) - 1:
        session.close()
    return manifest


def _describe_head(counts: np.ndarray) -> dict[str, int]:
    """How the statistics of the LM head came about where no weight gradient was summed on the way."""
    certified, rows, whole = counts.tolist()
    if certified:
        log.info(
            "LM head: %.0f rows of its gradient formed a sample on average, for %d samples; all rows for %d",
            rows / certified,
            certified,
            whole,
        )
    return {"certified_samples": certified, "rows_formed": rows, "samples_formed_whole": whole}


def _work(
    session: Session,
    config: Config,
    rundir: RunDir,
    store: TokenStore,
    checkpoint: int,
    is_target: bool = False,
) -> Work:
    """Where the numbers of a store's rows go; content features are those of the first checkpoint."""
    probe = config.probe
    features = sketches = scores = None

    def folder(name: str) -> Path:
        return rundir.features_dir(RunDir.of_target(name) if is_target else name)

    if "content" in probe.feature_names and checkpoint == 0:
        width = session.model.anatomy.embedding_dim
        projection = content_projection(width, probe, session.ranks.device)
        features = FeatureShards(folder("content"), store, projection)
    if "gradient" in probe.feature_names:
        name = gradient_files(len(probe.checkpoints))[checkpoint]
        sketches = FeatureShards(folder(name), store, None)
    if not is_target:
        scores = ScoreShards(rundir.scores_dir, store, session.targets, checkpoint)
    return Work(session, store, probe, scores, features, sketches)


def _describe_features(work: Work, num_steps: int, checkpoint: int) -> dict[str, Any]:
    """Which weights each kind of features is of, and what gradient features are made with."""
    probe = work.config
    described: dict[str, Any] = {}
    weights = probe.checkpoints[checkpoint] if probe.checkpoints else "initial"
    if work.features is not None:
        described["content"] = {"weights": weights}
    if work.sketches is not None and work.session.sketcher is not None:
        sketcher = work.session.sketcher
        log.info("gradient features: %.1f MiB of signs on this rank", sketcher.num_bytes / 2**20)
        described[gradient_files(len(probe.checkpoints))[checkpoint]] = {
            "weights": f"step {num_steps}" if num_steps else weights,
            "dim": sketcher.dim,
            "seed": probe.seed,
            "targets": list(sketcher.targets.members),
        }
    return described


def _sweep(work: Work, rows: np.ndarray | None = None) -> Plan:
    """The frozen plan of some rows of a store, or all."""
    rows = np.arange(work.store.num_rows) if rows is None else rows
    return frozen_plan(work.store.num_tokens, rows, work.config.shard_rows, work.config.batch_tokens)


def _probe_target(target: Work | None) -> None:
    """Features of the target set at frozen weights."""
    if target is None:
        return
    if target.sketches is not None:
        frozen_pass(target, _sweep(target), FROZEN_STEP)
    elif target.features is not None:
        feature_pass(target, _sweep(target))


def _train(work: Work, target: Work | None) -> int:
    """Content features first, with the initial weights; then the epochs. Returns the number of optimizer
    steps."""
    config, store = work.config, work.store
    if work.features is not None:
        feature_pass(work, _sweep(work))
        _probe_target(None if target is None else replace(target, sketches=None))
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
    num_steps = _warm_up_and_freeze(work, plan, steps_made)
    _probe_target(None if target is None else replace(target, features=None))
    return num_steps


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
    unfeatured = replace(work, features=None)
    frozen_pass(unfeatured, _sweep(work, rows), steps_made + warm, prefix="frozen")
    return steps_made + warm
