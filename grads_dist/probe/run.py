"""The probe stage: from tokens to shards of the score table and of features, on all ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grads_dist.config import Config
from grads_dist.data.store import TokenStore
from grads_dist.errors import GradsDistError
from grads_dist.probe.checkpoints import Checkpoints
from grads_dist.probe.config import gradient_files
from grads_dist.probe.features import content_projection
from grads_dist.probe.passes import train_pass
from grads_dist.probe.plan import Plan, frozen_plan, train_plan
from grads_dist.probe.save import save_model
from grads_dist.probe.session import Session
from grads_dist.probe.sweeps import FROZEN_STEP, feature_pass, frozen_pass
from grads_dist.probe.work import Work
from grads_dist.resume import WARM_PREFIX, Done, score_prefix, sweep_name
from grads_dist.runtime.journal import Journal
from grads_dist.runtime.ranks import Ranks
from grads_dist.runtime.rundir import RunDir
from grads_dist.table.shards import FeatureShards, ScoreShards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is to be probed and what of it is done."""

    config: Config
    rundir: RunDir
    store: TokenStore
    target: TokenStore | None
    """The target set, whose rows get features alone."""
    done: Done
    journal: Journal

    def at(self, checkpoint: int) -> Task:
        """The same at the weights of one of several checkpoints."""
        return replace(self, config=at_checkpoint(self.config, checkpoint))


def run_probe(task: Task, ranks: Ranks) -> dict:
    """Probe all rows of the store that are not done, at the weights of every checkpoint. Collective.

    Returns what the manifest says of it. Raises Interrupted on all ranks when one was asked to stop: what is
    complete then counts when the run is started again.
    """
    checkpoints = task.config.probe.checkpoints
    if not checkpoints:
        return _probe_at(task, ranks, 0)
    found = []
    for number in range(len(checkpoints)):
        log.info("checkpoint %d of %d: %s", number + 1, len(checkpoints), checkpoints[number])
        found.append(_probe_at(task.at(number), ranks, number))
    features = {name: about for part in found for name, about in part["features"].items()}
    commits = [part["model_commit"] for part in found]
    return {**found[0], "features": features, "model_commit": commits, "checkpoints": checkpoints}


def at_checkpoint(config: Config, number: int) -> Config:
    """The configuration of a probe of one of `probe.checkpoints`: a model, or an adapter on the model."""
    name, model = config.probe.checkpoints[number], config.model
    if (Path(name) / "adapter_config.json").is_file():
        return replace(config, model=replace(model, adapter=name))
    # A revision is one of the model that it was given for.
    revision = model.revision if name == model.name_or_path else None
    return replace(config, model=replace(model, name_or_path=name, revision=revision))


