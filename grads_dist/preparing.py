"""What rank 0 does before any rank probes: checks, the lock, tokens, and what an earlier start has left."""

from __future__ import annotations

import heapq
import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from grads_dist import provenance
from grads_dist.config import Config, save_config
from grads_dist.data.config import DataConfig
from grads_dist.data.corpus import Corpus
from grads_dist.errors import ConfigError
from grads_dist.identity import CLEARING, JOB, LAUNCH, Identity, Share, differences, identify, read_identity
from grads_dist.preflight import check_before_work
from grads_dist.resume import Done, take_stock
from grads_dist.runtime import launcher
from grads_dist.runtime.lock import RunLock
from grads_dist.runtime.rundir import RunDir, atomic_write, write_json

if TYPE_CHECKING:
    from grads_dist.data.store import TokenStore
    from grads_dist.runtime.ranks import Ranks

log = logging.getLogger(__name__)

REJECTED_SHARE = 0.01
"""Share of rejected rows above which a warning says so."""


@dataclass(frozen=True)
class Request:
    """What a probe is asked for."""

    config: Config
    """With absolute paths."""
    rundir: RunDir
    overwrite: bool
    """Start anew, whatever an earlier start has left."""
    selecting: bool
    """Whether a selection follows."""
    share: Share | None


@dataclass(frozen=True)
class Tokenized:
    """A corpus that is ready to be probed."""

    fingerprint: str
    tokens: Path
    """Folder of the token store."""


@dataclass(frozen=True)
class Prepared:
    """What rank 0 found and made before any rank probes."""

    config: Config
    """The configuration as it holds: rows cut at the model's context, batches as memory allows."""
    corpus: Tokenized
    target: Tokenized | None
    """The target set, if there is one."""
    num_rows: int
    resumed: bool
    """Whether an earlier start of the same run is there."""
    finished: bool
    """Whether it has left nothing to do."""
    done: Done = Done()


def prepare(request: Request, ranks: Ranks, held: ExitStack) -> Prepared:
    """Check everything that can be checked, tokenize, and make or take over the run directory.

    An earlier run in the directory is removed, if asked, only when all checks have passed and the corpus is
    tokenized.

    Args:
        held: gets the release of the directory's lock.

    Raises ConfigError where an earlier start was of another configuration, corpus or model.
    """
    from grads_dist.data.target import about_target, target_config
    from grads_dist.selection.check import check_strata

    rundir = request.rundir
    rundir.check(request.overwrite, resumable=True)
    config = check_before_work(request.config, ranks, request.selecting)
    corpus = Corpus.open(config.data)
    if request.selecting:
        check_strata(config, corpus)
    target_corpus = None
    if config.data.target is not None and not config.probe.feature_names:
        log.warning("data.target is not read: probe.features is none")
    if config.data.target is not None and config.probe.feature_names:
        with about_target():
            target_corpus = Corpus.open(target_config(config.data))
    _claim(rundir, ranks, held)
    store = _tokenize(config, config.data, corpus, request.share)
    corpora = {"data.path": (corpus.fingerprint, store)}
    target = None
    if target_corpus is not None:
        with about_target():
            target_store = _tokenize(config, target_config(config.data), target_corpus, None)
        corpora["data.target"] = (target_corpus.fingerprint, target_store)
        target = Tokenized(target_corpus.fingerprint, target_store.path)
        if target_store.num_rejected:
            log.warning("%d rows of data.target are rejected", target_store.num_rejected)
    prepared = Prepared(
        config, Tokenized(corpus.fingerprint, store.path), target, store.num_rows, False, False
    )
    return _settle(request, ranks, prepared, corpora, corpus.num_rows)


def _claim(rundir: RunDir, ranks: Ranks, held: ExitStack) -> None:
    """Lock the run directory, and leave no trace of that if nothing comes of it."""
    existed = rundir.root.exists()
    rundir.mark()
    if not existed:
        held.callback(rundir.abandon)
    lock = RunLock.acquire(rundir.root)
    held.callback(lock.release)
    ranks.check_at_beats(lock.check)