def _probe_at(task: Task, ranks: Ranks, checkpoint: int) -> dict:
    """Probe at the weights of one model."""
    probe, store = task.config.probe, task.store
    steps_per_epoch = -(-store.num_rows // probe.global_batch)
    session = Session(task.config, ranks, num_steps=steps_per_epoch * probe.epochs)
    ranks.on_all(session.check_targets)
    work = _work(session, task, store, checkpoint)
    target = None
    if task.target is not None:
        target = _work(session, task, task.target, checkpoint, is_target=True)
    if probe.mode == "frozen":
        frozen_pass(work, _sweep(work, task.done, "probe", checkpoint), FROZEN_STEP, score_prefix(checkpoint))
        _probe_target(target, task.done, checkpoint)
        num_steps = 0
    else:
        num_steps = _train(task, work, target)
    # Rank 0 may have written it while another is still on its way here.
    if probe.save_model and not ranks.on_main(task.rundir.model.exists):
        with ranks.unwatched():
            save_model(session, task.config, task.rundir.model)
    # Ranks end at different times, and the collectives below would time out.
    ranks.barrier()
    manifest = {
        "targets": {name: {"numel": numel} for name, numel in session.targets.numel.items()},
        "features": _describe_features(work, num_steps, checkpoint),
        "plan": {
            "optimizer_steps": num_steps,
            "skipped_steps": session.num_skipped,
            "rows": store.num_rows,
            "world_size": ranks.world_size,
        },
        "model_commit": getattr(session.model.anatomy.model.config, "_commit_hash", None),
        "zero_stage": session.stage,
        "deepspeed": session.deepspeed if session.engine is not None else None,
    }
    if checkpoint < len(probe.checkpoints) - 1:
        session.close()
    return manifest


def _work(session: Session, task: Task, store: TokenStore, checkpoint: int, is_target: bool = False) -> Work:
    """Where the numbers of a store's rows go; content features are those of the first checkpoint."""
    probe, rundir = task.config.probe, task.rundir
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
    return Work(session, store, probe, scores, features, sketches, rundir.limits, task.journal)


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


def _sweep(work: Work, done: Done, kind: str, checkpoint: int = 0, rows: np.ndarray | None = None) -> Plan:
    """The frozen plan of some rows of a store, or all, less what is done of the sweep of this kind.

    Raises GradsDistError where shards are there that are of another plan.
    """
    rows = np.arange(work.store.num_rows) if rows is None else rows
    spans = done.of(sweep_name(kind, checkpoint))
    config = work.config
    try:
        plan = frozen_plan(work.store.num_tokens, rows, config.shard_rows, config.batch_tokens, spans)
    except ValueError as error:
        raise GradsDistError(
            f"the shards of the run are not of this plan ({error}); --overwrite starts anew"
        ) from None
    if spans:
        log.info("%s: %d of %d rows are there already", kind, len(rows) - len(plan.order), len(rows))
    return plan


def _probe_target(target: Work | None, done: Done, checkpoint: int = 0) -> None:
    """Features of the target set at frozen weights."""
    if target is None:
        return
    if target.sketches is not None:
        frozen_pass(target, _sweep(target, done, "target", checkpoint), FROZEN_STEP)
    elif target.features is not None:
        feature_pass(target, _sweep(target, done, "target", checkpoint))


def _train(task: Task, work: Work, target: Work | None) -> int:
    """Content features first, with the initial weights; then the epochs. Returns the number of optimizer
    steps."""
    config, store, position = work.config, work.store, task.done.position
    steps_per_epoch = -(-store.num_rows // config.global_batch)
    if task.done.trained:
        log.info("all rows were recorded by an earlier start")
        return steps_per_epoch * config.epochs
    checkpoints = Checkpoints(work.session, task.rundir.checkpoints, config.checkpoint_steps)
    if position is not None:
        checkpoints.load(position)
    elif work.features is not None:
        feature_pass(work, _sweep(work, task.done, "features"))
        if target is not None:
            feature_pass(target, _sweep(target, task.done, "target features"))
    made = position.step if position is not None else 0
    last = config.epochs - 1
    for epoch in range(config.epochs):
        first = epoch * steps_per_epoch
        if made >= first + steps_per_epoch and epoch < last:
            continue
        plan = train_plan(store.num_tokens, config.global_batch, config.batch_tokens, config.seed, epoch)
        steps = range(max(0, made - first), plan.num_groups)
        if epoch < last:
            train_pass(work, plan, steps, record=False, first_step=first, checkpoints=checkpoints)
    if config.warmup is not None:
        return _warm_up_and_freeze(task, work, target, plan, checkpoints)
    train_pass(work, plan, steps, record=True, first_step=first, checkpoints=checkpoints)
    if config.save_model and made < first + plan.num_groups:
        _save(work, checkpoints, first + plan.num_groups)
    return first + plan.num_groups


def _warm_up_and_freeze(
    task: Task, work: Work, target: Work | None, plan: Plan, checkpoints: Checkpoints
) -> int:
    """Train on a share of the epoch, then probe the other rows, or all, at the weights reached."""
    config, store, position = work.config, work.store, task.done.position
    assert config.warmup is not None
    warm = max(1, round(config.warmup * plan.num_groups))
    rest = config.warmup_probe == "rest"
    first = (config.epochs - 1) * plan.num_groups
    made = position.step if position is not None else 0
    steps = range(max(0, made - first), warm)
    train_pass(work, plan, steps, record=rest, first_step=first, checkpoints=checkpoints)
    if made < first + warm:
        _save(work, checkpoints, first + warm)
    work.session.freeze()
    trained = plan.order[: plan.batch_offsets[plan.group_offsets[warm]]]
    rows = np.arange(store.num_rows)
    if rest:
        rows = np.setdiff1d(rows, trained)
    log.info("weights frozen after %d of %d steps; probing %d rows at them", warm, plan.num_groups, len(rows))
    unfeatured = replace(work, features=None)
    frozen_pass(unfeatured, _sweep(work, task.done, "probe", rows=rows), first + warm, prefix=WARM_PREFIX)
    _probe_target(None if target is None else replace(target, features=None), task.done)
    return first + warm


def _save(work: Work, checkpoints: Checkpoints, step: int) -> None:
    """Keep the weights that the epoch has led to: what follows needs them, also after another start."""
    ranks = work.session.ranks
    with ranks.working("checkpoint"), ranks.unwatched():
        checkpoints.save(step)
    ranks.meet()