def _settle(
    request: Request,
    ranks: Ranks,
    prepared: Prepared,
    corpora: dict[str, tuple[str, TokenStore]],
    num_rows: int,
) -> Prepared:
    """Make the run directory, or find out what it holds already."""
    from grads_dist.probe.checkpoints import check_world_size, remove_checkpoints
    from grads_dist.probe.memory import allowed_tokens
    from grads_dist.probe.zero import load_deepspeed_config, probe_dtype

    rundir, config = request.rundir, prepared.config
    deepspeed = load_deepspeed_config(config.deepspeed)
    dtype = str(probe_dtype(config.model, deepspeed, ranks.device)).removeprefix("torch.")
    identity = identify(config, corpora, deepspeed, request.share, num_rows, dtype)
    identity[JOB], identity[LAUNCH] = launcher.job(), ranks.launched_as.launch
    restarted = launcher.is_restarted() or ranks.launched_as.again
    resumed = _goes_on(rundir, identity, request.overwrite, restarted)
    finished = resumed and rundir.manifest.exists()
    if finished:
        remove_checkpoints(rundir.checkpoints)
    done = Done()
    if resumed and not finished:
        done = take_stock(config, rundir, prepared.num_rows)
        if done.position is not None and not done.trained:
            check_world_size(done.position, ranks.world_size)
    store = corpora["data.path"][1]
    if not resumed:
        write_json(rundir.started, {**identity, CLEARING: True})
        rundir.clear(keep=rundir.started)
    rundir.create(overwrite=False, resumable=True)
    if not resumed:
        write_rejected(rundir.rejected, store, {})
        write_json(rundir.started, identity)
    save_config(config, rundir.config)
    _describe_start(rundir, ranks)
    num_rows = store.num_rows + store.num_rejected
    if store.num_rejected > REJECTED_SHARE * num_rows:
        log.warning("%d of %d rows are rejected: see rejected.jsonl", store.num_rejected, num_rows)
    probe = replace(config.probe, batch_tokens=allowed_tokens(config.probe.batch_tokens, rundir.limits))
    config = replace(config, probe=probe)
    return replace(prepared, config=config, resumed=resumed, finished=finished, done=done)


def _goes_on(rundir: RunDir, identity: Identity, overwrite: bool, restarted: bool) -> bool:
    """Whether an earlier start has left something that counts. Raises ConfigError where it was another run.

    A batch job that is queued again with `overwrite`, and ranks that torchrun starts again, mean what was
    there before, and not what they have done themselves so far.
    """
    if not rundir.started.exists():
        return False
    if overwrite and not restarted:
        return False
    before = read_identity(rundir.started)
    if overwrite and not _is_their_own(before, identity):
        return False
    changed = differences(before, identity)
    if changed is not None:
        raise ConfigError(
            f"output_dir: {str(rundir.root)!r} holds another run: {changed}; allowed: what it was, "
            "another folder, or --overwrite to start anew"
        )
    return not before.get(CLEARING, False)


def _is_their_own(before: Identity, now: Identity) -> bool:
    """Whether a run was started by the batch job, or by the agents of torchrun, that start it now."""
    same_job = launcher.is_restarted() and before.get(JOB) == now[JOB]
    return same_job or (now[LAUNCH] is not None and before.get(LAUNCH) == now[LAUNCH])


def _describe_start(rundir: RunDir, ranks: Ranks) -> None:
    placement = ranks.placement
    about = provenance.environment(ranks.world_size, str(ranks.device), placement.launcher)
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(
        rundir.environment, {**about, "started": since, "host": socket.gethostname(), "pid": os.getpid()}
    )


def _tokenize(config: Config, data: DataConfig, corpus: Corpus, share: Share | None) -> TokenStore:
    from grads_dist.data.tokenize import tokenize
    from grads_dist.data.tokenizer import TokenizerSource
    from grads_dist.model.load import load_text_config

    model = config.model
    source = TokenizerSource(str(model.name_or_path), model.revision, model.trust_remote_code)
    rows = None
    if share is not None:
        rows = share.rows(corpus.num_rows)
        if not rows:
            raise ConfigError(
                f"shard: {share} of {corpus.num_rows} rows holds none; allowed: at most {corpus.num_rows}"
            )
    return tokenize(data, corpus, source, vocab_size=load_text_config(model).vocab_size, rows=rows)


def write_rejected(path: Path, store: TokenStore, more: Mapping[int, str]) -> None:
    """Write rejected.jsonl: rows that could not be tokenized, and `more` that could not be probed."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, reason in heapq.merge(store.iter_rejected(), sorted(more.items())):
            file.write(json.dumps({"index": index, "reason": reason}) + "\n")
